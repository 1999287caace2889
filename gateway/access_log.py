"""The access log: one JSON line a request, cheap enough for the hot path.

structlog renders the line, but into memory: flushing every line costs three times the rendering (FACTS). A
thread writes what has gathered every `FLUSH_SECONDS`, so a stuck stderr never blocks the event loop. A SIGKILL
can lose the last fifth of a second of access lines; errors go through `shared.log`, which flushes at once.

Workers share one stderr, so lines leave in pieces of at most PIPE_BUF: the kernel keeps those whole.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import msgspec
import structlog

FLUSH_SECONDS = 0.2
_MAX_WAITING = 100_000
_PIPE_BUF = 4_096


class AccessLog:
    """`line(...)` is for the event loop, `flush` for a thread."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        logger = structlog.wrap_logger(
            structlog.BytesLogger(self),  # type: ignore[arg-type]  # it asks for no more than write and flush
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
                structlog.processors.JSONRenderer(serializer=_encode),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(20),
            cache_logger_on_first_use=True,
        )
        self.line = logger.bind(component="access").info

    def write(self, line: bytes) -> int:
        """Called by structlog. A reader that stopped reading costs lines, not memory."""
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped += 1
        else:
            self._waiting.append(line)
        return len(line)

    def flush(self) -> None:
        """structlog flushes every line; the real work is in `drain`."""

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


def _encode(event: dict[str, Any], **_: Any) -> bytes:
    return msgspec.json.encode(event)
