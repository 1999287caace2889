"""The writes of one tenant that wait for its next transaction. For one event loop."""

from __future__ import annotations

import asyncio
import copy
import sqlite3
from collections import deque
from collections.abc import Callable
from typing import Any

Job = Callable[[sqlite3.Connection], Any]
Member = tuple[Job, asyncio.Future[Any]]


class WriteQueue:
    """`left` counts the members met whose callers had left; the pool sets it back."""

    __slots__ = ("_waiting", "left")

    def __init__(self) -> None:
        self._waiting: deque[Member] = deque()
        self.left = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, job: Job) -> asyncio.Future[Any]:
        """Queue a job; the future is its outcome. Cancelling it takes the job back if it has not begun."""
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, outcome))
        return outcome

    def next(self) -> Member | None:
        """The oldest whose caller still waits. For one thread at a time; `put` may run meanwhile on the loop."""
        while self._waiting:
            member = self._waiting.popleft()
            if not member[1].done():
                return member
            self.left += 1
        return None


def again(error: BaseException) -> BaseException:
    """A copy for each member of a failed transaction: raised in many tasks, one object would gather all their
    traces. The cause stays: it says whether the disk is full."""
    try:
        copied = copy.copy(error)
    except Exception:  # noqa: BLE001  an exception that cannot be copied is shared
        return error
    copied.__cause__ = error.__cause__
    return copied
