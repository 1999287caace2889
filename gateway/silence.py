"""Connections over which nobody says anything, ended.

With HTTP/2 on offer Granian reads the first bytes of a connection to tell 2 from 1, without a time limit: who opens TLS
and stops there, or within the 24 bytes that begin HTTP/2, would stay for ever (measured: 25 s and no end, where every
later state is cut by Granian's own limits). The kernel knows for how long a connection was silent in both directions.

A client of HTTP/2 answers Granian's pings and is never silent. One of HTTP/1.1 is while it waits for an answer: the
limit is `header_timeout_seconds` more than a request may take that a stopping gateway waits for.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys

from shared.log import get_logger
from shared.settings import Settings

_TCP_INFO_BYTES = 64
_SENT_AT, _RECEIVED_AT = 44, 52  # of `last_data_sent` and `last_data_recv`, milliseconds ago, in `struct tcp_info`
log = get_logger("gateway")


def speaks_http2(settings: Settings) -> bool:
    """Over TLS, where the kernel can be asked about silence."""
    return bool(settings.tls_certificate) and settings.tls_http2 and sys.platform.startswith("linux")


class Silence:
    """Looks at this process's connections to the gateway's port. For a thread."""

    def __init__(self, settings: Settings) -> None:
        self._port = settings.gateway_port
        limit_seconds = settings.header_timeout_seconds + settings.gateway_kill_timeout_seconds
        self._limit_ms = limit_seconds * 1_000
        self.look_seconds = limit_seconds / 8

    def end(self) -> None:
        ended = sum(self._end_if_silent(int(fd)) for fd in os.listdir("/proc/self/fd") if _is_socket(int(fd)))
        if ended:
            log.info("silent_connections_ended", connections=ended)

    def _end_if_silent(self, fd: int) -> bool:
        """The descriptor is borrowed and never closed here: closing one that meanwhile is a tenant's database would
        drop SQLite's locks. At worst a connection that was just opened under the same number is ended."""
        borrowed = None
        try:
            borrowed = socket.socket(fileno=fd)
            if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or borrowed.getsockname()[1] != self._port:
                return False
            borrowed.getpeername()
            info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            sent, received = (struct.unpack_from("I", info, at)[0] for at in (_SENT_AT, _RECEIVED_AT))
            if min(sent, received) <= self._limit_ms:
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
