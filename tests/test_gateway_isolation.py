"""Every way a token of one tenant could name another: nothing of the other comes back, and nothing of it changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from shared.tenant import TenantPaths
from tests.gateway_stack import Stack, stack  # noqa: F401

MARK = "quokkazebra"  # in every text of the other tenant; its ids and its tenant id are marks too
CALLS = 987_654_321  # its usage of this month


class Attempt(NamedTuple):
    """A request of A's. `like` is the request it must be answered as, when it is not refused."""

    method: str
    url: str
    options: dict[str, Any] | None = None
    like: tuple[str, str, dict[str, Any]] | None = None


def reads(own: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        ("GET", "/v1/memories", {}),
        ("GET", f"/v1/memories/{own}", {}),
        ("POST", "/v1/search", {"json": {"query": "plain"}}),
        ("POST", "/v1/mcp", {"json": tool("memory_list")}),
        ("POST", "/v1/mcp", {"json": tool("memory_stats")}),
    ]


def tool(name: str, **arguments: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}


def attempts(b: str, own: str, ids: list[str], cursor: str, token_of_b: str) -> Iterator[Attempt]:
    names = ("tenant_id", "tenant", "tenantId", "X-Engram-Tenant", "org", "sub", "database", "access_token", "token")
    for method, url, options in reads(own):
        like = (method, url, options)
        for name in names:  # in the query
            value = token_of_b if "token" in name else b
            yield Attempt(method, f"{url}?{name}={value}", options, like)
            yield Attempt(method, f"{url}?{name}=..%2F{value}&{name}={value}", options, like)
        for header, value in {
            "X-Tenant-Id": b,
            "X-Tenant": b,
            "Tenant": b,
            "X-Forwarded-User": b,
            "X-Forwarded-Host": f"{b}.engram.test",
            "X-Original-URL": f"/v1/memories/{ids[0]}",
            "X-Rewrite-URL": f"/v1/memories/{ids[0]}",
            "X-HTTP-Method-Override": "DELETE",
            "X-Access-Token": token_of_b,
            "Cookie": f"tenant_id={b}; token={token_of_b}",
            "Mcp-Session-Id": b,
            "X-Request-Id": ids[0],
        }.items():
            yield Attempt(method, url, options | {"headers": [(header, value)]}, like)
        for values in ([b], ["", b], [f"../{b}"], [b.upper()]):
            yield Attempt(method, url, options | {"headers": [("X-Engram-Tenant", v) for v in values]})
        yield Attempt(method, url, options | {"headers": [("Authorization", f"Bearer {token_of_b}")]})  # a second one
    for key in ids:  # in the path
        for path in (
            f"/v1/memories/{key}",
            f"/v1/memories/{key}/",
            f"/v1/memories/{key.upper()}",
            f"/v1/memories/{own}/../{key}",
            f"/v1/memories/{own}%2F..%2F{key}",
            f"//v1/memories/{key}",
            f"/v1/{b}/memories/{key}",
            f"/v1/tenants/{b}/memories/{key}",
            f"/v1/memories/..%2f..%2f{b}%2fmemories%2f{key}",
            f"/v1/memories/{key}%00",
            f"/v1/memories/{quote(b, safe='')}%2f{key}",
        ):
            yield Attempt("GET", path)
            yield Attempt("PATCH", path, {"json": {"content": "taken"}})
            yield Attempt("DELETE", path)
            yield Attempt("DELETE", path, {"headers": [("X-Engram-Tenant", b)]})
        for name in ("memory_get", "memory_delete"):
            yield Attempt("POST", "/v1/mcp", {"json": tool(name, id=key)})
            yield Attempt("POST", "/v1/mcp", {"json": tool(name, id=f"{b}/{key}")})
            yield Attempt("POST", "/v1/mcp", {"json": tool(name, id=key, tenant_id=b)})
        yield Attempt("POST", "/v1/mcp", {"json": tool("memory_update", id=key, content="taken")})
    for field in ("tenant_id", "tenant", "id", "database", "path"):  # in the body
        value = ids[0] if field == "id" else b
        for method, url, body in (
            ("POST", "/v1/memories", {"content": "mine"}),
            ("PATCH", f"/v1/memories/{own}", {"importance": 0.5}),
            ("POST", "/v1/search", {"query": MARK}),
            ("POST", "/v1/mcp", tool("memory_search", query=MARK)),
            ("POST", "/v1/mcp", tool("memory_list")),
        ):
            if not (field == "id" and url == "/v1/mcp"):  # JSON-RPC's own, echoed by design
                yield Attempt(method, url, {"json": body | {field: value}})
        for name in ("memory_list", "memory_search", "memory_create", "memory_stats"):
            call = tool(name, **{field: value}, **{"memory_search": {"query": MARK}}.get(name, {}))
            yield Attempt("POST", "/v1/mcp", {"json": call})
            call["params"]["_meta"] = {field: value}
            yield Attempt("POST", "/v1/mcp", {"json": call})
    for tag in (None, MARK):  # a position in the other's list
        there = {"cursor": cursor} | ({} if tag is None else {"tag": tag})
        yield Attempt("GET", "/v1/memories", {"params": there})
        yield Attempt("POST", "/v1/mcp", {"json": tool("memory_list", **there)})
    for query in (
        MARK,
        f'"{MARK}"',
        f"{MARK[:6]}*",
        f"content:{MARK}",
        f"tags:{MARK}",
        f"plain OR {MARK}",
        f"NOT {MARK}",
        ids[0],
    ):
        yield Attempt("POST", "/v1/search", {"json": {"query": query}})
        yield Attempt("POST", "/v1/mcp", {"json": tool("memory_search", query=query)})
    for text in (MARK, f"' UNION SELECT * FROM '{b}'.memories --", f"../{b}/engram.db"):
        yield Attempt("GET", "/v1/memories", {"params": {"tag": text}})
        yield Attempt("POST", "/v1/search", {"json": {"query": "plain", "tags": [text]}})
        yield Attempt("POST", "/v1/search", {"json": {"query": "plain", "memory_type": text[:64]}})
        yield Attempt("POST", "/v1/mcp", {"json": tool("memory_list", tag=text)})
    month = {"from": "2020-01-01T00:00:00Z", "to": "2099-01-01T00:00:00Z"}
    for params in (
        {},
        month,
        month | {"tenant_id": b},
        {"tenant": b},
        {"from": b},
        month | {"to": f"2099-01-01' OR tenant_id='{b}"},
    ):
        yield Attempt("GET", "/v1/usage", {"params": params})
        yield Attempt("GET", "/v1/usage", {"params": params, "headers": [("X-Engram-Tenant", b)]})


