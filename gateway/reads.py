"""The reads of one tenant that wait for a thread, those that may take long apart from the others (`gateway.turns`).
For one event loop; `next` is for the threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from gateway.writes import Job, take_overdue


class Read(NamedTuple):
    """`step` is one of `gateway.handles`: `read` or `read_and_renew`, of one that may take long `read_apart`."""

    step: Callable[[Any, Job], Any]
    job: Job
    answer: asyncio.Future[Any]
    slow: bool
    asked_at: float  # monotonic


class ReadQueue:
    """A list or a lookup would else wait behind all searches of its tenant, each of which takes a turn of its own, and
    be shed for them. Searches that wait for too long are shed first, as they are everywhere (`gateway.shed`)."""

    __slots__ = ("_brief", "_renewing", "_slow")

    def __init__(self) -> None:
        self._brief: deque[Read] = deque()
        self._renewing: deque[Read] = deque()  # they touch the reader, which is for those alone that have the lock
        self._slow: deque[Read] = deque()

    def waits(self, *, slow: bool) -> bool:
        """Whether one that is slow waits, or one that is not."""
        return bool(self._slow if slow else self._brief or self._renewing)

    def put(self, read: Read, *, renews: bool) -> None:
        (self._slow if read.slow else self._renewing if renews else self._brief).append(read)

    @property
    def renews(self) -> bool:
        """Whether one waits that touches the reader."""
        return bool(self._renewing)

    def next(self, *, slow: bool) -> Read | None:
        """For a thread that serves slow ones the oldest that is not, else the oldest slow one; for another the oldest
        of the rest. None also when it was overdue just now."""
        for queue in (self._brief, self._slow) if slow else (self._renewing, self._brief):
            try:
                return queue.popleft()
            except IndexError:
                continue
        return None

    def take_overdue(self, asked_before: float) -> list[Read]:
        """Those asked for before then which no thread has begun, nor will. On the loop."""
        queues = (self._renewing, self._brief, self._slow)
        return [read for queue in queues for read in take_overdue(queue, asked_before)]
