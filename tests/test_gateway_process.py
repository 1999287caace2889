"""The processes: workers die and come back, a supervisor dies and nothing is left, SIGTERM ends in 0."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from shared import spool
from tests.gateway_stack import Gateway, Stack, eventually, gateway, stack  # noqa: F401


def _listening(url: str) -> bool:
    where = urlsplit(url)
    try:
        socket.create_connection((where.hostname, where.port), timeout=1).close()
    except OSError:
        return False
    return True


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _create(served: Gateway, headers: dict[str, str]) -> int:
    return httpx.post(
        f"{served.url}/v1/memories", json={"content": "x"}, headers=headers, trust_env=False, timeout=30
    ).status_code


def test_a_killed_worker_is_respawned_and_sigterm_then_ends_in_0(stack: Stack, tmp_path) -> None:  # noqa: F811
    """Both workers are killed in turn; every answered request is in the spool, and what is open is sealed."""
    tenant = stack.tenant()
    headers = stack.headers(tenant)
    data_dir = stack.settings.data_dir.parent / "process"
    (data_dir / "tenants").mkdir(parents=True)
    (data_dir / "tenants" / tenant).symlink_to(stack.settings.tenants_dir / tenant)
    with gateway(data_dir, stack.control_plane_url, stack.issuer) as served:
        answered = 0
        for _ in range(4):
            assert _create(served, headers) == 201
            answered += 1
        first, second = served.workers()
        first.kill()
        replaced = eventually(
            lambda: w if len(w := served.workers()) == 2 and first.pid not in {x.pid for x in w} else None
        )
        for _ in range(8):
            assert _create(served, headers) == 201
            answered += 1
        assert len(served.events(tenant)) == answered
        assert served.metric("engram_usage_events_total") == answered
        assert served.stop() == 0
        assert not _listening(served.url)
        assert not any(_alive(w) for w in (*replaced, second))
        directory = data_dir / "spool"
        unsealed = list(directory.glob("*.open"))
        assert len(unsealed) <= 1, "only the killed worker's segment is left for the drainer to adopt"
        spool.adopt(directory)
        assert sum(len(spool.read(p).events) for p in spool.sealed(directory)) == answered


def test_a_sigkilled_supervisor_leaves_nobody_on_the_port(stack: Stack, tmp_path) -> None:  # noqa: F811
    """The workers notice, seal their spools and go; the port is free for the next gateway."""
    tenant = stack.tenant()
    data_dir = stack.settings.data_dir.parent / "orphans"
    (data_dir / "tenants").mkdir(parents=True)
    (data_dir / "tenants" / tenant).symlink_to(stack.settings.tenants_dir / tenant)
    with gateway(data_dir, stack.control_plane_url, stack.issuer, gateway_workers=1) as served:
        assert _create(served, stack.headers(tenant)) == 201
        workers = served.workers()
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        eventually(lambda: not _listening(served.url) and not any(_alive(w) for w in workers))
        assert len(spool.sealed(data_dir / "spool")) == 1
        assert not list((data_dir / "spool").glob("*.open"))


@pytest.mark.parametrize("delay_seconds", [0.1, 0.4, 0.8])
def test_a_sigterm_while_starting_ends_it_too(stack: Stack, tmp_path, delay_seconds: float) -> None:  # noqa: F811
    """FACTS: a SIGTERM shortly after the start hung a forking supervisor for good."""
    code = (
        "from gateway.serve import serve; from shared.settings import Settings;"
        f"serve(Settings(data_dir={str(tmp_path)!r}, control_plane_url={stack.control_plane_url!r},"
        f" jwks_url={stack.issuer.url!r}, jwt_issuer='x', gateway_port=0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        process.wait(delay_seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
    assert process.wait(15) in (0, -signal.SIGTERM)


def test_a_port_that_is_taken_is_refused_not_shared(stack: Stack, tmp_path) -> None:  # noqa: F811
    """SO_REUSEPORT would let a second gateway take half of the first one's requests."""
    port = urlsplit(stack.gateway.url).port
    code = (
        "import gateway.serve as s; from shared.settings import Settings; s.PORT_WAIT_SECONDS = 0;"
        f"s.serve(Settings(data_dir={str(tmp_path)!r}, control_plane_url='x', jwks_url='x', jwt_issuer='x',"
        f" gateway_port={port}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1 and b"cannot listen" in done.stderr
