"""Clients that do not read what they asked for, cut off.

Granian takes an answer whole and at once, whoever reads it or not: a handler never sees that nobody does (measured:
8 MB were gone in 4 ms; in pieces the kernel alone took 4 MB before the sender had to wait). So the kernel ends a
connection of which nothing was read, or nothing acknowledged, for `answer_stall_seconds`, while something waits to be:
the option is the listening socket's, and each accepted one inherits it. Nothing is done for it in a request. Who reads
so little at a time that the kernel's next packet, up to 64 KB, never fits for so long counts as not reading.

With HTTP/2 a client may stop a stream and read on; what that holds of a connection is bounded by `STREAMS`
(`gateway.serve`) answers of `answer_limit_bytes`.
"""

from __future__ import annotations

import socket

from gateway.steering import once_listening
from shared.log import get_logger

log = get_logger("gateway")


def cut_off_unread(port: int, limit_seconds: float) -> None:
    """Once this process listens on `port`. Nothing where the kernel knows no such limit."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        once_listening(port, lambda mine: _limit(mine, limit_seconds), name="unread")


def _limit(listening: socket.socket, limit_seconds: float) -> None:
    try:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(limit_seconds * 1_000))
    except OSError as e:
        log.warning("unread_answers_unlimited", cause=e.strerror)
