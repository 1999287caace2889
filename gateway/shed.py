"""How much is at work at once in one worker, who waits, and who is turned away first.

A request of a tenant needs a place, once its body is there (`gateway.patience`). Searches may take half of the
places, lists three quarters, writes nine tenths, lookups by id all: under overload the expensive go first, and
/health, /ready, /metrics and a bad token are answered without a place. One tenant has at most
`inflight_tenant_requests` of them, and of these its classes have the same shares: its searches leave places to its own
lookups too.

Without a place a request waits, at most `inflight_wait_seconds`; as many may wait as may work, a tenant's share
of them bounded alike. When all of that is taken, a waiting request of a cheaper class to lose makes room, of the same
tenant when it is the tenant's share that is full; else the new one is refused: 503, reason shed, Retry-After.

An operator can refuse whole classes for a while and set another bound for tenants (`shared.limits`: `shed`,
`inflight`).
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from gateway.problems import Problem, Refusal, shed
from shared.limits import RouteClass, Watch
from shared.settings import Settings

ORDER: tuple[RouteClass, ...] = ("search", "list", "write", "get")  # the first is the first to go
SHARE: dict[RouteClass, float] = {"search": 0.5, "list": 0.75, "write": 0.9, "get": 1.0}
LOOK_SECONDS = 0.02  # between two looks at what is running; a query may take so much longer than its limit
TOO_SLOW = Problem(503, "The query took too long; a narrower one may not.", reason="query too slow", retry_after=1)
TOO_MANY_WAIT = "The tenant has too many requests waiting."
Result = TypeVar("Result")


class Gate:
    """For one event loop."""

    def __init__(self, settings: Settings, limits: Watch) -> None:
        self._limits = limits
        self._places = {c: _share(settings.inflight_requests, c) for c in ORDER}
        self._fewest_places = self._places[ORDER[0]]
        self._places_of_tenant = {c: _share(settings.inflight_tenant_requests, c) for c in ORDER}
        self._wait_seconds = settings.inflight_wait_seconds
        self._queue_size = settings.inflight_requests
        self._queue_size_of_tenant = settings.inflight_tenant_requests
        self._at_work = 0
        self._tenants: dict[str, int] = {}
        self._queued = 0
        self._queued_of_tenant: dict[str, int] = {}
        self._queues: dict[RouteClass, deque[tuple[str, asyncio.Future[None]]]] = {c: deque() for c in ORDER}

    async def enter(self, tenant_id: str, route_class: RouteClass) -> Callable[[], None]:
        """A place; call what is returned, once, to give it back. Raises a `Refusal`."""
        leave = self.enter_now(tenant_id, route_class)
        if leave is not None:
            return leave
        await self._wait(tenant_id, route_class)
        return partial(self._leave, tenant_id)

    def enter_now(self, tenant_id: str, route_class: RouteClass) -> Callable[[], None] | None:
        """As `enter`, if there is a place at once; else None."""
        if not self._free(tenant_id, route_class):
            return None
        self._take(tenant_id)
        return partial(self._leave, tenant_id)

    def check(self, route_class: RouteClass) -> None:
        """Raises a `Refusal` when an operator sheds this class of routes."""
        if route_class in self._limits.now.shed:
            raise shed("This kind of request is not served at the moment.")

    def _free(self, tenant_id: str, route_class: RouteClass) -> bool:
        if self._at_work >= self._places[route_class]:
            return False
        limits = self._limits.now
        cap = limits.tenant_inflight.get(tenant_id) or limits.inflight  # an operator's before the settings'
        places = self._places_of_tenant[route_class] if cap is None else _share(cap, route_class)
        return self._tenants.get(tenant_id, 0) < places

    def _take(self, tenant_id: str) -> None:
        self._at_work += 1
        self._tenants[tenant_id] = self._tenants.get(tenant_id, 0) + 1

    def _leave(self, tenant_id: str) -> None:
        were_at_work = self._at_work
        self._at_work -= 1
        _count_down(self._tenants, tenant_id)
        # While every class had places left, whoever waits is kept out by the bound of its own tenant alone.
        if self._queued and (were_at_work >= self._fewest_places or tenant_id in self._queued_of_tenant):
            self._admit()

    def _admit(self) -> None:
        """Let the most urgent of those who wait in, if there is a place for one. After that there is none for another:
        who is less urgent has fewer places, of all and of its tenant's."""
        for route_class in reversed(ORDER):
            if self._at_work >= self._places[route_class]:
                return  # and the classes after it have no more
            for tenant_id, turn in self._queues[route_class]:
                if not turn.done() and self._free(tenant_id, route_class):
                    self._take(tenant_id)
                    turn.set_result(None)
                    return

    async def _wait(self, tenant_id: str, route_class: RouteClass) -> None:
        if self._queued_of_tenant.get(tenant_id, 0) >= self._queue_size_of_tenant:
            if not self._drop_below(route_class, tenant_id):
                raise shed(TOO_MANY_WAIT)
        elif self._queued >= self._queue_size and not self._drop_below(route_class):
            raise shed("The server is busy.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = (tenant_id, turn)
        queue = self._queues[route_class]
        queue.append(waiting)
        self._queued += 1
        self._queued_of_tenant[tenant_id] = self._queued_of_tenant.get(tenant_id, 0) + 1
        try:
            await asyncio.wait({turn}, timeout=self._wait_seconds)
        except asyncio.CancelledError:
            if turn.done() and not turn.exception():
                self._leave(tenant_id)
            raise
        finally:
            queue.remove(waiting)
            self._queued -= 1
            _count_down(self._queued_of_tenant, tenant_id)
        if not turn.done():
            raise shed("The server is busy.")
        turn.result()

    def _drop_below(self, route_class: RouteClass, tenant_id: str | None = None) -> bool:
        """Refuse the youngest who waits, of this tenant or of all, in the cheapest class to lose, if that is cheaper
        than this one."""
        for cheaper in ORDER[: ORDER.index(route_class)]:
            for whose, turn in reversed(self._queues[cheaper]):
                if not turn.done() and (tenant_id is None or whose == tenant_id):
                    turn.set_exception(shed("The server is busy." if tenant_id is None else TOO_MANY_WAIT))
                    return True
        return False


class _Watchdog:
    """Interrupts what runs for too long: one thread looks at the clock for all of them. SQLite could look itself, by
    a progress handler, but that is Python code in the middle of a statement: it must get hold of Python's lock, which
    another thread has, every so many steps (measured: an eighth of a search on a busy worker)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends_at: dict[sqlite3.Connection, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, connection: sqlite3.Connection, limit_seconds: float) -> None:
        with self._lock:
            self._ends_at[connection] = time.monotonic() + limit_seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="query-limit", daemon=True)
                self._thread.start()

    def end(self, connection: sqlite3.Connection) -> None:
        """When this returns the connection will not be interrupted any more: it is somebody else's next."""
        with self._lock:
            del self._ends_at[connection]

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            if not self._ends_at:
                continue
            now = time.monotonic()
            with self._lock:
                for connection, ends_at in self._ends_at.items():
                    if now >= ends_at:
                        connection.interrupt()  # of a job between two statements it hits the next one, at the next look


_watchdog = _Watchdog()


def bounded(
    job: Callable[[sqlite3.Connection], Result], limit_seconds: float
) -> Callable[[sqlite3.Connection], Result]:
    """The job, interrupted when it runs for longer than this; 0 is no limit."""
    if limit_seconds == 0:
        return job

    def run(connection: sqlite3.Connection) -> Result:
        _watchdog.begin(connection, limit_seconds)
        try:
            return job(connection)
        except sqlite3.OperationalError as e:
            if getattr(e, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                raise Refusal(TOO_SLOW) from e
            raise
        finally:
            _watchdog.end(connection)

    return run


def _share(places: int, route_class: RouteClass) -> int:
    """How many of these places a class may fill, at least one."""
    return max(1, int(places * SHARE[route_class]))


def _count_down(counts: dict[str, int], key: str) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
