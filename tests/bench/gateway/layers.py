"""Where the CPU time of one request goes: `python -m tests.bench.gateway.layers`.

The worker's own ASGI application is driven in this process, without a server or a socket, by requests as Granian hands
them over. Whole routes first, cut off at one layer after the other; then the parts that a layer is made of, each called
by itself on the running worker's own objects. Times are CPU µs of the whole process (so a search's thread counts), the
least of `--rounds`: neighbours on the machine only ever add.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from rich.console import Console
from rich.table import Table

from tests.bench.gateway.world import MAIN_TENANT, World, world
from tests.gateway_stack import AUDIENCE, ISSUER

Times = dict[str, float]


class Driver:
    """Sends requests to an ASGI application, as many coroutines at once as a busy worker has."""

    def __init__(self, app: Any, concurrency: int) -> None:
        self.app = app
        self._concurrency = concurrency

    async def us(self, scopes: list[dict[str, Any]], bodies: list[bytes], count: int, expected: int) -> float:
        """CPU µs a request; every answer must have the expected status."""
        following = zip(itertools.cycle(scopes), itertools.cycle(bodies), range(count), strict=False)
        began = time.process_time()
        await asyncio.gather(*(self._client(following, expected) for _ in range(self._concurrency)))
        return (time.process_time() - began) / count * 1e6

    async def _client(self, following: Iterator[tuple[dict[str, Any], bytes, int]], expected: int) -> None:
        app = self.app
        for scope, body, _ in following:
            message = {"type": "http.request", "body": body, "more_body": False}
            statuses = []

            async def receive(message: Any = message) -> Any:
                return message

            async def send(message: Any, statuses: list[int] = statuses) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            await app(dict(scope), receive, send)
            if statuses != [expected]:
                raise SystemExit(f"{scope['path']}: {statuses} instead of {expected}")


async def answer_ok(scope: Any, _receive: Any, send: Any) -> None:
    """The innermost application of a cut: what the ASGI messages of an answer cost by themselves."""
    if "engram.exchange" in scope:
        _reached(scope)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}", "more_body": False})


def scope_of(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> dict[str, Any]:
    """As Granian makes it."""
    fields = {"host": "localhost", **headers}
    if body:
        fields |= {"content-type": "application/json", "content-length": str(len(body))}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8080),
        "client": ("127.0.0.1", 40_000),
        "scheme": "http",
        "method": method,
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in fields.items()],
        "extensions": {},
    }


@asynccontextmanager
async def lifespan(app: Any) -> Any:
    """The application started, and stopped at the end."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    running = asyncio.create_task(app({"type": "lifespan", "state": {}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    started = await outbox.get()
    if started["type"] != "lifespan.startup.complete":
        raise SystemExit(f"the worker did not start: {started}")
    yield
    await inbox.put({"type": "lifespan.shutdown"})
    await outbox.get()
    await running


