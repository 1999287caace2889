"""Requests for a tenant of another machine: who answers them, who bills them, and what is refused."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from shared import limits, metering
from shared.settings import Settings
from tests.fly_proxy import REPLAY_LIMIT_BYTES
from tests.gateway_stack import assert_problem, eventually, gateway
from tests.mcp_session import within
from tests.routing_fixtures import BODY_LIMIT_BYTES, Fleet, Machine

pytest_plugins = ("tests.core_fixtures", "tests.routing_fixtures")


@pytest.fixture(autouse=True)
def _forget_hops(fleet: Fleet) -> None:
    fleet.hops()


def padded(content: str, size: int) -> bytes:
    """A good request whose body has that size."""
    return f'{{"content": "{content}"}}'.encode().ljust(size)


def test_a_tenant_of_another_machine_is_served_there_and_billed_there_once(fleet: Fleet) -> None:
    """Reads, writes, deletions and the tenant's own usage; the machine they arrived at counts none of them."""
    tenant = fleet.tenant(fleet.two)
    one, two = (m.gateway.metric("engram_requests_total", route="/v1/memories") for m in (fleet.one, fleet.two))
    routed = fleet.one.gateway.metric("engram_requests_routed_total", how="replay")
    with fleet.client(tenant) as api:
        made = api.post("/v1/memories", json={"content": "kept there"})
        assert made.status_code == 201
        path = f"/v1/memories/{made.json()['id']}"
        assert api.get(path).json() == made.json()
        assert api.get("/v1/memories", params={"limit": 5}).json()["memories"] == [made.json()]
        assert api.post("/v1/search", json={"query": "kept"}).json()["count"] == 1
        assert api.get("/v1/usage").status_code == 200
        assert api.delete(path).status_code == 204
    statuses = [201, 200, 200, 200, 200, 204]
    assert fleet.hops() == [hop for s in statuses for hop in (("engram-data-1", 421), ("engram-data-2", s))]
    assert (fleet.one.events(tenant), fleet.two.events(tenant)) == (0, 6)
    assert fleet.one.gateway.metric("engram_requests_routed_total", how="replay") == routed + 6
    assert fleet.one.gateway.metric("engram_requests_total", route="/v1/memories") == one
    assert fleet.two.gateway.metric("engram_requests_total", route="/v1/memories") == two + 2
    line = fleet.two.gateway.access_line(made.headers["x-request-id"])
    assert line["status"] == 201 and line["tenant_id"] == tenant
    assert "fly-replay" not in made.headers

    eventually(lambda: all(_drained(fleet, m) for m in (fleet.one, fleet.two)) and len(_rows(fleet, tenant)) == 6)
    assert _rows(fleet, tenant).count(made.headers["x-request-id"]) == 1


def _drained(fleet: Fleet, machine: Machine) -> bool:
    return all(d is not None for d in metering.drain_all(fleet.control_plane, machine.settings))


def _rows(fleet: Fleet, tenant_id: str) -> list[str]:
    with fleet.control_plane.transaction() as connection:
        rows = connection.execute("SELECT request_id FROM usage_events WHERE tenant_id = %s", (tenant_id,)).fetchall()
    return [str(row["request_id"]) for row in rows]


def test_what_is_asked_of_the_proxy_is_in_its_documented_form(fleet: Fleet) -> None:
    """App by machine, our own id as state, a time limit, and the way back when nobody is there."""
    with fleet.client(fleet.tenant(fleet.two)) as api:
        assert api.get("/v1/memories").status_code == 200
    asked, done = fleet.proxy.hops
    assert asked.replay == {"app": "engram-data-2", "state": "data-1", "timeout": "5s", "fallback": "force_self"}
    assert "state=data-1" in done.head["fly-replay-src"]


def test_mcp_tools_of_a_tenant_of_another_machine(fleet: Fleet) -> None:
    """The official client through the proxy; both databases are asked afterwards."""
    tenant = fleet.tenant(fleet.two)

    async def work(mcp: Any) -> None:
        made = await mcp.ok("memory_create", content="by a tool")
        assert (await mcp.ok("memory_search", query="tool"))["results"][0]["memory"]["id"] == made["id"]

    through_the_proxy = SimpleNamespace(
        gateway=SimpleNamespace(url=fleet.proxy.url),
        headers=lambda tenant_id: {"Authorization": f"Bearer {fleet.issuer.token(tenant_id)}"},
    )
    within(through_the_proxy, tenant, work)  # type: ignore[arg-type]
    apps = {app for app, _ in fleet.hops()}
    assert apps == {"engram-data-1", "engram-data-2"}
    assert fleet.one.events(tenant) == 0
    assert sum(e.memories_created for e in fleet.two.gateway.events(tenant)) == 1


