"""Rate limits: exact over all workers, and never the wrong one's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway import buckets
from gateway.buckets import Decision
from gateway.ratelimit import FORGED_TENANTS, RateLimiter
from shared.limits import Watch, clear, set_limit
from shared.settings import Settings
from tests.gateway_stack import Gateway, Stack, assert_problem, eventually, gateway, new_key, sign, stack  # noqa: F401

SLOW = 0.001  # requests a second: nothing comes back while a test runs


def limiter(tmp_path: Path, **settings: Any) -> RateLimiter:
    configured = Settings(data_dir=tmp_path, **settings)
    watch = Watch(configured)
    watch.poll()
    return RateLimiter(configured, watch)


def granted(limit: RateLimiter, tries: int, tenant: str = "acme", rate_class: Any = "read") -> int:
    decisions = [limit.tenant(tenant, rate_class) for _ in range(tries)]
    return sum(d is None or d.allowed for d in decisions)


def test_a_burst_is_granted_at_once_and_then_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly; what was saved up while nobody asked is never more than the burst."""
    clock = SimpleNamespace(monotonic=lambda: now)
    now = 1_000.0
    monkeypatch.setattr(buckets, "time", clock)
    limit = limiter(tmp_path, rate_limit_rps=200, rate_limit_burst=10)
    assert granted(limit, 50) == 10
    for _ in range(100):
        now += 0.0025
        assert granted(limit, 5) == 0
        now += 0.0025
        assert granted(limit, 5) == 1
    now += 3_600
    assert granted(limit, 50) == 10


def test_a_refusal_says_when_to_come_again_and_costs_no_place(tmp_path: Path) -> None:
    """However often a client asks in vain, its next place comes at the same moment."""
    limit = limiter(tmp_path, rate_limit_rps=SLOW, rate_limit_burst=2)
    first = limit.tenant("acme", "read")
    assert first is not None and first.allowed and first.remaining == 1
    assert dict(first.headers())[b"ratelimit-limit"] == b"2"
    assert granted(limit, 50) == 1
    refused = limit.tenant("acme", "read")
    assert refused is not None and not refused.allowed and refused.remaining == 0
    assert 990 <= refused.retry_after <= 1_000


def test_tenants_have_buckets_of_their_own_and_classes_share_their_tenants(tmp_path: Path) -> None:
    """A class with a rate of its own is bounded by both; what the class refuses costs the tenant nothing."""
    limit = limiter(tmp_path, rate_limit_rps=SLOW, rate_limit_burst=10, rate_limit_search_rps=SLOW / 5)
    assert granted(limit, 20, "acme", "search") == 2
    assert granted(limit, 20, "acme", "write") == 8
    assert granted(limit, 20, "acme", "") == 0
    assert granted(limit, 20, "other", "read") == 10


def test_a_batch_takes_a_place_for_each_of_its_parts_or_none(tmp_path: Path) -> None:
    """Of the tenant's bucket and of its class's. A refusal gives back what the guard took, and says when all of them
    would be there; where that is never, it says that."""
    limit = limiter(tmp_path, rate_limit_rps=SLOW, rate_limit_burst=10, rate_limit_write_rps=SLOW / 2)

    def batch(tenant: str, parts: int) -> Decision | None:
        first = limit.tenant(tenant, "")
        assert first is not None and first.allowed
        return limit.within(tenant, "write", parts)

    refused = [batch("acme", 11) for _ in range(30)]
    assert all(d is not None and d.never and d.bucket.size == 10 for d in refused)
    taken = batch("acme", 4)
    assert taken is not None and taken.allowed and taken.remaining == 1, "of the five that writes may take"
    for _ in range(30):
        missing = batch("acme", 2)
        assert missing is not None and not missing.allowed and not missing.never
        assert 1_990 <= missing.retry_after <= 2_000, "one write"
    assert granted(limit, 20) == 6

    assert batch("large", 8), "a class's bucket may be overdrawn"
    assert granted(limit, 20, "large", "write") == 0 and granted(limit, 20, "large") == 2