class Layers:
    """Measures one running worker."""

    def __init__(self, made: World, edge: Any, rounds: int) -> None:
        self._world = made
        self._edge = edge
        self._heads = edge._app
        self._shortcut = self._heads._app
        self._services = self._shortcut._app.state.services
        self._rounds = rounds

    async def routes(self) -> Times:
        made, headers = self._world, self._world.headers(MAIN_TENANT)
        gets = [scope_of("GET", f"/v1/memories/{i}", headers) for i in made.ids[:1_000]]
        queries = [json.dumps(made.corpus.query()).encode() for _ in range(500)]
        searches = [scope_of("POST", "/v1/search", headers, q) for q in queries]
        bodies = [json.dumps(made.corpus.memory()).encode() for _ in range(500)]
        creates = [scope_of("POST", "/v1/memories", headers, b) for b in bodies]
        found: Times = {}

        async def measure(what: str, app: Any, *requests: Any, status: int = 200, count: int = 2_000) -> None:
            found[what] = await self._least(lambda: Driver(app, 32).us(*requests, count, status))

        edge, heads, shortcut = self._edge, self._heads, self._shortcut
        await Driver(edge, 32).us(gets, [b""], 20_000, 200)  # until what a worker begins with has been done
        await measure("messages alone", answer_ok, gets, [b""])
        edge._app = answer_ok
        await measure("GET: edge (id, event in the spool, metrics, access line)", edge, gets, [b""])
        edge._app, heads._app = heads, answer_ok
        await measure("GET: + head checks and fields", edge, gets, [b""])
        heads._app = shortcut
        route = shortcut._get

        async def trivial(**_: Any) -> Any:
            return _Answer

        shortcut._get = route._replace(handle=trivial)
        with mock.patch("gateway.shortcut.admit", _no_guard):
            await measure("GET: + short way", edge, gets, [b""])
        await measure("GET: + guard (token, limits, quota, place)", edge, gets, [b""])
        shortcut._get = route
        await measure("GET: + lookup and JSON = whole", edge, gets, [b""])
        detours = [{**scope, "query_string": b"x"} for scope in gets]
        await measure("GET: whole, by Litestar's router", edge, detours, [b""])
        await measure("search: whole", edge, searches, queries, count=500)
        await measure("create: whole, 32 at once", edge, creates, bodies, status=201, count=1_000)
        return found

    async def parts(self) -> Times:
        """The steps of a request by themselves, in the order it meets them."""
        from gateway.exchange import Exchange
        from shared.engine import memories
        from shared.engine.search import search
        from shared.usage import UsageEvent

        services, made, edge = self._services, self._world, self._edge
        authorization = [made.headers(MAIN_TENANT)["authorization"].encode()]
        memory_id, query = made.ids[0], "kitchen garden"
        exchange = Exchange("GET")
        event = UsageEvent(exchange.key, MAIN_TENANT, "/v1/memories/{id}", 200, 1, 0, 0, exchange.ts_us)
        pool, gate = services.pool, services.gate

        def get(connection: Any) -> bytes:
            return msgspec.json.encode(memories.get(connection, memory_id))

        def find(connection: Any) -> Any:
            return search(connection, query)

        def nothing(_connection: Any) -> None:
            return None

        async def place() -> None:
            (await gate.enter(MAIN_TENANT, "get"))()

        async def record() -> None:
            exchange.status = 0
            edge._record(exchange, {"path_template": "/v1/memories/{memory_id}"}, 200)

        async def caller() -> Any:
            return await services.authenticator.caller(authorization)

        synchronous: dict[str, Callable[[], Any]] = {
            "request id, clocks": lambda: Exchange("GET"),
            "rate limit (shared table under flock)": lambda: services.rates.tenant(MAIN_TENANT, "read"),
            "rate limit header fields": services.rates.tenant(MAIN_TENANT, "read").headers,
            "quota": lambda: services.quotas.check(MAIN_TENANT, ("api_calls",)),
            "usage event into the spool (one write)": lambda: services.spool.append(event),
        }
        awaited: dict[str, Callable[[], Awaitable[Any]]] = {
            "token, verified before": caller,
            "place (enter, leave)": place,
            "event, counts and access line together": record,
            "lookup on the loop: fence": lambda: pool.look_up(MAIN_TENANT, nothing),
            "lookup on the loop: fence, SQL, JSON": lambda: pool.look_up(MAIN_TENANT, get),
            "to a thread and back: fence, time limit": lambda: pool.read(MAIN_TENANT, nothing),
            "to a thread and back: the same with a search": lambda: pool.read(MAIN_TENANT, find),
        }
        found: Times = {}
        for what, call in synchronous.items():
            found[what] = await self._least(lambda call=call: _each(call, 2_000))  # type: ignore[misc]
        for what, call in awaited.items():
            found[what] = await self._least(lambda call=call: _each_awaited(call, 500))  # type: ignore[misc]
        return found

    async def _least(self, measure: Callable[[], Awaitable[float]]) -> float:
        gc.collect()
        return min([await measure() for _ in range(self._rounds)])


class _Answer:
    content = b"{}"
    status_code = 200


async def _no_guard(_services: Any, scope: Any, *_terms: Any) -> None:
    _reached(scope)


def _reached(scope: Any) -> None:
    """As the guard leaves a request it let through: it is an event of its tenant."""
    scope["path_template"] = "/v1/memories/{memory_id}"
    exchange = scope["engram.exchange"]
    exchange.tenant_id, exchange.reached = MAIN_TENANT, True


async def _each(call: Callable[[], Any], count: int) -> float:
    began = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - began) / count * 1e6


async def _each_awaited(call: Callable[[], Awaitable[Any]], count: int) -> float:
    began = time.process_time()
    for _ in range(count):
        await call()
    return (time.process_time() - began) / count * 1e6


async def _measure(made: World, rounds: int) -> tuple[Times, Times]:
    from gateway.app import create_app  # prometheus-client reads its directory when it is imported

    settings = made.settings.model_copy(
        update={
            "jwks_url": made.issuer.url,
            "jwt_issuer": ISSUER,
            "jwt_audience": AUDIENCE,
            "rate_limit_rps": 1_000_000,
            "rate_limit_burst": 1_000_000,
        }
    )
    edge = create_app(settings)
    async with lifespan(edge):
        layers = Layers(made, edge, rounds)
        return await layers.routes(), await layers.parts()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway.layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with world() as made:
        routes, parts = asyncio.run(_measure(made, options.rounds))
    for title, times in (("route", routes), ("part", parts)):
        table = Table(title, "CPU µs")
        for what, us in times.items():
            table.add_row(what, f"{us:.1f}")
        Console(width=110).print(table)
    if options.out:
        options.out.write_text(json.dumps({"routes": routes, "parts": parts}, indent=2))


def _in_a_process_like_a_workers() -> int:
    """Run this again where a worker's metrics directory is set before anything imports prometheus-client, and where
    access lines go to a file."""
    with tempfile.TemporaryDirectory(prefix="engram-bench-layers-") as name:
        log_path = Path(name, "log")
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": name}
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "tests.bench.gateway.layers", *sys.argv[1:]]
            status = subprocess.run(command, env=environment, stderr=log, check=False).returncode
        if status:
            print(log_path.read_text()[-3_000:], file=sys.stderr)
        return status


if __name__ == "__main__":
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        sys.exit(_in_a_process_like_a_workers())
    main()
