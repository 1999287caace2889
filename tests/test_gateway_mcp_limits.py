"""MCP stands behind the limits and the guard of REST: places, quotas, origins, sizes, the log."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.exchange import Exchange
from gateway.mcp import tools
from gateway.mcp.route import Origins
from gateway.mcp.tools import Call, change_place
from gateway.problems import CLIENT_LEFT, Refusal
from gateway.shed import Gate
from shared import limits, registry
from shared.limits import Watch
from shared.settings import Settings
from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401
from tests.mcp_session import PING, Session, within


def test_limits_of_a_class_of_routes_hold_for_its_tools_too(stack: Stack) -> None:  # noqa: F811
    """An operator's shedding and a rate for searches: a way around them would be MCP. Other tools go on."""
    tenant = stack.tenant()
    rate = {"rps": 0, "search_rps": 0.001}

    async def work(mcp: Session) -> None:
        await mcp.ok("memory_create", content="x")
        limits.set_limit(stack.settings, f"rate_limit:{tenant}", rate, ttl_seconds=60, reason="test")

        async def refused(status: int, reason: str) -> None:
            for _ in range(200):
                result = await mcp.client.call_tool("memory_search", {"query": "x"})
                if result.is_error:
                    problem = json.loads(result.content[0].text)
                    assert (problem["status"], problem["reason"]) == (status, reason)
                    assert problem["retry_after"] >= 1
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("never refused")

        try:
            await refused(429, "rate limited")
            assert (await mcp.ok("memory_list"))["memories"]
        finally:
            limits.clear(stack.settings, f"rate_limit:{tenant}")
        limits.set_limit(stack.settings, "shed", ["list"], ttl_seconds=60, reason="test")
        try:
            for _ in range(200):
                shed = await mcp.client.call_tool("memory_stats", {})
                if shed.is_error:
                    break
                await asyncio.sleep(0.05)
            assert json.loads(shed.content[0].text)["reason"] == "shed"
            await mcp.ok("memory_create", content="y")
        finally:
            limits.clear(stack.settings, "shed")

    within(stack, tenant, work)
    refusals = [e for e in stack.gateway.events(tenant) if e.status in (429, 503)]
    assert len(refusals) >= 2 and not any(e.api_calls or e.search_queries for e in refusals)


def test_a_batch_takes_as_many_places_of_the_write_rate_as_it_has_parts(stack: Stack) -> None:  # noqa: F811
    """Or the rate would hold for everybody but those who send a hundred at a time."""
    tenant = stack.tenant()
    seconds_a_write = 1_000
    rate = {"rps": 0, "write_rps": 1 / seconds_a_write}
    limits.set_limit(stack.settings, f"rate_limit:{tenant}", rate, ttl_seconds=60, reason="test")

    async def work(mcp: Session) -> None:
        for _ in range(200):  # until each worker has heard of the rate, and one batch was granted under it
            result = await mcp.client.call_tool("memory_create_batch", {"memories": [{"content": "x"}] * 3})
            if result.is_error:
                break
            await asyncio.sleep(0.05)
        problem = json.loads(result.content[0].text)
        assert problem["status"] == 429 and 2 * seconds_a_write < problem["retry_after"] <= 3 * seconds_a_write

    try:
        within(stack, tenant, work)
    finally:
        limits.clear(stack.settings, f"rate_limit:{tenant}")  # the stack is other tests' too


