"""Answers that wait until their usage would survive a power loss (`ENGRAM_USAGE_DURABILITY=sync`).

    Granian worker → DurableAnswers → Edge → …

The edge appends the event and then sends the start of the answer; here that start waits until a fdatasync that
began after the append has ended. One thread does them, one after the other: all answers that gather while one runs
share the next. In async mode none of this is in the way.

An event whose fdatasync failed may be lost at a power loss, so its request is not acknowledged: the answer becomes a
503. What was done stays done and is billed if its event survives, as with a connection that broke.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gateway.edge import ASGIApp, Message, Receive, Scope, Send
from gateway.exchange import Exchange, exchange_of
from gateway.problems import MEDIA_TYPE, SPOOL_FULL
from gateway.writes import again
from shared.errors import SpoolUnavailable
from shared.log import get_logger
from shared.spool import Spool

log = get_logger("gateway")


class GroupSync:
    """Many waiters, one `Spool.sync` at a time. For one event loop."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="usage-sync")
        self._waiting: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None

    async def wait(self) -> None:
        """Every event appended before this call survives power loss when it returns. Raises `SpoolUnavailable`."""
        loop = asyncio.get_running_loop()
        durable: asyncio.Future[None] = loop.create_future()
        self._waiting.append(durable)
        if self._syncing is None:
            self._syncing = loop.create_task(self._sync_while_somebody_waits())
        await durable

    async def _sync_while_somebody_waits(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                failed: BaseException | None = None
                try:
                    await loop.run_in_executor(self._executor, self._spool.sync)
                except BaseException as e:  # noqa: BLE001  it is the waiters' to raise
                    failed = e
                for durable in group:
                    if durable.done():  # its caller has left
                        continue
                    if failed is None:
                        durable.set_result(None)
                    else:
                        durable.set_exception(again(failed))
        finally:
            self._syncing = None


class DurableAnswers:
    """An ASGI application around the edge."""

    def __init__(self, edge: ASGIApp, spool: Spool) -> None:
        self._edge = edge
        self._group = GroupSync(spool)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False

        async def answer(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and exchange_of(scope).reached:
                try:
                    await self._group.wait()
                except SpoolUnavailable as e:
                    refused = True
                    await _refuse(exchange_of(scope), str(e), send)
            if not refused:
                await send(message)

        await self._edge(scope, receive, answer)


async def _refuse(exchange: Exchange, cause: str, send: Send) -> None:
    log.error("usage_not_durable", request_id=exchange.request_id, status=exchange.status, cause=cause)
    body = SPOOL_FULL.body(exchange.request_id)
    headers = [
        *exchange.headers,
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(SPOOL_FULL.retry_after).encode()),
        (b"x-request-id", exchange.request_id.encode()),
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": SPOOL_FULL.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": False})
