"""Events that an answer waits for until they would survive a power loss (`ENGRAM_USAGE_DURABILITY=sync`).

The start of an answer waits in the edge until a fdatasync that began after its event was appended has ended. One
thread does them, one after the other: all answers that gather while one runs share the next. In async mode none of
this is in the way.

An event whose fdatasync failed may be lost at a power loss, so its request is not acknowledged: the answer becomes a
503, and so does the event, which counts nothing then (but for one whose segment was sealed just then, see
`shared.spool.Spool.sync`). What was done stays done, as with a connection that broke.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from gateway.writes import again
from shared.errors import SpoolUnavailable
from shared.spool import Spool
from shared.usage import UsageEvent


class _Waiting(NamedTuple):
    segment: str
    refusal: UsageEvent
    durable: asyncio.Future[None]


class GroupSync:
    """Many waiters, one `Spool.sync` at a time. For one event loop."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="usage-sync")
        self._waiting: list[_Waiting] = []
        self._syncing: asyncio.Task[None] | None = None

    async def append(self, event: UsageEvent, refusal: UsageEvent) -> None:
        """The event survives power loss when this returns. Raises `SpoolUnavailable` when it might not; what is
        recorded of the request then is `refusal`."""
        segment = self._spool.append(event, refusal)
        if not segment:
            raise SpoolUnavailable("the disk refuses usage events")
        loop = asyncio.get_running_loop()
        durable: asyncio.Future[None] = loop.create_future()
        self._waiting.append(_Waiting(segment, refusal, durable))
        if self._syncing is None:
            self._syncing = loop.create_task(self._sync_while_somebody_waits())
        await durable

    async def _sync_while_somebody_waits(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                refusals = [(one.segment, one.refusal) for one in group]
                failed: BaseException = SpoolUnavailable("usage events could not be made durable")
                try:
                    refused = await loop.run_in_executor(self._executor, partial(self._spool.sync, refusals))
                except BaseException as e:  # noqa: BLE001  it is the waiters' to raise
                    failed, refused = e, [one.refusal for one in group]
                ids = {refusal.request_id for refusal in refused}
                for one in group:
                    if one.durable.done():  # its caller has left
                        continue
                    if one.refusal.request_id in ids:
                        one.durable.set_exception(again(failed))
                    else:
                        one.durable.set_result(None)
        finally:
            self._syncing = None