def test_a_used_up_quota_refuses_the_tools_that_draw_on_it(stack: Stack) -> None:  # noqa: F811
    """402 as a tool error, with the counter; what draws on another counter is served. A batch counts as its parts
    before it runs: four where three are allowed are refused, three are not."""
    with stack.control_plane.transaction() as connection:
        connection.execute(
            "INSERT INTO plans (plan_id, search_queries_hard, memories_created_hard)"
            " VALUES ('mcp-nothing', 0, 0), ('mcp-three', NULL, 3)"
        )
    three = f"{stack.tenant()}-three"  # in the first snapshot that holds the poor one too
    registry.create(stack.control_plane, stack.settings, three, plan_id="mcp-three")
    tenant = f"{stack.tenant()}-poor"
    registry.create(stack.control_plane, stack.settings, tenant, plan_id="mcp-nothing")

    async def work(mcp: Session) -> None:
        for tool, arguments, metric in (
            ("memory_search", {"query": "x"}, "search_queries"),
            ("memory_create", {"content": "x"}, "memories_created"),
            ("memory_create_batch", {"memories": [{"content": "x"}]}, "memories_created"),
        ):
            in_a_row = 0
            for _ in range(600):  # each worker reads the plans on its own
                result = await mcp.client.call_tool(tool, arguments)
                in_a_row = in_a_row + 1 if result.is_error else 0
                if in_a_row == 5:
                    break
                await asyncio.sleep(0.05)
            problem = json.loads(result.content[0].text)
            assert problem["status"] == 402 and problem["metric"] == metric and problem["limit"] == 0
        await mcp.ok("memory_list")

    within(stack, tenant, work)

    def search() -> int:
        """Over a connection of its own, so by either worker."""
        headers = stack.headers(tenant)
        url = f"{stack.gateway.url}/v1/search"
        return httpx.post(url, json={"query": "x"}, headers=headers, trust_env=False, timeout=30).status_code

    eventually(lambda: {search() for _ in range(24)} == {402})

    async def batches(mcp: Session) -> None:
        memories = [{"content": "x"}] * 4
        for _ in range(4):
            problem = await mcp.problem("memory_create_batch", 402, memories=memories)
            assert (problem["metric"], problem["current"], problem["limit"]) == ("memories_created", 0, 3)
            assert "4 more" in problem["detail"]
        assert (await mcp.ok("memory_stats"))["memories"] == 0
        assert (await mcp.ok("memory_create_batch", memories=memories[:3]))["count"] == 3

    within(stack, three, batches)


def test_a_tool_takes_a_place_of_its_own_class() -> None:
    """Where half of the places are taken a search waits and a lookup does not; whose request is over takes none."""

    async def test() -> None:
        settings = Settings(inflight_requests=4, inflight_wait_seconds=0.05)
        gate = Gate(settings, Watch(settings))
        services = SimpleNamespace(gate=gate)
        calls = []
        for _ in range(3):
            exchange = Exchange("POST")
            exchange.tenant_id, exchange.leave = "acme", await gate.enter("acme", "get")
            calls.append(Call(services, exchange))  # type: ignore[arg-type]
        first, second, third = calls
        await change_place(tools.TOOLS["memory_get"].cost, first)
        with pytest.raises(Refusal) as refused:
            await change_place(tools.TOOLS["memory_search"].cost, second)
        assert refused.value.problem.reason == "shed" and second.exchange.leave is None, "and has given back its own"
        third.exchange.status = CLIENT_LEFT.status
        with pytest.raises(Refusal):
            await change_place(tools.TOOLS["memory_get"].cost, third)
        with pytest.raises(Refusal):
            await change_place(tools.TOOLS["memory_get"].cost, third)
        assert first.exchange.leave is not None
        first.exchange.leave()
        for leave in [await gate.enter("acme", "get") for _ in range(4)]:  # all four are free again
            leave()

    asyncio.run(test())


def test_the_guard_of_rest_stands_before_mcp(stack: Stack) -> None:  # noqa: F811
    """No token, another audience, a suspended tenant, a tenant header: the same answers, in the same order."""
    tenant, url = stack.tenant(), "/v1/mcp"
    anonymous = assert_problem(stack.gateway.client.post(url, json=PING), 401)
    rest = assert_problem(stack.gateway.client.get("/v1/memories"), 401)
    assert anonymous["detail"] == rest["detail"]
    assert_problem(stack.gateway.client.post(url, content=b"x" * 600_000), 401)
    with stack.client(tenant, aud="other") as api:
        assert_problem(api.post(url, json=PING), 401)
    with stack.client("never-created") as api:
        assert_problem(api.post(url, json=PING), 403)
    with stack.client(tenant) as api:
        assert_problem(api.post(url, json=PING, headers={"X-Engram-Tenant": "other"}), 403)
        assert api.post(url, json=PING, headers={"X-Engram-Tenant": tenant}).json()["result"] == {}
        registry.suspend(stack.control_plane, tenant)
        eventually(lambda: all(api.post(url, json=PING).status_code == 403 for _ in range(5)))