@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_a_batch_is_refused_only_where_the_rate_is_enforced(tmp_path: Path, mode: str) -> None:
    """In shadow it is counted, in off not even that."""
    limit = limiter(tmp_path, rate_limit_rps=SLOW, rate_limit_burst=3, rate_limit_mode=mode)
    assert all(limit.tenant("acme", "") is None and limit.within("acme", "write", 5) is None for _ in range(5))


def test_off_is_off(tmp_path: Path) -> None:
    """By default, by mode, and by an override of one tenant."""
    assert granted(limiter(tmp_path / "a"), 1_000) == 1_000
    assert granted(limiter(tmp_path / "b", rate_limit_rps=SLOW, rate_limit_mode="off"), 100) == 100
    settings = Settings(data_dir=tmp_path / "c")
    set_limit(settings, "rate_limit:free", {"rps": 0}, ttl_seconds=60, reason="r")
    limit = limiter(tmp_path / "c", rate_limit_rps=SLOW)
    assert granted(limit, 100, "free") == 100 and granted(limit, 100) == 1


def test_a_limit_raised_at_run_time_works_at_once_for_a_tenant_that_was_refused(tmp_path: Path) -> None:
    """Its debt under the old limit is not carried into the new one, and is still there when that ends."""
    settings = Settings(data_dir=tmp_path, rate_limit_rps=SLOW, rate_limit_burst=1)
    watch = Watch(settings)
    limit = RateLimiter(settings, watch)
    assert granted(limit, 5) == 1
    set_limit(settings, "rate_limit:acme", {"rps": 1_000, "burst": 500}, ttl_seconds=60, reason="r")
    watch.poll()
    assert granted(limit, 5) == 5
    clear(settings, "rate_limit:acme")
    watch.poll()
    assert granted(limit, 5) == 0


def test_without_room_for_the_table_each_worker_limits_alone(tmp_path: Path) -> None:
    """A full or read-only disk must not stop the gateway."""
    (tmp_path / "run").write_text("in the way")
    limit = limiter(tmp_path, rate_limit_rps=SLOW, rate_limit_burst=3)
    assert granted(limit, 10) == 3


def limited(stack: Stack, name: str, **settings: Any) -> Any:  # noqa: F811
    """A gateway of two workers with these limits, for tenants of the stack."""
    data_dir = stack.lend_tenants(stack.settings.data_dir.parent / name)
    return gateway(data_dir, stack.control_plane_url, stack.issuer, limits_poll_seconds=0.05, **settings)


def ask(served: Gateway, headers: dict[str, str], times: int, path: str = "/v1/memories") -> list[httpx.Response]:
    """From eight clients at once, each request on a connection of its own: both workers answer."""

    def one(_: int) -> httpx.Response:
        return httpx.get(served.url + path, headers=headers, trust_env=False, timeout=30)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(times)))


def test_two_workers_grant_exactly_one_limit(stack: Stack) -> None:  # noqa: F811
    """429 as a problem with its headers; another tenant, /health and /metrics are not touched; nothing is billed."""
    hot, calm = stack.tenant(), stack.tenant()
    with limited(stack, "rates", rate_limit_rps=SLOW, rate_limit_burst=20) as served:
        answers = ask(served, stack.headers(hot), 60)
        granted = [r for r in answers if r.status_code == 200]
        refused = [r for r in answers if r.status_code == 429]
        assert len(granted) == 20 and len(refused) == 40
        document = assert_problem(refused[0], 429)
        assert document["reason"] == "rate limited" and document["retry_after"] > 900
        assert refused[0].headers["ratelimit-remaining"] == "0"
        # Not each number once: a worker that finds the table locked counts by itself for a moment (`Table.take`).
        assert {int(r.headers["ratelimit-remaining"]) for r in granted} <= set(range(20))
        assert {r.headers["ratelimit-limit"] for r in answers} == {"20"}
        assert served.metric("engram_rate_limited_total", scope="tenant") == 40
        assert all(r.status_code == 200 for r in ask(served, stack.headers(calm), 10))
        assert all(r.status_code == 200 for r in ask(served, {}, 30, "/health"))
        events = served.events(hot)
        assert len(events) == 60 and sum(e.api_calls for e in events) == 20

        operator = Settings(data_dir=served.data_dir)
        set_limit(operator, "rate_limit_mode", "shadow", ttl_seconds=60, reason="test")
        eventually(lambda: all(r.status_code == 200 for r in ask(served, stack.headers(hot), 16)))
        shadowed = served.client.get("/v1/memories", headers=stack.headers(hot))
        assert shadowed.status_code == 200 and "ratelimit-limit" not in shadowed.headers
        assert served.metric("engram_rate_limit_shadowed_total", scope="tenant") >= 17
        assert any(line["event"] == "rate_limit_shadowed" and line["tenant_id"] == hot for line in served.log())
        clear(operator, "rate_limit_mode")
        eventually(lambda: all(r.status_code == 429 for r in ask(served, stack.headers(hot), 16)))
        set_limit(operator, f"rate_limit:{hot}", {"rps": 0}, ttl_seconds=60, reason="test")
        eventually(lambda: all(r.status_code == 200 for r in ask(served, stack.headers(hot), 16)))


