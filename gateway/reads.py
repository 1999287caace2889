"""The reads of one tenant that wait for a thread: searches, which may take long, let the others by. For one event loop;
`next` is for the thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from gateway.writes import Job, take_overdue


class Read(NamedTuple):
    """`step` is `read` or `read_and_renew` (`gateway.handles`). A `slow` one may take long."""

    step: Callable[[Any, Job], Any]
    job: Job
    answer: asyncio.Future[Any]
    slow: bool
    asked_at: float  # monotonic


class ReadQueue:
    """A list or a lookup would else wait behind all searches of its tenant, each of which takes a turn of its own, and
    be shed for them. It waits for the one that runs. Searches that wait for too long are shed first, as they are
    everywhere (`gateway.shed`)."""

    __slots__ = ("_brief", "_slow")

    def __init__(self) -> None:
        self._brief: deque[Read] = deque()
        self._slow: deque[Read] = deque()

    def waits(self, *, slow: bool) -> bool:
        """Whether one that is slow waits, or one that is not."""
        return bool(self._slow if slow else self._brief)

    def put(self, read: Read) -> None:
        (self._slow if read.slow else self._brief).append(read)

    def has(self, step: Callable[[Any, Job], Any]) -> bool:
        """Whether one that is not slow has this step."""
        return any(read.step is step for read in self._brief)

    def next(self, *, slow: bool) -> Read | None:
        """The oldest that is not slow, else the oldest slow one if `slow`. None also when it was overdue just now."""
        for queue in (self._brief, self._slow) if slow else (self._brief,):
            try:
                return queue.popleft()
            except IndexError:
                continue
        return None

    def take_overdue(self, asked_before: float) -> list[Read]:
        """Those asked for before then which no thread has begun, nor will. On the loop."""
        return [*take_overdue(self._brief, asked_before), *take_overdue(self._slow, asked_before)]
