"""Whose reads get a thread, and when.

A tenant's reads are served in turns: a thread serves what waits, and what comes meanwhile, one after the other
(`gateway.handles.read_waiting`). There are turns of two kinds; a tenant has at most one of each, waiting or running:

  - of brief reads: lists, and lookups that could not be done on the loop. They share `worker` and its lock with writes.
  - of slow ones, which is what may take long: searches. Those of all tenants have together at most all threads but one,
    so there is always one soon free for the rest; and they have a connection apart, so that a search of seconds keeps
    its tenant's writes and lists from nothing, whether it runs or waits for a thread.

The connection apart is `worker` itself as long as nobody else wants it: most tenants never have two at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from gateway.handles import OpenTenant, read_and_renew, read_waiting
from gateway.threads import Then, Threads

Answered = Callable[[OpenTenant, BaseException | None], None]


class ReadTurns:
    """For one event loop. `answered` is called on it after each read, with what it failed with."""

    def __init__(self, threads: Threads, count: int, answered: Answered) -> None:
        self._threads = threads
        self._slow_places = asyncio.Semaphore(max(1, count - 1))
        self._answered = answered

    async def begin(self, tenant: OpenTenant, slow: bool) -> None:
        """See to it that what was just put into `tenant.reads` is served; at once, and without suspending, when nobody
        is in the way."""
        if slow:
            if not tenant.searching:
                tenant.searching = True
                if self._slow_places.locked():
                    asyncio.get_running_loop().create_task(self._search_after_others(tenant))
                else:
                    await self._slow_places.acquire()
                    self._search(tenant)
        elif not tenant.reading:
            tenant.reading = True
            if tenant.writing is not None or tenant.lock.locked():
                asyncio.get_running_loop().create_task(self._read_after_others(tenant))
            else:
                await tenant.lock.acquire()
                self._read(tenant)

    async def _read_after_others(self, tenant: OpenTenant) -> None:
        await tenant.lock.acquire()
        if tenant.reads.has(read_and_renew):
            tenant.inline = False
        self._read(tenant)

    async def _search_after_others(self, tenant: OpenTenant) -> None:
        await self._slow_places.acquire()
        self._search(tenant)

    def _read(self, tenant: OpenTenant) -> None:
        settle = partial(self._settle, partial(self._answered, tenant))
        self._threads.run(read_waiting, tenant, settle, False, then=partial(self._was_read, tenant))

    def _search(self, tenant: OpenTenant) -> None:
        if tenant.searcher is None and not tenant.lock.locked():
            tenant.searcher, tenant.worker = tenant.worker, None
        settle = partial(self._settle, partial(self._found, tenant))
        self._threads.run(read_waiting, tenant, settle, True, then=partial(self._was_searched, tenant))

    def _settle(self, then: Then, answer: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._threads.settle(answer, result, error, then)

    def _found(self, tenant: OpenTenant, error: BaseException | None) -> None:
        tenant.reads.searches -= 1
        self._answered(tenant, error)
        _give_back(tenant)  # now, not when the thread says that it found no more: the client's next request may be here

    def _was_read(self, tenant: OpenTenant, _error: BaseException | None) -> None:
        tenant.inline = tenant.link != "" and not tenant.closing
        tenant.lock.release()
        if tenant.reads.waits(slow=False):  # in their turn: a write may have been waiting for longer
            asyncio.get_running_loop().create_task(self._read_after_others(tenant))
        else:
            tenant.reading = False

    def _was_searched(self, tenant: OpenTenant, _error: BaseException | None) -> None:
        _give_back(tenant)
        self._slow_places.release()
        if tenant.reads.waits(slow=True):  # in its turn: other tenants' searches may have been waiting for longer
            asyncio.get_running_loop().create_task(self._search_after_others(tenant))
        else:
            tenant.searching = False


def _give_back(tenant: OpenTenant) -> None:
    """The `worker` that searched, unless somebody has needed one meanwhile. Of a tenant that is closing a thread may be
    taking the handles now."""
    free = tenant.reads.searches == 0 and not tenant.lock.locked() and not tenant.closing
    if free and tenant.worker is None:
        tenant.worker, tenant.searcher = tenant.searcher, None
