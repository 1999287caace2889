"""The shortcut past Litestar's router answers what Litestar would: one table of requests, sent both ways."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import httpx
import pytest
from litestar import Litestar, get

from gateway import shortcut
from tests.gateway_stack import Stack, stack  # noqa: F401

MINE = "/v1/memories/"
JSON = {"Content-Type": "application/json"}
# `?x` sends a request to Litestar and means nothing to these routes: the long way round to the same handler.
DETOUR = "?x"


@pytest.fixture
def api(stack: Stack):  # noqa: F811
    with stack.client(stack.tenant()) as client:
        client.post("/v1/memories", json={"content": "apple pie", "tags": ["fruit"]})
        yield client


NOT_JSON = {"Content-Type": "text/plain"}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unknown id": ("GET", MINE + str(uuid4()), {}),
    "id in capitals": ("GET", MINE + str(uuid4()).upper(), {}),
    "hyphens for an id": ("GET", MINE + "-" * 36, {}),
    "escaped id": ("GET", MINE + "%30" * 36, {}),
    "id and slash": ("GET", MINE + str(uuid4()) + "/", {}),
    "HEAD": ("HEAD", MINE + str(uuid4()), {}),
    "PUT": ("PUT", MINE + str(uuid4()), {}),
    "OPTIONS": ("OPTIONS", "/v1/search", {}),
    "GET of a POST": ("GET", "/v1/search", {}),
    "a body on a GET": ("GET", MINE + str(uuid4()), {"content": b"x"}),
    "no token": ("GET", MINE + str(uuid4()), {"headers": {"Authorization": ""}}),
    "a bad token": ("POST", "/v1/search", {"headers": {"Authorization": "Bearer a.b.c"}, "content": b"x"}),
    "another tenant": ("GET", MINE + str(uuid4()), {"headers": {"X-Engram-Tenant": "somebody"}}),
    "its own tenant's case": ("POST", "/v1/search", {"headers": {"X-Engram-Tenant": "A"}, "json": {"query": "x"}}),
    "an odd host": ("GET", MINE + str(uuid4()), {"headers": {"Host": "a b"}}),
    "an IPv6 host": ("GET", MINE + str(uuid4()), {"headers": {"Host": "[::1]:80"}}),
    "search": ("POST", "/v1/search", {"json": {"query": "apple"}}),
    "search, nothing": ("POST", "/v1/search", {"json": {"query": "nothing"}}),
    "search syntax": ("POST", "/v1/search", {"json": {"query": '"open'}}),
    "search bounds": ("POST", "/v1/search", {"json": {"query": "x", "limit": 0}}),
    "search, no body": ("POST", "/v1/search", {"headers": JSON}),
    "search, broken": ("POST", "/v1/search", {"headers": JSON, "content": b'{"query"'}),
    "search, deep": ("POST", "/v1/search", {"headers": JSON, "content": b"[" * 100_000}),
    "search, not UTF-8": ("POST", "/v1/search", {"headers": JSON, "content": b'{"query": "\xff"}'}),
    "search, not JSON": ("POST", "/v1/search", {"headers": NOT_JSON, "content": b"x"}),
    "create, no type": ("POST", "/v1/memories", {"content": b"{}"}),
    "create, unknown field": ("POST", "/v1/memories", {"json": {"content": "x", "id": "mine"}}),
    "create, NUL": ("POST", "/v1/memories", {"json": {"content": "\0"}}),
    "create, large": ("POST", "/v1/memories", {"headers": JSON, "content": b" " * 600_000}),
    "create, large in pieces": ("POST", "/v1/memories", {"headers": JSON, "content": [b" " * 300_000] * 2}),
    "create, encoded": ("POST", "/v1/memories", {"headers": {**JSON, "Content-Encoding": "gzip"}, "content": b"x"}),
}
_ITS_OWN = {"x-request-id", "date", "ratelimit-remaining", "ratelimit-reset", "content-length"}


def _send(client: httpx.Client, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
    options = dict(options)
    if isinstance(options.get("content"), list):
        options["content"] = iter(options["content"])
    return client.request(method, path, **options)


def _shape(response: httpx.Response) -> dict[str, Any]:
    document = json.loads(response.content) if response.content else None
    if isinstance(document, dict) and "request_id" in document:
        assert document.pop("request_id") == response.headers["x-request-id"]
    headers = {k: v for k, v in response.headers.items() if k not in _ITS_OWN}
    return {"status": response.status_code, "headers": headers, "body": document}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_answer_record_and_meter_the_same(api: httpx.Client, stack: Stack, name: str) -> None:  # noqa: F811
    """Status, headers, body, access line and usage event, except for ids and clocks."""
    method, path, options = CASES[name]
    short, long = _send(api, method, path, options), _send(api, method, path + DETOUR, options)
    assert _shape(short) == _shape(long)
    lines, events = [], []
    for response in (short, long):
        request_id = response.headers["x-request-id"]
        line = dict(stack.gateway.access_line(request_id))
        for clock in ("request_id", "latency_ms", "ts"):
            del line[clock]
        lines.append(line)
        tenant_id = line["tenant_id"] or "nobody"
        key = bytes.fromhex(request_id.replace("-", ""))
        found = [e for e in stack.gateway.events(tenant_id) if e.request_id == key]
        events.append([_counted(e) for e in found])
    assert lines[0] == lines[1] and events[0] == events[1]


def _counted(event: Any) -> tuple[Any, ...]:
    return (event.route, event.status, event.api_calls, event.search_queries, event.memories_created)


def test_a_memory_made_and_read_either_way_is_the_same(api: httpx.Client) -> None:
    """The success bodies too, and a create of either kind counts one memory."""
    for detour in ("", DETOUR):
        made = api.post(f"/v1/memories{detour}", json={"content": "x", "metadata": {"n": 1}})
        assert made.status_code == 201
        path = MINE + made.json()["id"]
        assert _shape(api.get(path)) == _shape(api.get(path + DETOUR))
        assert api.get(path).json() == made.json()


@pytest.mark.parametrize("scope", ["", "memories:read", "memories:write", "search"])
def test_a_missing_scope_is_the_same_refusal(stack: Stack, scope: str) -> None:  # noqa: F811
    with stack.client(stack.idle_tenant, scope=scope) as client:
        for method, path in (("GET", MINE + str(uuid4())), ("POST", "/v1/search"), ("POST", "/v1/memories")):
            short, long = (_send(client, method, p, {"headers": JSON}) for p in (path, path + DETOUR))
            assert _shape(short) == _shape(long)


def test_a_route_that_needs_more_of_litestar_is_refused_at_the_start() -> None:
    """A guard or hook added to one of these routes must not be skipped in silence."""

    @get("/v1/memories/{memory_id:str}")
    async def plain(memory_id: str) -> str:
        return memory_id

    app = Litestar([plain], openapi_config=None)
    with pytest.raises(TypeError, match="cannot be taken past Litestar"):
        shortcut._route(app, "GET", shortcut._BY_ID)