def test_a_batch_over_mcp_is_as_many_requests_as_it_has_parts(stack: Stack) -> None:  # noqa: F811
    """Refused as a whole before anything is stored, and billed as ever: a way around the limit would be a hundred at
    a time."""
    tenant = stack.tenant()
    with limited(stack, "batches", rate_limit_rps=SLOW, rate_limit_burst=10, gateway_workers=1) as served:
        served.client.headers.update(stack.headers(tenant))

        def batch(parts: int) -> tuple[httpx.Response, dict[str, Any]]:
            arguments = {"memories": [{"content": "x"}] * parts}
            message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
            message["params"] = {"name": "memory_create_batch", "arguments": arguments}
            answer = served.client.post("/v1/mcp", json=message)
            result = answer.json()["result"]
            return answer, json.loads(result["content"][0]["text"])

        answer, made = batch(7)
        assert made["count"] == 7 and answer.headers["ratelimit-remaining"] == "3"
        for _ in range(5):
            answer, problem = batch(5)
            assert (problem["status"], problem["reason"]) == (429, "rate limited")
            assert 1_900 < problem["retry_after"] <= 2_000, "two of the five are missing"
            answer, problem = batch(50)
            assert problem["status"] == 400 and "at most 10" in problem["detail"]
        listed = served.client.get("/v1/memories")
        assert len(listed.json()["memories"]) == 7 and listed.headers["ratelimit-remaining"] == "2"
        counters = [(e.status, e.api_calls, e.memories_created) for e in served.events(tenant)]
        assert sorted(set(counters)) == [(200, 1, 0), (200, 1, 7), (400, 1, 0), (429, 0, 0)]


def test_a_flood_of_bad_tokens_is_429_and_shuts_out_nobody_behind_the_address(stack: Stack) -> None:  # noqa: F811
    """Junk has one bucket for the address, forgeries one for address and tenant; good tokens pass by both."""
    victim, other, fresh = stack.tenant(), stack.tenant(), stack.tenant()
    key = stack.issuer.keys[0]
    forged = {"Authorization": "Bearer " + sign(new_key("ES256", key.kid), stack.issuer.claims(victim))}
    with limited(stack, "flood", unauthenticated_rps=SLOW, unauthenticated_burst=10) as served:
        known = stack.headers(victim)
        eventually(lambda: all(r.status_code == 200 for r in ask(served, known, 16)))
        for bad in ({}, {"Authorization": "Bearer junk"}, stack.headers(victim, exp=1)):
            statuses = [r.status_code for r in ask(served, bad, 20)]
            assert set(statuses) <= {401, 429} and statuses.count(401) == (10 if not bad else 0)
        assert all(r.status_code == 200 for r in ask(served, stack.headers(fresh), 8))
        answers = ask(served, forged, 40)
        assert [r.status_code for r in answers].count(401) in (10, 11), "two workers may verify the last one at once"
        refused = next(r for r in answers if r.status_code == 429)
        assert_problem(refused, 429)
        assert (refused.headers["ratelimit-limit"], refused.headers["ratelimit-remaining"]) == ("10", "0")
        anonymous = served.client.get("/v1/memories")
        assert_problem(anonymous, 429)
        assert int(anonymous.headers["ratelimit-reset"]) >= int(anonymous.headers["retry-after"])
        assert all(r.status_code == 200 for r in ask(served, stack.headers(other), 8))
        assert all(r.status_code == 200 for r in ask(served, known, 8)), "verified before"
        assert served.metric("engram_rate_limited_total", scope="unauthenticated") >= 50
        assert all(r.status_code == 200 for r in ask(served, {}, 20, "/health"))


