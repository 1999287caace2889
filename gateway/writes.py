"""The writes of one tenant that wait for its next transaction. For one event loop."""

from __future__ import annotations

import asyncio
import copy
import sqlite3
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

Job = Callable[[sqlite3.Connection], Any]


class Member(NamedTuple):
    job: Job
    answer: asyncio.Future[Any]
    asked_at: float  # monotonic


class _Waiting(Protocol):
    @property
    def asked_at(self) -> float: ...


Waits = TypeVar("Waits", bound=_Waiting)


class WriteQueue:
    """`left` counts the members met whose callers had left, `overdue` those taken out; the pool sets both back."""

    __slots__ = ("_waiting", "left", "overdue")

    def __init__(self) -> None:
        self._waiting: deque[Member] = deque()
        self.left = self.overdue = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, job: Job, asked_at: float) -> asyncio.Future[Any]:
        """Queue a job; the future is its outcome. Cancelling it takes the job back if it has not begun."""
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(Member(job, outcome, asked_at))
        return outcome

    def next(self) -> Member | None:
        """The oldest whose caller still waits. For one thread at a time; `put` may run meanwhile on the loop."""
        while True:
            try:
                member = self._waiting.popleft()
            except IndexError:  # also when it was overdue just now
                return None
            if not member.answer.done():
                return member
            self.left += 1

    def take_overdue(self, asked_before: float) -> list[Member]:
        """Those asked for before then which no transaction has met, nor will. On the loop."""
        overdue = take_overdue(self._waiting, asked_before)
        self.overdue += len(overdue)
        return overdue


def take_overdue(waiting: deque[Waits], asked_before: float) -> list[Waits]:
    """Take out those asked for before then; the oldest come first. A thread may take from the same queue meanwhile:
    each is taken once."""
    taken: list[Waits] = []
    for each in tuple(waiting):
        if each.asked_at >= asked_before:
            break
        try:
            waiting.remove(each)
        except ValueError:
            continue  # a thread has begun it
        taken.append(each)
    return taken


def again(error: BaseException) -> BaseException:
    """A copy for each member of a failed transaction: raised in many tasks, one object would gather all their
    traces. The cause stays: it says whether the disk is full."""
    try:
        copied = copy.copy(error)
    except Exception:  # noqa: BLE001  an exception that cannot be copied is shared
        return error
    copied.__cause__ = error.__cause__
    return copied