def test_only_known_origins_may_call(stack: Stack) -> None:  # noqa: F811
    """A page elsewhere cannot, nor one whose name was rebound to this address; no Origin is no browser."""
    where = stack.gateway.url.removeprefix("http://")
    with stack.client(stack.idle_tenant) as api:

        def status(**headers: str) -> int:
            response = api.post("/v1/mcp", json=PING, headers=headers)
            if response.status_code != 200:
                assert_problem(response, response.status_code)
            return response.status_code

        assert status() == 200
        assert status(Origin=f"http://{where}") == 200
        for foreign in ("https://evil.example", "null", "", f"http://{where}.evil.example", "file://"):
            assert status(Origin=foreign) == 403, foreign
        assert status(Origin="http://evil.example", Host="evil.example") == 403
        assert status(Origin="http://evil.example:80", Host=where) == 403


def test_origins_are_judged_by_what_was_configured() -> None:
    """Outside dev localhost is nobody special; a public gateway takes the host that was asked for."""
    public = Origins(
        Settings(env="prod", gateway_host="0.0.0.0", cors_allowed_origins="https://app.example.com, https://b.example/")
    )
    assert public.allows("https://app.example.com", "api.example.com")
    assert public.allows("https://b.example", "api.example.com")
    assert public.allows("https://api.example.com", "API.example.com")
    for foreign in ("http://app.example.com", "https://app.example.com.evil", "http://localhost:6274", "null"):
        assert not public.allows(foreign, "api.example.com"), foreign
    local = Origins(Settings(env="dev", gateway_host="127.0.0.1"))
    assert local.allows("http://localhost:6274", "127.0.0.1:8080")
    assert not local.allows("http://localhost:6274", "evil.example:8080")
    assert not local.allows("http://evil.example:8080", "evil.example:8080")


