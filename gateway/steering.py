"""While a worker is replaced, new connections go to the new one: none is opened on one that is about to go.

Each worker listens on a socket of its own, and the kernel gives a new connection to any of them. One that was accepted
in the instant its worker stops would be closed unread. So the new worker has the kernel give it all new connections
as long as both listen (a one-instruction classic BPF program of the group, `SO_ATTACH_REUSEPORT_CBPF`), and the old one
is told to go when it has had time to read what it accepted.

The program names a place in the group: the one behind the workers there usually are, which only exists while there is
one more. Where nobody is in that place, so from when the old worker goes, or where the kernel knows no such thing,
connections are given out among all. Nothing has to be taken back.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from shared.log import get_logger

_LISTEN_SECONDS = 10.0
_POLL_SECONDS = 0.02
_ATTACH = 51  # SO_ATTACH_REUSEPORT_CBPF: Python has no name for it
_RETURN = 0x06  # BPF_RET | BPF_K
log = get_logger("gateway")


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def steer_here(port: int, place: int) -> None:
    """Once this process listens on `port`, be given all its new connections."""
    once_listening(port, lambda mine: _steer(mine, place), name="steering")


def once_listening(port: int, what: Callable[[socket.socket], None], name: str) -> None:
    """In a thread of its own: once this process listens on `port`, do that with the socket."""
    threading.Thread(target=_wait_and_do, args=(port, what), name=name, daemon=True).start()


def _wait_and_do(port: int, what: Callable[[socket.socket], None]) -> None:
    deadline = time.monotonic() + _LISTEN_SECONDS
    while (mine := listener(port)) is None:
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_SECONDS)
    with closing(mine):
        what(mine)


def _steer(listening: socket.socket, place: int) -> None:
    try:
        _attach(listening, place)
    except OSError as e:
        log.warning("connections_not_steered", cause=e.strerror)


def _attach(listening: socket.socket, place: int) -> None:
    """Have the kernel give every new connection of the socket's group to the one in that place."""
    instruction = _Instruction(_RETURN, 0, 0, place)
    listening.setsockopt(socket.SOL_SOCKET, _ATTACH, bytes(_Program(1, ctypes.pointer(instruction))))


def listener(port: int) -> socket.socket | None:
    """A second descriptor of this process's listening socket, to be closed soon."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(entry.name)))
            try:
                if (
                    found.family in (socket.AF_INET, socket.AF_INET6)
                    and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    and found.getsockname()[1] == port
                ):
                    return found
            except OSError:
                pass
            found.close()
    return None