def test_what_no_route_takes_is_within_the_rate_of_who_asks_for_it(stack: Stack) -> None:  # noqa: F811
    """Else a client in a loop, or a scanner, is bounded everywhere but there. It is nobody's usage."""
    tenant, rates = stack.tenant(), {"rate_limit_rps": SLOW, "rate_limit_burst": 20, "gateway_workers": 1}
    own = stack.headers(tenant)

    def statuses(headers: dict[str, str], path: str) -> list[int]:
        return sorted(r.status_code for r in ask(served, headers, 30, path))

    with limited(stack, "unrouted", unauthenticated_rps=SLOW, unauthenticated_burst=10, **rates) as served:
        assert ask(served, own, 1)[0].status_code == 200  # from here on the token is known
        answers = ask(served, own, 30, "/v1/nothing")
        assert sorted(r.status_code for r in answers) == [404] * 19 + [429] * 11
        assert {r.headers["ratelimit-limit"] for r in answers} == {"20"}
        assert statuses({}, "/v1/nothing") == [404] * 10 + [429] * 20
        assert statuses({"Authorization": "Bearer x"}, "/v1/memories") == [429] * 30, "one bucket"
        assert statuses({}, "/health") == [200] * 30
        assert [r.status_code for r in ask(served, stack.headers(stack.tenant()), 1)] == [200]
        assert len(served.events(tenant)) == 1


def test_a_forger_who_changes_the_tenant_gets_no_more_signatures(stack: Stack) -> None:  # noqa: F811
    """The tenant of a token that nobody signed is whatever its sender wrote: invented ones share a bucket, and those
    that exist are together bounded for each address. The price: a good token seen for the first time is refused too."""
    forger = new_key("ES256", stack.issuer.keys[0].kid)

    def told_401(served: Gateway, tenants: list[str]) -> int:
        tokens = [{"Authorization": "Bearer " + sign(forger, stack.issuer.claims(t))} for t in tenants]
        with ThreadPoolExecutor(8) as pool:
            statuses = list(
                pool.map(lambda token: served.client.get("/v1/memories", headers=token).status_code, tokens)
            )
        assert set(statuses) <= {401, 429}
        return statuses.count(401)

    known = [stack.tenant() for _ in range(FORGED_TENANTS + 4)]
    tenant, burst = stack.tenant(), 5
    own = stack.headers(tenant)
    flood = {"unauthenticated_rps": SLOW, "unauthenticated_burst": burst, "gateway_workers": 1}
    with limited(stack, "rotating", **flood) as served:
        assert told_401(served, [f"invented-{n}" for n in range(100)]) == burst
        assert served.client.get("/v1/memories", headers=own).status_code == 200, "verified, for the first time"
        assert told_401(served, known * burst) == (FORGED_TENANTS - 1) * burst
        assert served.client.get("/v1/memories", headers=own).status_code == 200
        assert served.client.get("/v1/memories", headers=stack.headers(tenant, jti="new")).status_code == 429
        timed = served.metric("engram_request_duration_seconds_count", route="/v1/memories")
        assert timed == 2, "only what was served"


def test_whose_failures_they_are() -> None:
    """The scope's client, which `gateway.proxies` has settled; an IPv4 address is the same however it is written."""
    assert RateLimiter.address(("192.0.2.1", 5)) == RateLimiter.address(("::ffff:192.0.2.1", 5)) == "192.0.2.1"
    assert RateLimiter.address(None) == ""


def test_an_ipv6_client_cannot_escape_by_changing_its_lower_half() -> None:
    """A single host has 2^64 addresses."""
    address = RateLimiter.address
    assert address(("2001:db8::1", 1)) == address(("2001:db8::ffff:2", 2))
    assert address(("2001:db8::1", 1)) != address(("2001:db8:0:1::1", 1))
    assert json.dumps(address(("not:an:address", 1)))
