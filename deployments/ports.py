"""Which TCP port a part gets, decided for all parts before any is started.

A port the person set and somebody else uses is an error that names the setting. A default that is taken gives
way to another free one.

Between this decision and the moment the part listens lie seconds, in which another stack may choose. So the
socket stays bound until the part starts, and from then on, for as long as this process lives, an abstract Unix
socket named after the port says that it is spoken for: it belongs to the network namespace, as ports do, and the
kernel drops it with its owner.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator

from shared.errors import Permanent
from shared.settings import Settings

_NEXT_PORTS = 20
_ANY_TRIES = 5


class PortBusy(Permanent):
    """A port that was asked for by name is taken."""


class PortReservations:
    """Bound, not listening, sockets by setting name, and the marks of all ports chosen."""

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}
        self._marks: list[socket.socket] = []

    def reserve(self, settings: Settings, name: str, host: str) -> int:
        """A port for setting `name` on `host`. Raises `PortBusy`."""
        wanted = int(getattr(settings, name))
        for port in _candidates(wanted, explicit=settings.is_set(name)):
            bound = _bind(host, port)
            if bound is None:
                continue
            port = int(bound.getsockname()[1])
            mark = _mark(port)
            if mark is None:
                bound.close()
                continue
            self._sockets[name] = bound
            self._marks.append(mark)
            return port
        raise PortBusy(f"port {wanted} is in use: free it or set another ENGRAM_{name.upper()}")

    def release(self, name: str) -> None:
        """Call right before the part that listens there starts."""
        if reserved := self._sockets.pop(name, None):
            reserved.close()

    def release_all(self) -> None:
        for name in list(self._sockets):
            self.release(name)
        while self._marks:
            self._marks.pop().close()


def _candidates(wanted: int, *, explicit: bool) -> Iterator[int]:
    """0 asks the kernel for any free port."""
    if wanted:
        yield wanted
        if explicit:
            return
        yield from range(wanted + 1, min(wanted + _NEXT_PORTS, 65_536))
    yield from (0,) * _ANY_TRIES


def _bind(host: str, port: int) -> socket.socket | None:
    """A socket bound to the port; None when another socket has it. Raises `PortBusy` for any other reason."""
    # Without SO_REUSEADDR the reservation is exclusive, but a TIME_WAIT left by the last run refuses it too.
    for reuse in (0, 1):
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            bound.bind((host, port))
            return bound
        except OSError as e:
            bound.close()
            if e.errno != errno.EADDRINUSE:
                raise PortBusy(f"cannot listen on {host} port {port}: {e.strerror}") from e
    return None


def _mark(port: int) -> socket.socket | None:
    """The sign that a stack has chosen this port; None when another one has."""
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if sys.platform.startswith("linux"):
            mark.bind(f"\0engram-port-{port}")
    except OSError:
        mark.close()
        return None
    return mark
