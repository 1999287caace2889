"""The load: HTTP/1.1 keep-alive over raw sockets and epoll, one thread, requests prepared beforehand.

Closed loop: every connection sends its next request when it has its answer; the rate is what the server can do.
Open loop: requests are due at fixed times whatever the server does, and latency counts from when a request was
DUE, so a stall is charged to every request it delayed.

A machine with neighbours stops for milliseconds some times a second, whatever is measured on it: that alone delays one
request in forty, and one in twenty is the p95. `windows_ms` therefore has a percentile for each quarter second: most
have no such stop in them, while what a server does ten times a second is in all. Their median says what the software
does (but for what it does once a second), the percentile of the whole what its clients met there; the bench shows
both.

Measured on one core against Granian's bare ASGI on the other: the client needs about 12 µs a request, less than
any server here; `busy` in the result says how much of its core it took (near 1 in a closed loop: the client was
the limit).
"""

from __future__ import annotations

import gc
import itertools
import math
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

Requests = list[bytes]
WINDOW_SECONDS = 0.25


@dataclass(slots=True)
class Result:
    seconds: float
    latencies: list[float]
    statuses: dict[str, int]
    busy: float
    bodies: list[bytes] = field(default_factory=list)
    unanswered: int = 0  # still without an answer 10 s after the end
    due: list[float] = field(default_factory=list)  # for each latency, in seconds from the beginning

    @property
    def rate(self) -> float:
        """Good answers a second."""
        good = sum(n for status, n in self.statuses.items() if status.startswith("2"))
        return good / self.seconds

    @property
    def bad(self) -> int:
        """Answers that are not good, and requests without one."""
        return sum(n for status, n in self.statuses.items() if not status.startswith("2")) + self.unanswered

    def percentile_ms(self, share: float) -> float:
        return _percentile_ms(self.latencies, share)

    def windows_ms(self, share: float) -> list[float]:
        """The percentile of those due in each whole window."""
        whole = int(self.seconds / WINDOW_SECONDS)
        windows: list[list[float]] = [[] for _ in range(whole)]
        for due, latency in zip(self.due, self.latencies, strict=True):
            if (n := int(due / WINDOW_SECONDS)) < whole:
                windows[n].append(latency)
        return [_percentile_ms(window, share) if window else math.inf for window in windows]


def _percentile_ms(latencies: list[float], share: float) -> float:
    ordered = sorted(latencies)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1_000 if ordered else float("nan")


class _Connection:
    __slots__ = ("due", "missing", "pieces", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self.pieces = b""
        self.missing = -1  # bytes of the answer still to come; -1: its head is not complete

    def take(self) -> str | None:
        """Read what has come; the status once the answer is whole."""
        data = self.socket.recv(262_144)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        if self.missing > 0:
            self.missing -= len(data)
        else:
            data = self.pieces = self.pieces + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                return None
            at = data.find(b"ontent-length:", 0, end)  # either case of the C
            if at < 0:
                length = 0 if data[9:12] == b"204" else self._refuse(data)
            else:
                length = int(data[at + 14 : data.find(b"\r", at)])
            self.missing = end + 4 + length - len(data)
        if self.missing > 0:
            return None
        self.missing = -1
        status, self.pieces = self.pieces[9:12].decode(), b""
        return status

    @staticmethod
    def _refuse(data: bytes) -> int:
        raise ValueError(f"an answer without content-length: {data[:200]!r}")


def closed_loop(port: int, requests: Requests, *, connections: int, seconds: float) -> Result:
    """As fast as the answers come, over `connections` at once."""
    return _run(port, requests, connections, seconds, None)


def open_loop(port: int, requests: Requests, *, connections: int, seconds: float, rate: float) -> Result:
    """`rate` requests a second, evenly spaced. At most `connections` are in flight; later ones wait, and pay."""
    return _run(port, requests, connections, seconds, rate)


def _run(port: int, requests: Requests, connections: int, seconds: float, rate: float | None) -> Result:
    following = itertools.cycle(requests)
    poll = select.epoll()
    free: deque[_Connection] = deque(_Connection(port) for _ in range(connections))
    by_fd = {c.socket.fileno(): c for c in free}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    clock = time.perf_counter
    latencies: list[float] = []
    dues: list[float] = []
    statuses: dict[str, int] = {}
    gc.collect()
    gc.disable()  # its pauses would be the server's
    cpu = time.thread_time()
    began = clock()
    due: Iterator[float] = itertools.repeat(0.0) if rate is None else (began + n / rate for n in itertools.count())
    next_due = next(due)
    now, end = began, began + seconds
    while True:
        while free and next_due <= now < end:
            connection = free.popleft()
            connection.due = clock() if rate is None else next_due
            connection.socket.sendall(next(following))
            next_due = next(due)
        if now >= end and (len(free) == connections or now > end + 10):
            break
        # Between due times it spins: epoll waits whole milliseconds, which is more than most answers take.
        for fd, _ in poll.poll(0 if rate is not None else 1):
            connection = by_fd[fd]
            status = connection.take()
            if status is not None:
                latencies.append(clock() - connection.due)
                dues.append(connection.due - began)
                statuses[status] = statuses.get(status, 0) + 1
                free.append(connection)
        now = clock()
    took = now - began
    busy = (time.thread_time() - cpu) / took
    gc.enable()
    poll.close()
    for connection in by_fd.values():
        connection.socket.close()
    return Result(took, latencies, statuses, busy, unanswered=connections - len(free), due=dues)


def request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """One request, ready to send."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *(f"{k}: {v}" for k, v in headers.items())]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
