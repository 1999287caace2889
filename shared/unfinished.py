"""Requests of one worker that have begun and whose events are still to come: what `complete_until` must not pass."""

from __future__ import annotations

import time
from itertools import count


class Unfinished:
    """`begin` and `end` are for the event loop, `since_us` for any thread."""

    def __init__(self) -> None:
        self._tickets = count(1)
        self._begun_ns: dict[int, int] = {}  # by ticket, so the first is the oldest

    def begin(self) -> int:
        """Before the request is given its time: a ticket for `end`."""
        ticket = next(self._tickets)
        self._begun_ns[ticket] = time.time_ns()
        return ticket

    def end(self, ticket: int) -> None:
        """After its event was appended, if there is one."""
        self._begun_ns.pop(ticket, None)

    def since_us(self) -> int:
        """Microseconds since 1970: every request that was given an earlier time has ended."""
        now_ns = time.time_ns()  # first: who is not in the dictionary yet will be given a later time
        while True:
            try:
                return min(now_ns, next(iter(self._begun_ns.values()), now_ns)) // 1000
            except RuntimeError:  # the dictionary changed just then
                continue
