"""`engram monitor` as production starts it, with real programs: it tells the dead man's switch, and ends as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments import monitoring
from shared.settings import variable
from tests.core_fixtures import ROOT
from tests.environment_fixtures import SAFE, bare
from tests.gateway_stack import eventually
from tests.ports import free_ports

pytestmark = pytest.mark.skipif(
    any(shutil.which(debian) is None for debian, _, _ in monitoring._PROGRAMS.values()),
    reason="Prometheus, Alertmanager or the prober is not installed",
)
PRODUCTION = tomllib.loads((ROOT / "deployments" / "fly" / "monitoring.toml").read_text())["env"]
KEY = "a-key-of-the-switch-that-nobody-may-see"
PARTS = {"prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter", "python"}


@dataclass
class Outside:
    """A gateway to watch and somebody's dead man's switch, on one address."""

    port: int = 0
    heartbeats: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Outside]:
        outside = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = _answer

            def do_POST(self) -> None:
                outside.heartbeats.append(self.path)
                self._answer()

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.port = server.server_port
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield self
            server.shutdown()


@dataclass
class Monitor:
    process: subprocess.Popen[str]
    data_dir: Path
    prometheus_url: str
    outside: Outside

    def query(self, expression: str) -> dict[str, str]:
        """Values by instance; raises an `httpx.HTTPError` while Prometheus starts."""
        answer = httpx.get(f"{self.prometheus_url}/api/v1/query", params={"query": expression}, trust_env=False)
        found = answer.raise_for_status().json()["data"]["result"]
        return {each["metric"].get("instance", ""): each["value"][1] for each in found}

    def parts(self) -> dict[str, psutil.Process]:
        found = psutil.Process(self.process.pid).children()
        return {Path(child.cmdline()[0]).name.rstrip("0123456789."): child for child in found if child.cmdline()}

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr, once it has ended by itself."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@contextlib.contextmanager
def monitor(**changes: str) -> Iterator[Monitor]:
    """With the environment of the Fly file, except what must differ where everything is on one machine."""
    # Not in /tmp, where prod refuses to keep anything.
    with tempfile.TemporaryDirectory(prefix="engram-monitor-", dir="/var/tmp") as directory, Outside().serving() as out:
        ports = dict(zip(map(variable, monitoring.PORTS), map(str, free_ports(len(monitoring.PORTS))), strict=True))
        variables = PRODUCTION | ports | {
            "ENGRAM_DATA_DIR": directory,
            "ENGRAM_PROMETHEUS_HOST": "127.0.0.1",
            "ENGRAM_MONITORING_TARGETS": f"127.0.0.1:{out.port}",
            "ENGRAM_MONITORING_PROBE_URLS": f"http://127.0.0.1:{out.port}",
            "ENGRAM_MONITORING_SCRAPE_SECONDS": "0.5",
            "PREFECT_API_AUTH_STRING": SAFE["PREFECT_API_AUTH_STRING"],
            "ENGRAM_BRIDGE_TOKEN": "a-credential-of-forty-characters-or-so",
            "ENGRAM_HEARTBEAT_URL": f"http://127.0.0.1:{out.port}/{KEY}",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", "monitor"],
            env=bare() | variables | changes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        url = f"http://127.0.0.1:{ports['ENGRAM_PROMETHEUS_PORT']}"
        try:
            yield Monitor(process, Path(directory), url, out)
        finally:
            process.kill()
            process.wait()


def test_prod_is_watched_and_sigterm_ends_all_of_it() -> None:
    """The environment of the Fly file is enough for each part; what is left behind would keep the volume busy."""
    with monitor() as running:
        target = f"127.0.0.1:{running.outside.port}"
        eventually(lambda: running.query('up{job="engram-gateway"}') == {target: "1"}, 60)
        eventually(lambda: running.query('probe_success{probe="health"}') == {f"http://{target}": "1"}, 30)
        parts = running.parts()
        assert parts.keys() == PARTS
        running.process.send_signal(signal.SIGTERM)
        code, stderr = running.ended()
        assert (code, "monitoring_stopped" in stderr) == (0, True), stderr
        assert not [part for part in parts.values() if part.is_running()]


def test_the_switch_hears_the_heartbeat_until_a_part_dies_which_ends_the_rest_with_a_failure() -> None:
    """It has been through every part; a monitoring of which half is dead would look like one that has nothing to tell.
    The address of the switch is in no file and in no line."""
    with monitor(ENGRAM_ENV="dev", ENGRAM_MONITORING_MINUTE_SECONDS="1") as running:
        eventually(lambda: len(running.outside.heartbeats) > 2, 60)
        assert set(running.outside.heartbeats) == {f"/{KEY}"}
        parts = running.parts()
        os.kill(parts["prometheus"].pid, signal.SIGKILL)
        code, stderr = running.ended()
        assert code == 1 and stderr.splitlines()[-1].startswith("engram: prometheus: died (SIGKILL)"), stderr
        assert not [part for part in parts.values() if part.is_running()]
        written = [path.read_bytes() for path in running.data_dir.rglob("*") if path.is_file()]
        assert len(written) > 8 and not any(KEY.encode() in each for each in (*written, stderr.encode()))
