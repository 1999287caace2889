"""Whose reads get a thread, and when.

A tenant's reads are served in turns: a thread serves what waits, and what comes meanwhile, one after the other
(`gateway.handles.read_waiting`). There are turns of two kinds; a tenant has at most one of each, waiting or running:

  - of brief reads: lists, and lookups that could not be done on the loop. They share `worker` and its lock with writes.
  - of slow ones, which is what may take long: searches. Those of all tenants have together at most all threads but one,
    so there is always one soon free for the rest. While one waits for a thread it holds nothing. Then it has lock and
    `worker` as the others have, and serves brief reads first; but when it is still at it after `APART_SECONDS`, it goes
    on alone with that connection, and the lock is given back: a search of seconds keeps its tenant's writes, lists and
    lookups from nothing. Who needs a `worker` meanwhile opens one, and then the tenant has both, and its searches go
    apart from the others, until it is closed. So it is when a write hangs: no search waits for its tenant's lock, with
    a thread that others want, for longer than `HANGS_SECONDS`.

Most searches take less than a millisecond, and a tenant of such never has the connection more: it would cost an open,
and a thread's waking for each request (measured with a connection apart from the start: 10% more CPU in the usual mix,
a third more with 5,000 tenants of which some are hot).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from gateway.handles import OpenTenant, read_waiting
from gateway.threads import Threads

APART_SECONDS = 0.025
HANGS_SECONDS = 0.25
Answered = Callable[[OpenTenant, BaseException | None], None]


class ReadTurns:
    """For one event loop. `answered` is called on it after each read, with what it failed with; `over` after a turn."""

    def __init__(self, threads: Threads, count: int, answered: Answered, over: Callable[[OpenTenant], None]) -> None:
        self._threads = threads
        self._slow_places = asyncio.Semaphore(max(1, count - 1))
        self._answered = answered
        self._over = over

    async def begin(self, tenant: OpenTenant, slow: bool) -> None:
        """See to it that what was just put into `tenant.reads` is served; at once, and without suspending, when nobody
        is in the way."""
        if tenant.searching if slow else tenant.reading or tenant.lent is not None:
            return
        others = tenant.reading or tenant.searching or tenant.writing is not None or tenant.lock.locked()
        if not slow:
            if others:
                self._read_later(tenant)
            else:
                tenant.reading = True
                await tenant.lock.acquire()
                self._read(tenant)
        elif others or self._slow_places.locked():
            self._search_later(tenant)
        else:
            tenant.searching = True
            await self._slow_places.acquire()
            apart = tenant.searcher is not None
            if not apart:
                await tenant.lock.acquire()
            self._search(tenant, apart)

    def _read_later(self, tenant: OpenTenant) -> None:
        tenant.reading = True
        asyncio.get_running_loop().create_task(self._read_after_others(tenant))

    async def _read_after_others(self, tenant: OpenTenant) -> None:
        await tenant.lock.acquire()
        if tenant.reads.renews:
            tenant.inline = False
        self._read(tenant)

    def _search_later(self, tenant: OpenTenant) -> None:
        tenant.searching = True
        asyncio.get_running_loop().create_task(self._search_after_others(tenant))

    async def _search_after_others(self, tenant: OpenTenant) -> None:
        await self._slow_places.acquire()
        apart = tenant.searcher is not None
        if not apart:
            try:
                async with asyncio.timeout(HANGS_SECONDS):
                    await tenant.lock.acquire()
            except TimeoutError:
                apart = True
        self._search(tenant, apart)

    def _read(self, tenant: OpenTenant) -> None:
        """The caller has the lock, which is given back when the thread is done."""
        self._serve(tenant, False, self._was_read)

    def _search(self, tenant: OpenTenant, apart: bool) -> None:
        """The caller has a place, and the lock unless it is `apart`; they are given back likewise."""
        if not apart:
            tenant.searcher, tenant.worker = tenant.worker, None
            tenant.lent = asyncio.get_running_loop().call_later(APART_SECONDS, self._let_go, tenant)
        self._serve(tenant, True, self._was_searched)

    def _serve(self, tenant: OpenTenant, slow: bool, then: Answered) -> None:
        self._threads.run(read_waiting, tenant, partial(self._settle, tenant), slow, then=partial(then, tenant))

    def _settle(
        self, tenant: OpenTenant, answer: asyncio.Future[Any], result: Any, error: BaseException | None
    ) -> None:
        self._threads.settle(answer, result, error, partial(self._answered, tenant))

    def _was_read(self, tenant: OpenTenant, _error: BaseException | None) -> None:
        tenant.inline = tenant.link != "" and not tenant.closing
        tenant.lock.release()
        tenant.reading = False
        self._go_on(tenant)
        self._over(tenant)

    def _let_go(self, tenant: OpenTenant) -> None:
        """The turn takes longer than the others may wait for it."""
        tenant.lent = None
        tenant.lock.release()
        self._go_on(tenant)

    def _was_searched(self, tenant: OpenTenant, _error: BaseException | None) -> None:
        self._slow_places.release()
        if tenant.lent is not None:
            tenant.lent.cancel()
            tenant.lent = None
            tenant.lock.release()
        if tenant.worker is None and not tenant.lock.locked():  # nobody has needed one meanwhile
            tenant.worker, tenant.searcher = tenant.searcher, None
        tenant.searching = False
        self._go_on(tenant)
        self._over(tenant)

    def _go_on(self, tenant: OpenTenant) -> None:
        """What waits now gets on in its turn: a write, or another tenant's search, may have been waiting for longer."""
        if tenant.reads.waits(slow=False) and not tenant.reading and tenant.lent is None:
            self._read_later(tenant)
        if tenant.reads.waits(slow=True) and not tenant.searching:
            self._search_later(tenant)
