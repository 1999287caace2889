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
    """`searches` is how many slow ones wait or run; who answers one takes it off."""

    __slots__ = ("_brief", "_slow", "searches")

    def __init__(self) -> None:
        self._brief: deque[Read] = deque()
        self._slow: deque[Read] = deque()
        self.searches = 0

    def waits(self, *, slow: bool) -> bool:
        """Whether one that is slow waits, or one that is not."""
        return bool(self._slow if slow else self._brief)

    def put(self, read: Read) -> None:
        (self._slow if read.slow else self._brief).append(read)
        self.searches += read.slow

    def has(self, step: Callable[[Any, Job], Any]) -> bool:
        """Whether one that is not slow has this step."""
        return any(read.step is step for read in self._brief)

    def next(self, *, slow: bool) -> Read | None:
        """The oldest of its kind. None also when it was overdue just now."""
        try:
            return (self._slow if slow else self._brief).popleft()
        except IndexError:
            return None

    def take_overdue(self, asked_before: float) -> list[Read]:
        """Those asked for before then which no thread has begun, nor will. On the loop."""
        slow = take_overdue(self._slow, asked_before)
        self.searches -= len(slow)
        return [*take_overdue(self._brief, asked_before), *slow]
