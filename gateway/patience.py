"""How long a request's body may take, and how many may be on their way at once.

A body that is awaited holds no place to work (`gateway.shed`), so a slow client is in nobody's way there; these places
are for bodies alone, twice as many as those to work: a burst that the gate would let wait must be read first. A tenant
has its share. Are all of them taken, one that hangs is given up, of the tenant with most bodies the youngest: who lets
bodies hang loses them to those whose bodies arrive, and the older ones of an honest slow client still end. A body
hangs once two looks (below) have met it. One that came with its head is read sooner, however long the event loop stood
still: where many come at once and none hangs, the one that finds no place is refused like any work too many.

A worker that stops waits for none of them longer than a share of the time it has: killed for one slow client, it would
seal nothing.

`asyncio.timeout` arms a timer for each, 3.5 µs; here one timer looks at all of them every `LOOK_SECONDS`, 0.3 µs a body
(measured). Who has how many is counted only when it matters.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

from gateway.problems import Problem, Refusal, shed
from shared.settings import Settings

LOOK_SECONDS = 0.1  # as much later than its time a body may be given up
BODIES_PER_PLACE = 2
STOPPING_SHARE = 4  # of the time a stopping worker has before it is killed
STOPPED = Problem(408, "The gateway is being stopped and did not wait for the whole body; send it again.")
GIVEN_UP = Problem(408, "The body was slow to arrive while others waited to send theirs.")
Result = TypeVar("Result")


class Patience:
    """For one event loop."""

    __slots__ = (
        "_late",
        "_looking",
        "_looks_at",
        "_most",
        "_most_of_tenant",
        "_stopped_at",
        "_stopping",
        "_stopping_seconds",
        "_waits",
    )

    def __init__(self, settings: Settings, stopping: threading.Event | None = None) -> None:
        """From when `stopping` is set nothing is waited for longer than a share of the kill time-out."""
        self._stopping = stopping or threading.Event()
        self._stopping_seconds = settings.gateway_kill_timeout_seconds / STOPPING_SHARE
        self._stopped_at = math.inf
        self._most = BODIES_PER_PLACE * settings.inflight_requests
        self._most_of_tenant = BODIES_PER_PLACE * settings.inflight_tenant_requests
        self._waits: dict[asyncio.Task[Any], tuple[float, str, float]] = {}  # until when, whose, since; oldest first
        self._late: dict[asyncio.Task[Any], Exception] = {}  # what their `wait` raises
        self._looking = False
        self._looks_at = (-math.inf, -math.inf)  # of the last two

    async def wait(self, coroutine: Coroutine[Any, Any, Result], seconds: float, tenant_id: str) -> Result:
        """What the coroutine returns. Raises `TimeoutError` when that takes longer, a `Refusal` when it has no place
        or this worker stops before. Not to be nested."""
        waits = self._waits
        if len(waits) >= self._most_of_tenant or len(waits) >= self._most:
            try:
                self._make_place(tenant_id)
            except Refusal:
                coroutine.close()
                raise
        task = asyncio.current_task()
        assert task is not None
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)
        cancelled_before = task.cancelling()
        now = time.monotonic()
        waits[task] = (now + seconds, tenant_id, now)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() <= cancelled_before:  # else somebody else cancelled it too
                raise self._late[task] from None
            raise
        finally:
            del waits[task]
            self._late.pop(task, None)

    def _make_place(self, tenant_id: str) -> None:
        """Refuse this tenant's next body, or give up one of another tenant's, if the bounds ask for either."""
        staying = [(task, whose, since) for task, (_, whose, since) in self._waits.items() if task not in self._late]
        counts = Counter(whose for _, whose, _ in staying)
        if counts[tenant_id] >= self._most_of_tenant:
            raise shed("The tenant has too many bodies on their way.")
        if len(staying) < self._most:
            return
        hanging = {whose: task for task, whose, since in staying if since <= self._looks_at[0]}  # each one's youngest
        most = max(hanging, key=counts.__getitem__, default=tenant_id)
        if counts[most] <= counts[tenant_id] + 1:
            raise shed("The server is busy.")
        self._end(hanging[most], Refusal(GIVEN_UP))

    def _end(self, task: asyncio.Task[Any], error: Exception) -> None:
        self._late[task] = error
        task.cancel()

    def _look(self) -> None:
        now = time.monotonic()
        self._looks_at = (self._looks_at[1], now)
        if self._stopping.is_set():
            self._stopped_at = min(self._stopped_at, now)
        given_up = now >= self._stopped_at + self._stopping_seconds
        for task, (until, _, _) in self._waits.items():
            if (given_up or now >= until) and task not in self._late:
                self._end(task, TimeoutError() if now >= until else Refusal(STOPPED))
        self._looking = bool(self._waits)
        if self._looking:
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)