def test_a_body_that_the_proxy_can_repeat_is_left_to_it(fleet: Fleet) -> None:
    """Up to `routing_replay_bytes`, though the proxy has read all of it before it hears where it belongs."""
    with fleet.client(fleet.tenant(fleet.two)) as api:
        body = padded("not so large", Settings().routing_replay_bytes)
        assert api.post("/v1/memories", content=body, headers={"content-type": "application/json"}).status_code == 201
        assert fleet.hops() == [("engram-data-1", 421), ("engram-data-2", 201)]


@pytest.mark.parametrize("chunked", [False, True])
def test_what_the_proxy_cannot_repeat_is_forwarded_over_the_private_network(fleet: Fleet, chunked: bool) -> None:
    """Larger than 1 MB, or of a length nobody announced: asked for a replay, the proxy would only have an error."""
    tenant = fleet.tenant(fleet.two)
    body = padded("large", REPLAY_LIMIT_BYTES + 500_000)
    with fleet.client(tenant) as api:
        content = iter([body]) if chunked else body
        made = api.post("/v1/memories", content=content, headers={"content-type": "application/json"})
        assert made.status_code == 201, made.text
        assert fleet.hops() == [("engram-data-1", 201)]
        assert api.get(f"/v1/memories/{made.json()['id']}").json() == made.json()
    assert (fleet.one.events(tenant), fleet.two.events(tenant)) == (0, 2)
    assert made.headers.get_list("x-request-id") == [made.headers["x-request-id"]]
    assert made.headers.get_list("content-security-policy") == ["default-src 'none'; frame-ancestors 'none'"]
    there = fleet.two.gateway.access_line(made.headers["x-request-id"])
    assert there["status"] == 201 and there["client"] == "192.0.2.7", "the client's address as the first gateway saw it"
    assert fleet.one.gateway.metric("engram_requests_routed_total", how="forward") >= 1


def test_without_an_address_what_cannot_be_repeated_is_refused_with_the_reason(fleet: Fleet) -> None:
    """413 and 411 from us, not the proxy's 502; what is too large for any machine is 413 too."""
    tenant = fleet.tenant(fleet.one)
    fleet.route(tenant, "data-4")
    fleet.teach(fleet.one)
    json_type = {"content-type": "application/json"}
    with fleet.client(tenant) as api:
        large = assert_problem(api.post("/v1/memories", content=padded("x", 1_500_000), headers=json_type), 413)
        assert "950000 bytes" in large["detail"]
        assert_problem(api.post("/v1/memories", content=iter([b"{}"]), headers=json_type), 411)
        huge = assert_problem(
            api.post("/v1/memories", content=padded("x", BODY_LIMIT_BYTES + 1), headers=json_type), 413
        )
        assert f"{BODY_LIMIT_BYTES} bytes" in huge["detail"]
    assert [status for _, status in fleet.hops()] == [413, 411, 413]
    assert fleet.one.events(tenant) == 0


