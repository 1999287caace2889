"""`engram serve`: Granian's supervisor and its workers.

Workers are spawned, not forked: a fresh interpreter reads `PROMETHEUS_MULTIPROC_DIR` before prometheus_client
is imported whatever this process has imported already, inherits no locks of this process's threads, and starts
with default signal handlers. The last matters: a forked worker has the supervisor's SIGTERM handler until
Granian installs its own, swallows the signal in that time, and the supervisor waits for it (FACTS: a SIGTERM
0.3–0.6 s after the start hung it).

Granian shares a port by SO_REUSEPORT, so a second gateway on it would not fail but take half of the requests:
the port is tried without it first.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

from granian.constants import Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server import Server

from shared.errors import Permanent
from shared.settings import Settings

PORT_WAIT_SECONDS = 10.0


class JsonLines(logging.Formatter):
    """Granian's own lines in the shape of ours."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "component": "granian",
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


_LOGGING: dict[str, Any] = {
    "formatters": {"json": {"()": "gateway.serve.JsonLines"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
    "loggers": {"_granian": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
}


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises `Permanent` when it cannot start, `SystemExit` when workers
    keep dying. Installs signal handlers: call it from the main thread."""
    settings.require("control_plane_url", "jwks_url", "jwt_issuer")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until Granian has its own
    settings = settings.model_copy(update={"gateway_port": _free_port(settings)})
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _empty_metrics_dir(settings)
    settings.tenants_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    multiprocessing.set_start_method("spawn", force=True)
    server = Server(
        "gateway.app:create",
        address=settings.gateway_host,
        port=settings.gateway_port,
        interface=Interfaces.ASGI,
        workers=settings.gateway_workers,
        backlog=settings.gateway_backlog,
        websockets=False,
        http1_settings=HTTP1Settings(header_read_timeout=int(settings.header_timeout_seconds * 1_000)),
        log_level=LogLevels(settings.log_level),
        log_dictconfig=_LOGGING,
        log_access=False,
        respawn_failed_workers=True,
        workers_kill_timeout=settings.gateway_kill_timeout_seconds,
    )
    server.serve(target_loader=partial(load, settings, os.getpid()), wrap_loader=False)


def load(settings: Settings, parent_pid: int) -> Any:
    """In the worker: the ASGI application. Imports late, when the environment is set."""
    from gateway.app import create_app

    return create_app(settings, parent_pid)


def _leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


def _empty_metrics_dir(settings: Settings) -> str:
    """A directory of its own for each port; what earlier processes counted is not ours."""
    directory = settings.data_dir / "run" / f"metrics-{settings.gateway_port}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    return str(directory)


def _free_port(settings: Settings) -> int:
    """The port to serve on (0: any). Waits a little: workers of a killed gateway may be on their way out."""
    deadline = time.monotonic() + PORT_WAIT_SECONDS
    while True:
        try:
            family = socket.AF_INET6 if ":" in settings.gateway_host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((settings.gateway_host, settings.gateway_port))
                port: int = probe.getsockname()[1]
                return port
        except OSError as e:
            if time.monotonic() >= deadline:
                address = f"{settings.gateway_host}:{settings.gateway_port}"
                raise Permanent(f"cannot listen on {address}: {e.strerror}") from e
            time.sleep(0.2)


if __name__ == "__main__":
    from shared.settings import settings as settings_from_environment

    serve(settings_from_environment())
