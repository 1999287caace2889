"""The access log: one JSON line a request, cheap enough for the hot path.

msgspec renders the line in the shape `shared.log` gives every other one, into memory: structlog's processors cost 7 µs
a line here, this 2, and flushing every line three times the rendering (FACTS). A thread writes what has gathered
every `FLUSH_SECONDS`, so a stuck stderr never blocks the event loop. A SIGKILL can lose the last fifth of a second of
access lines; errors go through `shared.log`, which flushes at once.

Workers share one stderr, so lines leave in pieces of at most PIPE_BUF: the kernel keeps those whole.
"""

from __future__ import annotations

import os
from collections import deque
from datetime import UTC, datetime

import msgspec

FLUSH_SECONDS = 0.2
_MAX_WAITING = 100_000
_PIPE_BUF = 4_096
_encode = msgspec.json.Encoder().encode


class AccessLog:
    """`line` is for the event loop, `drain` for a thread."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._dropped = 0

    def line(self, event: str, **fields: object) -> None:
        """A reader that stopped reading costs lines, not memory."""
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped += 1
            return
        now = datetime.now(UTC).isoformat()[:-6] + "Z"
        self._waiting.append(
            _encode({"component": "access", **fields, "event": event, "level": "info", "ts": now}) + b"\n"
        )

    def drain(self) -> None:
        """Write what has gathered. Blocking."""
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self.line("access_lines_dropped", lines=dropped)
        piece: list[bytes] = []
        size = 0
        while self._waiting:
            line = self._waiting.popleft()
            if piece and size + len(line) > _PIPE_BUF:
                self._write(piece)
                piece, size = [], 0
            piece.append(line)
            size += len(line)
        self._write(piece)

    def _write(self, lines: list[bytes]) -> None:
        try:
            if lines:
                os.write(self._fd, b"".join(lines))
        except OSError:  # the log's disk is full or its reader is gone: requests matter more
            self._dropped += len(lines)
