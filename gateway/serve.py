"""`engram serve`: the supervisor (`gateway.supervisor`) and its Granian workers.

Workers are spawned, not forked: a fresh interpreter reads `PROMETHEUS_MULTIPROC_DIR` before prometheus_client
is imported whatever this process has imported already, inherits no locks of this process's threads, and starts
with default signal handlers. The last matters: a forked worker has the supervisor's SIGTERM handler until
Granian installs its own, swallows the signal in that time, and the supervisor waits for it (FACTS: a SIGTERM
0.3–0.6 s after the start hung it).

TLS is 1.2 or newer, with HTTP/2 by ALPN. Without TLS there is HTTP/1.1 alone: clients speak plain HTTP/2 only when
told to, and to tell it from 1.1 Granian waits for a connection's first bytes without a time limit. Over TLS it does
that too; there `gateway.silence` ends who says nothing. What else is slow on HTTP/2 (a head that stops half-way, a
client that is gone) does not answer pings and is cut within `header_timeout_seconds`, a body by the gateway's own
limit. A head within `HEAD_SLACK` times our limits gets our 431 or 414; beyond, the HTTP/2 library's bare 431.

Granian stops accepting at as many connections as its `backpressure` says, whether or not anybody asks over them, and
`/health` waits like everything else. It is far above what is at work at once (`gateway.shed` bounds that), so that
clients who keep their connections, and some who say nothing for `header_timeout_seconds`, shut out nobody. An idle one
costs 2 to 10 KB (measured).

The event loop is uvloop's: a request wakes it two or three times from other threads, and asyncio's own loop spends
10 µs of Python on each (measured, side by side: lookups +9%, the edge alone +10%, creates +5%, searches +3%).

Granian shares a port by SO_REUSEPORT, so a second gateway on it would not fail but take half of the requests:
the port is tried without it first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

import granian._signals
from granian._granian import WorkerSignal
from granian.constants import HTTPModes, Interfaces, Loops, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels

from gateway.certificate import Certificate
from gateway.pulse import Pulse
from gateway.scheduling import take_turns
from gateway.silence import STOPPING, speaks_http2
from gateway.supervisor import Supervisor
from shared import counters, workers
from shared.ending import ends_with
from shared.errors import Permanent, exit_code
from shared.limits import Watch
from shared.log import configure, get_logger
from shared.orphan import end_with_parent
from shared.settings import Settings

PORT_WAIT_SECONDS = 10.0
HEAD_SLACK = 2
STREAMS = 128  # requests at once over one connection of HTTP/2
log = get_logger("gateway")


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
    configure(settings.log_level)
    certificate = Certificate.of(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until Granian has its own
    settings = settings.model_copy(update={"gateway_port": _free_port(settings)})
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _empty_metrics_dir(settings)
    settings.tenants_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    multiprocessing.set_start_method("spawn", force=True)
    server = Supervisor(
        "gateway.app:create",
        address=settings.gateway_host,
        port=settings.gateway_port,
        interface=Interfaces.ASGI,
        loop=Loops.uvloop,
        http=HTTPModes.auto if speaks_http2(settings) else HTTPModes.http1,
        workers=settings.gateway_workers,
        backlog=settings.gateway_backlog,
        backpressure=_connections(settings),
        websockets=False,
        http1_settings=HTTP1Settings(header_read_timeout=int(settings.header_timeout_seconds * 1_000)),
        http2_settings=_http2_settings(settings),
        ssl_cert=certificate.certificate if certificate else None,
        ssl_key=certificate.key if certificate else None,
        ssl_protocol_min=SSLProtocols.tls12 if settings.tls_minimum == "1.2" else SSLProtocols.tls13,
        log_level=LogLevels(settings.log_level),
        log_dictconfig=_LOGGING,
        log_access=False,
        silence_seconds=settings.worker_silence_seconds,
        restart_asked=_restart_asked(settings),
        given_up=partial(workers.say_not_replaced, settings),
        workers_kill_timeout=settings.gateway_kill_timeout_seconds,
    )
    server.serve(target_loader=partial(load, settings, os.getpid()), wrap_loader=False)


def _restart_asked(settings: Settings) -> Callable[[], tuple[str, int]]:
    """What the supervisor asks twice a second: the id of the newest wish for new workers, and which goes last."""
    watch = Watch(settings)

    def asked() -> tuple[str, int]:
        watch.poll()
        return watch.now.restart_workers, watch.now.restart_last_pid

    return asked


def _connections(settings: Settings) -> int:
    """What a worker accepts; most of its files are for the databases of open tenants."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a worker raises its own limit to it
    return settings.gateway_connections if files < 0 else max(1, min(settings.gateway_connections, files // 4))


def _http2_settings(settings: Settings) -> HTTP2Settings:
    """A ping after half of the head's time-out, its answer within the other half."""
    half_seconds = settings.header_timeout_seconds / 2
    return HTTP2Settings(
        keep_alive_interval=math.ceil(half_seconds * 1_000),
        keep_alive_timeout=math.ceil(half_seconds),
        max_concurrent_streams=STREAMS,
        max_headers_size=HEAD_SLACK * (settings.header_limit_bytes + settings.url_limit_bytes),
    )


def load(settings: Settings, parent_pid: int, pulse: Pulse) -> Any:
    """In the worker: the ASGI application. Imports late, when the environment is set."""
    end_with_parent(parent_pid, signal.SIGTERM)
    granian._signals.set_loop_signals = stop_once  # looked up by the worker after this returned
    from gateway.app import create_app

    app = create_app(settings, parent_pid, pulse)
    take_turns()  # before there is any other thread
    return app


def stop_once(loop: asyncio.AbstractEventLoop) -> WorkerSignal:
    """Granian's own, but for a second signal, which it does not survive: `WorkerSignal.set` then waits for a receiver
    that has left, holding the GIL, and the worker neither seals its spool nor ends. A Ctrl-C reaches workers twice:
    from the terminal and through the supervisor."""
    stop = WorkerSignal()
    stopping = False

    def heard() -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            STOPPING.set()
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heard)
    return stop


def _leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


def _empty_metrics_dir(settings: Settings) -> str:
    """A directory of its own for each port; what earlier processes counted is not ours, but for what they lost."""
    directory = counters.directory(settings)
    lost = counters.lost(directory)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    if lost:
        try:
            counters.carry_lost(directory, lost)
        except OSError as e:
            log.error("usage_lost_before", events=lost, uncounted_because=e.strerror)
    counters.begin(directory)
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
    from shared.safety import NOT_A_GATEWAYS, refuse_unsafe
    from shared.settings import settings as settings_from_environment

    with exit_code():
        refuse_unsafe(settings_from_environment(), NOT_A_GATEWAYS)
        serve(settings_from_environment())
        ends_with(0)