def test_no_request_of_one_tenant_reads_changes_or_bills_another(stack: Stack) -> None:  # noqa: F811
    """Path, query, header, body, cursor, search terms, usage parameters, MCP arguments. What is not refused is
    answered as if the other had not been named."""
    a, b = stack.tenant(), stack.tenant()
    with stack.control_plane.transaction() as connection:
        connection.execute(
            "INSERT INTO usage_hourly (tenant_id, bucket, api_calls) VALUES (%s, date_trunc('hour', now()), %s)",
            (b, CALLS),
        )
    with stack.client(a) as mine, stack.client(b) as theirs:
        own = mine.post("/v1/memories", json={"content": "plain words"}).json()["id"]
        ids = [theirs.post("/v1/memories", json=marked(n)).json()["id"] for n in range(3)]
        cursor = theirs.get("/v1/memories", params={"limit": 2}).json()["next_cursor"]
        whole = state(stack, theirs, b)
        marks = [MARK, str(CALLS), b, *ids]
        assert all(mark in whole for mark in marks if mark != b), "the marks are there to be seen by their owner"
        usual = {json.dumps(read): mine.request(read[0], read[1], **read[2]) for read in reads(own)}
        tried = list(attempts(b, own, ids, cursor, stack.issuer.token(b)))
        assert len(tried) > 300
        for attempt in tried:
            options = dict(attempt.options or {})
            headers = [*mine.headers.items(), *options.pop("headers", [])]
            request = httpx.Request(attempt.method, stack.gateway.url + attempt.url, headers=headers, **options)
            response = mine.send(request)
            shown = f"{attempt} → {response.status_code} {response.text[:500]}"
            assert response.status_code < 500, shown
            assert not any(mark in response.text for mark in marks), shown
            assert b not in str(response.headers), shown
            if attempt.like is not None and response.is_success:
                assert response.json() == usual[json.dumps(attempt.like)].json(), shown
        assert state(stack, theirs, b) == whole
        assert mine.get(f"/v1/memories/{own}").json()["content"] == "plain words"


def marked(n: int) -> dict[str, Any]:
    return {
        "content": f"{MARK} content {n}",
        "tags": [MARK, f"tag-{MARK}"],
        "memory_type": MARK,
        "metadata": {MARK: {"deep": MARK}},
    }


def state(stack: Stack, theirs: httpx.Client, b: str) -> str:  # noqa: F811
    """All the owner sees, the files, and the events that are billed to it; its own look is not counted."""
    seen = [
        theirs.get("/v1/memories").json(),
        theirs.post("/v1/search", json={"query": MARK}).json(),
        theirs.get("/v1/usage").json()["api_calls"],
    ]
    foreign = [e for e in stack.gateway.events(b) if e.status >= 400]
    root = TenantPaths.of(stack.settings.tenants_dir, b).root
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.name.endswith(("-wal", "-shm")))
    return json.dumps([seen, len(foreign), files])