def test_what_is_no_mcp_request_is_a_problem_document(stack: Stack) -> None:  # noqa: F811
    """Without sessions there is no stream to GET and nothing to DELETE; bodies are judged as REST's are."""
    with stack.client(stack.idle_tenant) as api:
        for method in ("GET", "DELETE", "PUT"):
            refused = api.request(method, "/v1/mcp", headers={"Accept": "text/event-stream"})
            assert_problem(refused, 405)
            assert "POST" in refused.headers["allow"]
        assert_problem(api.post("/v1/mcp/x", json=PING), 404)
        json_type = {"Content-Type": "application/json"}
        for bad in (b"", b"{", b"[]", b"[{}]", b"null", b"{}", b'{"jsonrpc":"1.0"}', b'{"a":"\xff"}', b"[" * 200_000):
            assert_problem(api.post("/v1/mcp", content=bad, headers=json_type), 400)
        surrogate = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":{"a":"\\ud800"}}}'
        assert_problem(api.post("/v1/mcp", content=surrogate, headers=json_type), 400)
        assert_problem(api.post("/v1/mcp", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
        assert_problem(api.post("/v1/mcp", content=b" " * 600_000, headers=json_type), 413)
        assert_problem(api.post("/v1/mcp", json=PING, headers={"Accept": "text/html"}), 406)
        for accepted in ("*/*", "application/json", "text/event-stream, application/json;q=0.5"):
            assert api.post("/v1/mcp", json=PING, headers={"Accept": accepted}).json()["result"] == {}
        unknown = api.post("/v1/mcp", json={**PING, "method": "memories/drop"})
        assert unknown.json()["error"]["code"] == -32601


NOT_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("null", {"id": None, "method": "tools/call", "params": {"name": "memory_create", "arguments": {"content": "x"}}}),
    ("null", {"id": None, "method": "ping"}),
    ("method", {"id": 1}),
    ("method", {"id": "sesame", "params": {}}),
    ("id", {"result": {}}),
    ("id", {"id": None, "result": {}}),
    ("id", {"error": {"code": 1, "message": "m"}}),
    ("result", {"id": 1, "result": "sesame"}),
    ("code", {"id": 1, "error": {"message": "sesame"}}),
)


@pytest.mark.parametrize("revision", [None, "2025-11-25", "2026-07-28"])
def test_what_is_neither_request_nor_answer_is_refused_here_and_nothing_of_it_is_done(
    stack: Stack,  # noqa: F811
    revision: str | None,
) -> None:
    """The SDK took a null id for a notification's (202, and the tool was not called), and showed its library's text."""
    headers = {} if revision is None else {"Mcp-Protocol-Version": revision}
    with stack.client(stack.idle_tenant) as api:
        for named, message in NOT_REQUESTS:
            refused = api.post("/v1/mcp", json={"jsonrpc": "2.0", **message}, headers=headers)
            detail = assert_problem(refused, 400)["detail"]
            assert named in detail and "pydantic" not in refused.text and "sesame" not in refused.text
        assert api.get("/v1/memories").json()["memories"] == []
        for answer in ({"id": 1, "result": {}}, {"id": None, "error": {"code": 1, "message": "m", "data": 2}}):
            if revision != "2026-07-28":  # which has clients answer nothing
                assert api.post("/v1/mcp", json={"jsonrpc": "2.0", **answer}, headers=headers).status_code == 202


def test_a_list_of_long_memories_comes_in_short_pages_and_a_search_finds_fewer(stack: Stack) -> None:  # noqa: F811
    """Two hundred memories may be 20 MB; over REST and MCP alike all of them are there in the end."""
    tenant, count = stack.tenant(), 24

    async def pages(mcp: Session) -> list[int]:
        sizes, more = [], {}
        while True:
            page = await mcp.ok("memory_list", limit=200, **more)
            sizes.append(len(page["memories"]))
            if page["next_cursor"] is None:
                return sizes
            more = {"cursor": page["next_cursor"]}

    async def work(mcp: Session) -> None:
        for _ in range(count // 4):
            await mcp.ok("memory_create_batch", memories=[{"content": "word " + "x" * 99_000}] * 4)
        assert await pages(mcp) == [10, 10, 4]
        assert (await mcp.ok("memory_search", query="word", limit=100))["count"] == 10

    within(stack, tenant, work)
    with stack.client(tenant) as api:
        page = api.get("/v1/memories", params={"limit": 200})
        assert len(page.json()["memories"]) == 10 and len(page.content) <= Settings().answer_limit_bytes
        found = api.post("/v1/search", json={"query": "word", "limit": 100})
        assert found.json()["count"] == 10 and len(found.content) <= Settings().answer_limit_bytes


def test_what_a_client_writes_never_stands_for_a_result(stack: Stack) -> None:  # noqa: F811
    """Its id and its memories come back as they were sent, also with what JSON has to escape."""
    content = 'a "quoted" \\ line\nand {"mark":0} \u2028 é'
    with stack.client(stack.tenant()) as api:
        arguments = {"name": "memory_create", "arguments": {"content": content}}
        sent = {"jsonrpc": "2.0", "id": '{"mark":0}', "method": "tools/call", "params": arguments}
        answer = api.post("/v1/mcp", json=sent).json()
    assert answer["id"] == '{"mark":0}'
    assert answer["result"]["structuredContent"]["content"] == content
    assert json.loads(answer["result"]["content"][0]["text"]) == answer["result"]["structuredContent"]


def test_rest_is_served_while_mcp_answers_are_made(stack: Stack) -> None:  # noqa: F811
    """Both share the tenant's pool: neither waits for the other's turn for ever, and all succeed."""
    tenant = stack.tenant()
    statuses: list[int] = []

    def rest() -> None:
        with stack.client(tenant) as api:
            statuses.extend(api.post("/v1/memories", json={"content": "rest"}).status_code for _ in range(30))

    thread = threading.Thread(target=rest)

    async def work(mcp: Session) -> None:
        thread.start()
        await asyncio.gather(*(mcp.ok("memory_create", content="mcp") for _ in range(30)))
        await asyncio.to_thread(thread.join)
        assert (await mcp.ok("memory_stats"))["memories"] == 60

    within(stack, tenant, work)
    assert statuses == [201] * 30


def test_what_the_sdk_logs_is_json_without_what_a_client_sent(stack: Stack) -> None:  # noqa: F811
    """Its own logging would be plain text with the message's content in it."""
    with stack.client(stack.idle_tenant) as api:
        message = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"secret": "sesame"}}
        assert api.post("/v1/mcp", json=message).status_code == 202
        answered = api.post("/v1/mcp", json=PING)
    stack.gateway.access_line(answered.headers["x-request-id"])
    assert all("event" in line for line in stack.gateway.log())
    assert "sesame" not in stack.gateway.log_path.read_text()
