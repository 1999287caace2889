"""Whose reads get a thread, and when.

A tenant's reads are served in turns: a thread that has its database serves what waits, and what comes meanwhile, one
after the other (`gateway.handles.read_waiting`). What may take long, a search, has at most all threads but one, so
there is always one soon free for the rest. Before its turn it waits for one of these places, and only then for its
tenant's database: so while the searches of others have all places, its tenant's writes, lists and lookups go on.

A tenant has at most one turn of each kind that waits or runs. One that may serve searches serves the rest first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from gateway.handles import OpenTenant, read_and_renew, read_waiting
from gateway.threads import Threads

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
        if tenant.searching if slow else tenant.reading or tenant.in_thread:
            return
        others = tenant.reading or tenant.searching or tenant.writing is not None or tenant.lock.locked()
        if others or (slow and self._slow_places.locked()):
            self._wait(tenant, slow)
            return
        _mark(tenant, slow, True)
        if slow:
            await self._slow_places.acquire()
        await tenant.lock.acquire()
        self._serve(tenant, slow)

    def _wait(self, tenant: OpenTenant, slow: bool) -> None:
        _mark(tenant, slow, True)
        asyncio.get_running_loop().create_task(self._serve_after_others(tenant, slow))

    async def _serve_after_others(self, tenant: OpenTenant, slow: bool) -> None:
        if slow:
            await self._slow_places.acquire()
        await tenant.lock.acquire()
        if not tenant.reads.waits(slow=slow):  # the other turn served it, or it was overdue
            self._give_back(tenant, slow)
            return
        if tenant.reads.has(read_and_renew):
            tenant.inline = False
        self._serve(tenant, slow)

    def _serve(self, tenant: OpenTenant, slow: bool) -> None:
        """The caller has the lock, and a place if it is `slow`; they are given back when the thread is done."""
        tenant.in_thread = True
        settle, finished = partial(self._settle, tenant), partial(self._finished, tenant, slow)
        self._threads.run(read_waiting, tenant, settle, slow, then=finished)

    def _settle(
        self, tenant: OpenTenant, answer: asyncio.Future[Any], result: Any, error: BaseException | None
    ) -> None:
        self._threads.settle(answer, result, error, partial(self._answered, tenant))

    def _finished(self, tenant: OpenTenant, slow: bool, _error: BaseException | None) -> None:
        tenant.in_thread = False
        tenant.inline = tenant.link != "" and not tenant.closing
        self._give_back(tenant, slow)

    def _give_back(self, tenant: OpenTenant, slow: bool) -> None:
        """The lock, and the place of one that is `slow`. What waits now gets on when it is its turn: a write may have
        been waiting for longer."""
        tenant.lock.release()
        if slow:
            self._slow_places.release()
        _mark(tenant, slow, False)
        if not tenant.reading and tenant.reads.waits(slow=False):
            self._wait(tenant, slow=False)
        if not tenant.searching and tenant.reads.waits(slow=True):
            self._wait(tenant, slow=True)


def _mark(tenant: OpenTenant, slow: bool, has_turn: bool) -> None:
    if slow:
        tenant.searching = has_turn
    else:
        tenant.reading = has_turn
