"""Connections over which nobody says anything, ended.

With HTTP/2 on offer Granian reads the first bytes of a connection to tell 2 from 1, without a time limit: who opens TLS
and stops there, or within the 24 bytes that begin HTTP/2, would stay for ever (measured: 25 s and no end, where every
later state is cut by Granian's own limits). The kernel knows for how long a connection was silent in both directions.

A client of HTTP/2 answers Granian's pings and is never silent. One of HTTP/1.1 is while it waits for an answer: the
limit is `header_timeout_seconds` more than a request may take that a stopping gateway waits for.

A worker that stops is in need of it whatever is spoken, because Granian waits for every connection. It tells clients
of HTTP/2 that it leaves and waits for each to answer, which one that has nothing to ask does not; and it waits for the
rest of a head that has begun, for up to `header_timeout_seconds`, which may be longer than until it is killed
(measured: an idle httpx client, or a single byte over plain HTTP, kept a worker until then, and a killed worker seals
nothing). So once no request is open in the application, which is so from a whole head until its answer was given to
Granian, who has been silent for `STOPPING_SECONDS` is ended, and after a share of the time until the kill everybody,
in case a head comes in drops. An answer that is still being read has a larger share; with HTTP/2 on offer everybody
has.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable

from gateway.patience import STOPPING_SHARE
from shared.log import get_logger
from shared.settings import Settings

STOPPING = threading.Event()  # of this worker; `gateway.serve` sets it
STOPPING_SECONDS = 1.0
READING_SHARE = 2  # of the time a stopping worker has before it is killed; what comes in has `STOPPING_SHARE`
LOOK_SECONDS = 0.25
CAN_LOOK = sys.platform.startswith("linux")  # elsewhere the kernel cannot be asked
_TCP_INFO_BYTES = 64
_SENT_AT, _RECEIVED_AT = 44, 52  # in `struct tcp_info`: when data was last sent and received, milliseconds ago
log = get_logger("gateway")


def speaks_http2(settings: Settings) -> bool:
    """Over TLS, where the kernel can be asked about silence."""
    return bool(settings.tls_certificate) and settings.tls_http2 and CAN_LOOK


class Silence:
    """Looks at this process's connections to the gateway's port. `is_idle` says that no request is open."""

    def __init__(self, settings: Settings, is_idle: Callable[[], bool]) -> None:
        self._port = settings.gateway_port
        self._limit_seconds = settings.header_timeout_seconds + settings.gateway_kill_timeout_seconds
        self._http2 = speaks_http2(settings)
        self._kill_seconds = settings.gateway_kill_timeout_seconds
        self._is_idle = is_idle
        self._looked_at = time.monotonic()
        self._stopping_since: float | None = None
        self._was_idle = False

    def look(self) -> None:
        """End who is silent; without HTTP/2 only while stopping. For a thread, every `LOOK_SECONDS`."""
        now = time.monotonic()
        if STOPPING.is_set():
            self._look_stopping(now)
        elif self._http2 and now - self._looked_at > self._limit_seconds / 8:
            self._looked_at = now
            self._end(self._limit_seconds)

    def _look_stopping(self, now: float) -> None:
        """Idle twice in a row: Granian has had the time in between to write the last answer."""
        if self._stopping_since is None:
            self._stopping_since = now
        was_idle, self._was_idle = self._was_idle, self._is_idle()
        if not (was_idle and self._was_idle):
            return
        share = (now - self._stopping_since) / self._kill_seconds  # of the time that has passed
        readers_too = share >= 1 / READING_SHARE
        # With HTTP/2 an answer may wait in Granian for its reader, where the kernel does not know of it.
        everybody = share >= 1 / STOPPING_SHARE if not self._http2 else readers_too
        self._end(0.0 if everybody else STOPPING_SECONDS, readers_too=readers_too)

    def _end(self, limit_seconds: float, *, readers_too: bool = True) -> None:
        """Who has been silent for that long, 0: everybody; unless `readers_too`, only if they have all been sent."""
        descriptors = [int(fd) for fd in os.listdir("/proc/self/fd")]
        ended = sum(self._end_if_silent(fd, limit_seconds * 1_000, readers_too) for fd in descriptors if _is_socket(fd))
        if ended:
            log.info("silent_connections_ended", connections=ended, stopping=STOPPING.is_set())

    def _end_if_silent(self, fd: int, limit_ms: float, readers_too: bool) -> bool:
        """The descriptor is borrowed and never closed here: closing one that meanwhile is a tenant's database would
        drop SQLite's locks. At worst a connection that was just opened under the same number is ended."""
        borrowed = None
        try:
            borrowed = socket.socket(fileno=fd)
            if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.getsockname()[1] != self._port:
                return False
            borrowed.getpeername()
            if limit_ms:
                info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                if min(struct.unpack_from("I", info, at)[0] for at in (_SENT_AT, _RECEIVED_AT)) <= limit_ms:
                    return False
            if not readers_too and _unread_bytes(borrowed):
                return False
            borrowed.shutdown(socket.SHUT_RDWR)
            return True
        except OSError:  # not connected, or closed since it was listed
            return False
        finally:
            if borrowed is not None:
                borrowed.detach()


def _unread_bytes(connection: socket.socket) -> int:
    """What the peer's kernel has not acknowledged, sent or not: who has no room left is not sent anything."""
    (found,) = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
    return int(found)


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
