"""The route: what a request must be before the SDK sees it, and what of it the SDK sees.

The guard, the body's limit and clock, and strict JSON are REST's own; so are their answers, problem documents. What
the SDK refuses afterwards (an unknown method, a wrong protocol version) it answers in JSON-RPC, as MCP asks for.
Neither the token nor a cookie is passed on: of the head only the `Mcp-*` fields are.

Origin: a browser sends it and cannot leave it out. Allowed are none, the configured origins (`cors_allowed_origins`;
in dev also localhost, as for REST) and the very host that was asked; but a gateway that listens on the loopback
interface alone believes only loopback names, or a page whose name was rebound to 127.0.0.1 would be "the same host".
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
from litestar import Litestar, Request, Router, post
from litestar.types import ASGIApp
from msgspec import UNSET, UnsetType

from gateway.body import JsonRequest
from gateway.exchange import SCOPE_KEY, exchange_of
from gateway.guard import guard
from gateway.mcp import filling
from gateway.mcp.filling import Filling
from gateway.problems import Problem, Refusal, forbidden
from gateway.services import Services
from shared.log import get_logger
from shared.settings import Settings, words

PATH = "/v1/mcp"
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?\Z")
_LOOPBACK_ADDRESSES = frozenset({"127.0.0.1", "::1", "localhost"})
_JSON_TYPES = frozenset({"application/json", "application/*", "*/*", ""})
_HEAD = ((b"content-type", b"application/json"), (b"accept", b"application/json, text/event-stream"))
NOT_ACCEPTABLE = Problem(406, "The answer is application/json; `Accept` must allow it.")
Handle = Callable[[Any, Any, Any], Awaitable[None]]
log = get_logger("mcp")


class Endpoint:
    """The SDK in one worker. It starts beside the first requests or, without `mcp_at_start`, for the first one of MCP;
    one that comes too early waits for it."""

    def __init__(self, services: Services) -> None:
        self.origins = Origins(services.settings)
        self._services = services
        self._starting: asyncio.Task[Handle] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    def start(self) -> asyncio.Task[Handle]:
        if self._starting is None or (self._starting.done() and _failure(self._starting) is not None):
            self._starting = asyncio.get_running_loop().create_task(self._start())
            self._starting.add_done_callback(_log_failure)
        return self._starting

    async def handle(self) -> Handle:
        """The SDK's ASGI application. A failed start fails this request; the next one tries again."""
        return await asyncio.shield(self.start())

    async def stop(self) -> None:
        self._stop.set()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})
        if self._serving is not None:
            await asyncio.wait({self._serving})

    async def _start(self) -> Handle:
        manager = await asyncio.to_thread(_manager, self._services)
        running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.get_running_loop().create_task(self._serve(manager, running))
        await running
        handle: Handle = manager.handle_request
        return handle

    async def _serve(self, manager: Any, running: asyncio.Future[None]) -> None:
        """A task of its own: what `run` enters must be left by the task that entered it."""
        async with manager.run():
            running.set_result(None)
            await self._stop.wait()


def _failure(task: asyncio.Task[Handle]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _log_failure(task: asyncio.Task[Handle]) -> None:
    failure = _failure(task)
    if failure is not None and not task.cancelled():
        log.error("mcp_not_started", exc_info=failure)


def _manager(services: Services) -> Any:
    from gateway.mcp.server import session_manager

    return session_manager(services)


class Origins:
    """Which `Origin` may call."""

    def __init__(self, settings: Settings) -> None:
        self._configured = frozenset(origin.rstrip("/") for origin in words(settings.cors_allowed_origins))
        self._localhost = settings.cors_localhost
        self._only_loopback = settings.gateway_host in _LOOPBACK_ADDRESSES

    def allows(self, origin: str, host: str) -> bool:
        if origin in self._configured:
            return True
        scheme, _, name = origin.partition("://")
        if scheme not in ("http", "https"):
            return False
        loopback = _LOOPBACK.match(name) is not None
        if loopback and scheme == "http" and self._localhost and _LOOPBACK.match(host):
            return True
        return name.lower() == host.lower() and (loopback or not self._only_loopback)


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    """Inside the lifespan that makes the services."""
    endpoint = app.state.mcp = Endpoint(app.state.services)
    if app.state.services.settings.mcp_at_start:
        endpoint.start()
    try:
        yield
    finally:
        await endpoint.stop()


async def admit(request: Request[Any, Any, Any]) -> None:
    """The guard of every route under /v1, then Origin and Accept; all before the body is read."""
    await guard(request)
    exchange = exchange_of(request.scope)
    origins = [value.decode("latin-1") for value in exchange.every(b"origin")]
    if origins:
        host = (exchange.first(b"host") or b"").decode("latin-1")
        if len(origins) > 1 or not request.app.state.mcp.origins.allows(origins[0], host):
            raise forbidden("Requests from this Origin are not allowed.")
    accepted = b",".join(exchange.every(b"accept")).decode("latin-1")
    if not _JSON_TYPES & {part.partition(";")[0].strip().lower() for part in accepted.split(",")}:
        raise Refusal(NOT_ACCEPTABLE)


class Fault(msgspec.Struct):
    """`error` of an answer."""

    code: int
    message: str


class Message(msgspec.Struct):
    """As much of a JSON-RPC message as decides between the gateway's 400 and the SDK's answer.

    A request whose id is null the SDK would take for a notification: 202, and nothing done. What is neither a request,
    a notification nor an answer it would refuse in the words of its library, with what was sent in them.
    """

    jsonrpc: Literal["2.0"]
    method: str | UnsetType = UNSET
    id: str | int | UnsetType | None = UNSET
    params: dict[str, Any] | UnsetType = UNSET
    result: dict[str, Any] | UnsetType = UNSET
    error: Fault | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.method is not UNSET:
            if self.id is None:
                raise ValueError("the `id` of a request must not be null")
        elif self.result is UNSET and self.error is UNSET:
            raise ValueError("it has no `method`")
        elif self.id is UNSET or (self.id is None and self.error is UNSET):
            raise ValueError("the `id` of an answer is missing")


@post("/", include_in_schema=False)  # the tools describe themselves: `tools/list`
async def call(request: JsonRequest, data: Message) -> ASGIApp:
    """One JSON-RPC message; the SDK answers it."""
    body = await request.body()
    handle = await request.app.state.mcp.handle()
    head = [*_HEAD, *((k, v) for k, v in request.scope["headers"] if k.startswith(b"mcp-"))]
    result = Filling()
    inner = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": PATH,
        "query_string": b"",
        "headers": head,
        SCOPE_KEY: exchange_of(request.scope),
        filling.SCOPE_KEY: result,
    }

    async def answer(_scope: Any, receive: Any, send: Any) -> None:
        await handle(inner, _replay(body, receive), result.into(send))

    return answer


def _replay(body: bytes, receive: Any) -> Callable[[], Awaitable[Any]]:
    """`receive` of a request whose body has been read."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


def router() -> Router:
    return Router(PATH, route_handlers=[call], before_request=admit, request_class=JsonRequest)