def test_the_decision_is_taken_from_the_head(fleet: Fleet) -> None:
    """A client that waits for leave to send its body hears where it belongs without having sent any of it."""
    tenant = fleet.tenant(fleet.two)
    fleet.teach(fleet.one)
    head = (
        f"POST /v1/memories HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {fleet.issuer.token(tenant)}\r\n"
        "Content-Type: application/json\r\nContent-Length: 900000\r\nExpect: 100-continue\r\n\r\n"
    )
    port = int(fleet.one.gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(65_536).decode("latin-1").lower()
    assert answer.startswith("http/1.1 421 ") and "fly-replay: app=engram-data-2;" in answer


def test_a_target_that_knows_less_than_the_source_looks_again_and_serves(fleet: Fleet) -> None:
    """After a move: no 503 for a client, though the new machine's gateway last read that the tenant was elsewhere."""
    tenant = fleet.tenant(fleet.one)
    fleet.teach(fleet.two)
    here, there = (m.settings.tenants_dir / tenant for m in (fleet.one, fleet.two))
    shutil.move(here, there)
    fleet.route(tenant, "data-2")
    fleet.teach(fleet.one)
    with fleet.client(tenant) as api:
        assert api.post("/v1/memories", json={"content": "moved"}).status_code == 201
        assert fleet.hops() == [("engram-data-1", 421), ("engram-data-2", 201)]


def test_machines_that_disagree_pass_a_request_on_once(fleet: Fleet) -> None:
    """Each thinks that the other has the tenant: 503 with Retry-After from the second, by a replay and by a forward."""
    tenant = fleet.tenant(fleet.two)
    fleet.teach(fleet.one)
    fleet.route(tenant, "data-1")
    refused = fleet.two.unrouted("disagreement")
    with fleet.client(tenant) as api:
        told = assert_problem(api.get("/v1/memories"), 503)
        assert told["reason"] == "machines disagree" and told["retry_after"] >= 1
        assert fleet.hops() == [("engram-data-1", 421), ("engram-data-2", 503)]
        headers = {"content-type": "application/json"}
        large = api.post("/v1/memories", content=padded("x", 1_500_000), headers=headers)
        assert assert_problem(large, 503)["reason"] == "machines disagree"
        assert fleet.hops() == [("engram-data-1", 503)]
    assert fleet.two.unrouted("disagreement") == refused + 2
    assert (fleet.one.events(tenant), fleet.two.events(tenant)) == (0, 0)


def test_a_machine_that_is_gone_is_a_503_and_not_the_proxys_error(fleet: Fleet) -> None:
    """By a replay the request comes back, and is not sent out again; by a forward nobody answers."""
    tenant = fleet.tenant(fleet.one)
    fleet.route(tenant, "data-3")
    fleet.teach(fleet.one)
    with fleet.client(tenant) as api:
        small = assert_problem(api.post("/v1/memories", json={"content": "x"}), 503)
        assert small["reason"] == "machine unreachable"
        assert fleet.hops() == [("engram-data-1", 421), ("engram-data-3", 0), ("engram-data-1", 503)]
        headers = {"content-type": "application/json"}
        large = api.post("/v1/memories", content=padded("x", 1_500_000), headers=headers)
        assert assert_problem(large, 503)["reason"] == "machine unreachable"
        assert fleet.hops() == [("engram-data-1", 503)]


def test_a_request_without_a_good_token_is_answered_where_it_arrives(fleet: Fleet) -> None:
    """A flood of them costs the other machines nothing, whatever tenant they name."""
    tenant = fleet.tenant(fleet.two)
    routed = fleet.one.gateway.metric("engram_requests_routed_total")
    with fleet.client(tenant) as good, fleet.client(tenant, exp=1) as expired:
        good.get("/v1/memories")
        fleet.hops()
        forged = good.headers["Authorization"][:-6] + "AAAAAA"
        for headers in (
            {"Authorization": forged},
            {"Authorization": ""},
            {"Authorization": forged, "fly-replay-src": "t=1"},
        ):
            assert_problem(good.get("/v1/memories", headers=headers), 401)
        assert_problem(expired.post("/v1/memories", content=padded("x", 1_500_000)), 401)
    assert fleet.hops() == [("engram-data-1", 401)] * 4
    assert fleet.one.gateway.metric("engram_requests_routed_total") == routed + 1


def test_fields_a_client_invents_choose_no_machine_and_open_nothing(fleet: Fleet) -> None:
    """The machine is the control plane's. To say that a request was passed on already only has it refused."""
    mine, other = fleet.tenant(fleet.one), fleet.tenant(fleet.two)
    invented = {
        "fly-replay": "app=engram-data-1",
        "fly-prefer-region": "syd",
        "fly-force-instance-id": "of-engram-data-1",
        "x-engram-machine": "data-1",
    }
    marks = ("fly-replay-src", "fly-replay-failed", "x-engram-forwarded-by")
    with fleet.client(mine) as api:
        for name in marks:
            assert api.get("/v1/memories", headers={name: "instance=x;state=data-2"}).status_code == 200
        assert fleet.hops() == [("engram-data-1", 200)] * 3
    with fleet.client(other) as api:
        assert api.get("/v1/memories", headers=invented).status_code == 200
        assert fleet.hops() == [("engram-data-1", 421), ("engram-data-2", 200)]
        for name in marks:
            assert_problem(api.get("/v1/memories", headers={name: "state=data-2"}), 503)
        assert fleet.hops() == [("engram-data-1", 503)] * 3
        limits.set_limit(
            fleet.one.settings, f"rate_limit:{other}", {"rps": 0.01, "burst": 1}, ttl_seconds=60, reason="t"
        )
        try:
            refused = eventually(
                lambda: (r := api.get("/v1/memories", headers={marks[0]: "x"})).status_code == 429 and r
            )
            assert refused.headers["ratelimit-limit"] == "1"
            assert api.get("/v1/memories").status_code == 200, "its rate is the other machine's"
        finally:
            limits.clear(fleet.one.settings, f"rate_limit:{other}")


def test_who_came_around_the_proxy_is_forwarded_or_told_to_go_elsewhere(fleet: Fleet) -> None:
    """Without a proxy that carries it out, `fly-replay` is an empty promise. Forwarding needs no Fly at all."""
    tenant = fleet.tenant(fleet.two)
    with fleet.client(tenant, fleet.three.gateway.url) as api:
        made = api.post("/v1/memories", json={"content": "without Fly"})
        assert made.status_code == 201 and "fly-replay" not in made.headers
        assert api.get(f"/v1/memories/{made.json()['id']}?x=%41").json() == made.json()
        missing = assert_problem(api.get("/v1/memories/00000000-0000-7000-8000-000000000000"), 404)
        assert fleet.two.gateway.access_line(missing["request_id"])["status"] == 404
        assert api.get("/v1/memories", headers={"X-Engram-Tenant": "another"}).status_code == 403
        with fleet.client(tenant, fleet.two.gateway.url) as directly:
            for path in ("/v1/memories/a%20b%3f", "/v1/memories/\u00e4", "/v1/memories?limit=0&x=%2f+y"):
                answers = [client.get(path) for client in (api, directly)]
                assert answers[0].status_code == answers[1].status_code in (400, 404)
                assert answers[0].json()["detail"] == answers[1].json()["detail"]
    assert (fleet.three.events(tenant), fleet.two.events(tenant)) == (0, 4 + 6)
    assert fleet.three.gateway.metric("engram_requests_routed_total", how="forward") == 4 + 3
    fleet.route(tenant, "data-7")
    fleet.teach(fleet.three)
    with fleet.client(tenant, fleet.three.gateway.url) as api:
        assert assert_problem(api.get("/v1/memories"), 503)["reason"] == "machine unreachable"


def test_a_gateway_that_routes_nothing_says_so_and_touches_nothing(fleet: Fleet, core_url: str, tmp_path: Path) -> None:
    """421: before, it was 503 for a missing database, or the data a tenant had here before it was moved."""
    tenant = fleet.tenant(fleet.two)
    shutil.copytree(fleet.two.settings.tenants_dir / tenant, tmp_path / "tenants" / tenant, symlinks=True)
    wildcard = {"gateway_host": "::", "trusted_proxies": "127.0.0.1/32"}  # as on Fly: IPv4 and IPv6 by one socket
    with gateway(tmp_path, core_url, fleet.issuer, machine_id="data-8", gateway_workers=1, **wildcard) as alone:
        with fleet.client(tenant, alone.url) as api:
            for response in (api.get("/v1/memories"), api.post("/v1/memories", json={"content": "x"})):
                assert assert_problem(response, 421)["reason"] == "other machine"
            assert_problem(api.get("/v1/memories", headers={"fly-replay-src": "t=1"}), 503)
        assert alone.events(tenant) == [] and alone.metric("engram_db_open_failures_total") == 0
        assert alone.metric("engram_requests_unrouted_total", reason="off") == 2
        answer = alone.client.get("/v1/memories", headers={"x-forwarded-for": "192.0.2.9"})
        assert alone.access_line(answer.headers["x-request-id"])["client"] == "192.0.2.9", "IPv4 seen through IPv6"
        assert httpx.get(alone.url.replace("127.0.0.1", "[::1]") + "/health", trust_env=False).status_code == 200


def test_only_names_fit_for_a_header_and_a_host_lead_anywhere(fleet: Fleet) -> None:
    """The control plane is trusted, and all the same no row of it splits a header or names a path."""
    for machine_id in ("data-1\r\nx: y", "data 1", "../x", "data-1@evil.test", ""):
        tenant = fleet.tenant(fleet.one)
        fleet.route(tenant, machine_id)
        fleet.teach(fleet.one)
        fleet.teach(fleet.three)
        for url in (fleet.one.gateway.url, fleet.three.gateway.url):
            with fleet.client(tenant, url) as api:
                assert_problem(api.get("/v1/memories"), 421)
