"""Connections over which nobody says anything, ended.

With HTTP/2 on offer Granian reads the first bytes of a connection to tell 2 from 1, without a time limit: who opens TLS
and stops there, or within the 24 bytes that begin HTTP/2, would stay for ever (measured: 25 s and no end, where every
later state is cut by Granian's own limits). The kernel knows for how long a connection was silent in both directions.

A worker that stops is in the same need: it tells clients of HTTP/2 that it leaves and waits for each to answer, which
one that has nothing to ask does not (measured: an idle httpx client kept a worker until it was killed, and a killed
worker seals nothing). Once no request is at work, who has been silent for `STOPPING_SECONDS` is ended.

A client of HTTP/2 answers Granian's pings and is never silent. One of HTTP/1.1 is while it waits for an answer: the
limit is `header_timeout_seconds` more than a request may take that a stopping gateway waits for.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable

from shared.log import get_logger
from shared.settings import Settings

STOPPING = threading.Event()  # of this worker; `gateway.serve` sets it
STOPPING_SECONDS = 1.0
LOOK_SECONDS = 0.25
_TCP_INFO_BYTES = 64
# In `struct tcp_info`: packets the peer has not acknowledged; when data was last sent and received, milliseconds ago.
_UNACKED_AT, _SENT_AT, _RECEIVED_AT = 24, 44, 52
log = get_logger("gateway")


def speaks_http2(settings: Settings) -> bool:
    """Over TLS, where the kernel can be asked about silence."""
    return bool(settings.tls_certificate) and settings.tls_http2 and sys.platform.startswith("linux")


class Silence:
    """Looks at this process's connections to the gateway's port. `is_idle` says that no request is at work."""

    def __init__(self, settings: Settings, is_idle: Callable[[], bool]) -> None:
        self._port = settings.gateway_port
        self._limit_seconds = settings.header_timeout_seconds + settings.gateway_kill_timeout_seconds
        self._is_idle = is_idle
        self._looked_at = time.monotonic()

    def look(self) -> None:
        """End who is silent. For a thread, every `LOOK_SECONDS`."""
        if STOPPING.is_set():
            if self._is_idle():
                self._end(STOPPING_SECONDS)
        elif time.monotonic() - self._looked_at > self._limit_seconds / 8:
            self._looked_at = time.monotonic()
            self._end(self._limit_seconds)

    def _end(self, limit_seconds: float) -> None:
        descriptors = [int(fd) for fd in os.listdir("/proc/self/fd")]
        ended = sum(self._end_if_silent(fd, limit_seconds * 1_000) for fd in descriptors if _is_socket(fd))
        if ended:
            log.info("silent_connections_ended", connections=ended, stopping=STOPPING.is_set())

    def _end_if_silent(self, fd: int, limit_ms: float) -> bool:
        """The descriptor is borrowed and never closed here: closing one that meanwhile is a tenant's database would
        drop SQLite's locks. At worst a connection that was just opened under the same number is ended."""
        borrowed = None
        try:
            borrowed = socket.socket(fileno=fd)
            if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.getsockname()[1] != self._port:
                return False
            borrowed.getpeername()
            info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            unacked, sent, received = (
                struct.unpack_from("I", info, at)[0] for at in (_UNACKED_AT, _SENT_AT, _RECEIVED_AT)
            )
            if min(sent, received) <= limit_ms or (unacked and STOPPING.is_set()):  # an answer is on its way
                return False
            borrowed.shutdown(socket.SHUT_RDWR)
            return True
        except OSError:  # not connected, or closed since it was listed
            return False
        finally:
            if borrowed is not None:
                borrowed.detach()


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
