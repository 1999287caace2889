"""The gateway's two workers against a real OpenID provider that rotates, drops keys, breaks and comes back.

`everywhere` opens two dozen connections, so that both workers answer. How often keys are fetched is counted at the
provider. No assertion is about time: the tests wait for what the provider saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from shared import registry
from shared.limits import set_limit
from shared.settings import Settings
from tests.gateway_stack import Gateway, Stack, assert_problem, eventually, gateway, new_key, sign, stack  # noqa: F401
from tests.oidc_fixtures import Provider, provider  # noqa: F401

WORKERS = 2
ROUTE, ACCEPTED = "/v1/memories/none", 404  # no such memory: who is told so was let in, and no database is opened
KEYS = {"es": "ES256", "rs": "RS256", "ed": "EdDSA"}

UNSHARED = httpx.Limits(max_connections=None, max_keepalive_connections=0)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@dataclass
class World:
    gateway: Gateway
    provider: Provider
    settings: Settings
    tenant: str

    def token(self, kid: str, ttl_seconds: int = 600) -> str:
        return self.provider.token(self.tenant, kid, ttl_seconds)

    def statuses(self, *tokens: str) -> list[int]:
        """One request a token, all at once, each on a connection of its own."""

        async def run() -> list[int]:
            async with httpx.AsyncClient(
                base_url=self.gateway.url, limits=UNSHARED, timeout=60, trust_env=False, verify=False
            ) as api:
                answers = [api.get(ROUTE, headers=bearer(token)) for token in tokens]
                return [r.status_code for r in await asyncio.gather(*answers)]

        return asyncio.run(run())

    def everywhere(self, token: str) -> set[int]:
        return set(self.statuses(*[token] * 24))

    def everywhere_eventually(self, token: str, status: int) -> None:
        eventually(lambda: self.everywhere(token) == {status})
        assert self.everywhere(token) == {status}

    def fetched(self, times: int) -> None:
        """Wait until the key set was asked for so often from now on."""
        before = self.provider.fetches
        eventually(lambda: self.provider.fetches >= before + times)


@pytest.fixture
def world(stack: Stack, provider: Provider, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:  # noqa: F811
    """A gateway that never asked for a key, with the settings of the test's parameter."""
    tenant = f"oidc-{time.time_ns()}"
    settings = Settings(data_dir=tmp_path, control_plane_url=stack.control_plane_url)
    registry.create(stack.control_plane, settings, tenant)
    provider.admit(tenant)
    provider.publish(**KEYS)
    provider.break_down("")
    values: dict[str, Any] = {"jwt_leeway_seconds": 0, "inflight_tenant_requests": 1_000} | request.param
    with gateway(
        tmp_path,
        stack.control_plane_url,
        provider,  # type: ignore[arg-type]
        jwt_issuer=provider.origin,
        gateway_workers=WORKERS,
        ready_path="/health",
        **values,
    ) as running:
        yield World(running, provider, settings, tenant)
    provider.break_down("")


def invented(world: World, number: int) -> list[str]:
    """Tokens that are good but for their key ids, which nobody ever published."""
    key, good = new_key("ES256"), jwt.decode(world.token("es"), options={"verify_signature": False})
    return [sign(key, good, {"kid": f"invented-{n}"}) for n in range(number)]


# A time to live and a cool-down that never end within a test: a fetch has another cause.
PATIENT = {"jwks_ttl_seconds": 600, "jwks_cooldown_seconds": 600, "jwks_timeout_seconds": 60}


@pytest.mark.parametrize("world", [PATIENT], indirect=True)
def test_a_crowd_of_first_requests_and_a_flood_of_invented_kids_cost_one_fetch_a_worker_each(world: World) -> None:
    """200 requests at once find no keys at all, with tokens of every algorithm, and none is refused; then 300
    tokens name keys that do not exist."""
    world.provider.break_down("slow")
    tokens = [world.token(kid) for kid in KEYS]
    before = world.provider.fetches
    assert set(world.statuses(*(tokens * 67)[:200])) == {ACCEPTED}
    assert world.provider.fetches == before + WORKERS
    world.provider.break_down("")
    for flood in (invented(world, 150), invented(world, 150)):
        assert set(world.statuses(*flood)) == {401}
        assert world.provider.fetches == before + 2 * WORKERS
    for token in tokens:
        assert world.everywhere(token) == {ACCEPTED}
    assert world.gateway.metric("engram_jwks_fetch_total", outcome="ok") == 2 * WORKERS


@pytest.mark.parametrize("world", [PATIENT], indirect=True)
def test_a_verified_token_does_not_outlive_its_exp_or_a_forced_refresh_that_drops_its_key(world: World) -> None:
    """Both are remembered as good in both workers, and refused by both once their time has come."""
    dropped, kept = world.token("es"), world.token("ed")
    for token in (dropped, kept):
        assert world.everywhere(token) == {ACCEPTED}
    brief = world.token("rs", ttl_seconds=5)
    assert world.everywhere(brief) == {ACCEPTED}
    expires_at = jwt.decode(brief, options={"verify_signature": False})["exp"]
    time.sleep(max(0.0, expires_at - time.time()))
    assert world.everywhere(brief) == {401}

    world.provider.publish(ed="EdDSA")
    before = world.provider.fetches
    assert world.everywhere(dropped) == {ACCEPTED}  # nobody told the workers yet
    assert world.provider.fetches == before
    set_limit(world.settings, "jwks_refresh", True, ttl_seconds=60, reason="a key leaked")
    world.everywhere_eventually(dropped, 401)
    assert world.everywhere(kept) == {ACCEPTED}
    refreshes = sum(line["event"] == "jwks_refresh_forced" for line in world.gateway.log())
    assert refreshes == WORKERS


@pytest.mark.parametrize("world", [PATIENT], indirect=True)
def test_a_hanging_issuer_delays_only_those_who_need_it(world: World) -> None:
    """Tokens of unknown keys wait for the answer that does not come; those of known keys are served meanwhile."""
    known = world.token("es")
    assert world.everywhere(known) == {ACCEPTED}
    world.provider.break_down("hang")
    before = world.provider.fetches
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(world.statuses, *invented(world, 40))
        eventually(lambda: world.provider.fetches == before + WORKERS)
        assert world.everywhere(known) == {ACCEPTED}
        assert not waiting.done()
        world.provider.break_down("")
        assert set(waiting.result(30)) == {401}


QUICK = {"jwks_ttl_seconds": 0.5, "jwks_cooldown_seconds": 0.2, "jwks_timeout_seconds": 30}


@pytest.mark.parametrize("world", [QUICK], indirect=True)
def test_keys_rotate_under_load_without_one_false_401_and_dropped_ones_are_refused(world: World) -> None:
    """Each key overlaps with the next; its tokens are sent the moment it is published, and until it is dropped."""
    chain = [("es", "ES256"), ("ed-2", "EdDSA"), ("rs-2", "RS256"), ("es-2", "ES256")]
    world.provider.publish(es="ES256")
    tokens = [world.token("es")]
    counts: Counter[int] = Counter()
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=world.gateway.url, limits=UNSHARED, trust_env=False, verify=False) as api:
            while not stop.is_set():
                for token in tokens:
                    stop.wait(0.01)
                    counts[api.get(ROUTE, headers=bearer(token)).status_code] += 1

    def served(more: int) -> None:
        enough = counts.total() + more
        time.sleep(0.3)  # rotations are further apart than a cool-down
        eventually(lambda: counts.total() >= enough)

    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as stopping:
        stopping.callback(stop.set)
        loads = [pool.submit(load) for _ in range(4)]
        for before, after in pairwise(chain):
            served(30)
            world.provider.publish(**dict([before, after]))
            old = tokens[0]
            tokens = [old, world.token(after[0])]
            served(60)
            tokens = tokens[1:]
            served(30)
            world.provider.publish(**dict([after]))
            world.everywhere_eventually(old, 401)
        stop.set()
        for each in loads:
            each.result(30)
    assert counts.keys() == {ACCEPTED}, counts


@pytest.mark.parametrize("world", [QUICK | {"jwks_timeout_seconds": 1}], indirect=True)
def test_whatever_the_issuer_breaks_the_last_good_keys_serve_and_it_recovers(world: World) -> None:
    """Every refresh fails, again and again, and nobody notices; the first good answer brings a new key."""
    known = world.token("es")
    assert world.everywhere(known) == {ACCEPTED}
    for fault in ("500", "garbage", "oversized", "empty", "drip", "hang"):
        failures = world.gateway.metric("engram_jwks_fetch_total", outcome="error")
        world.provider.break_down(fault)
        world.fetched(2 * WORKERS)
        assert world.everywhere(known) == {ACCEPTED}, fault
        eventually(lambda n=failures: world.gateway.metric("engram_jwks_fetch_total", outcome="error") > n)
    world.provider.publish(**KEYS, late="ES256")
    late = world.token("late")
    world.provider.break_down("")
    world.everywhere_eventually(late, ACCEPTED)


@pytest.mark.parametrize("world", [QUICK | {"jwks_stale_max_seconds": 2}], indirect=True)
def test_past_the_hard_maximum_the_answer_is_503_until_the_issuer_is_back(world: World) -> None:
    """A 401 would tell clients to throw good tokens away. Nothing is restarted."""
    known = world.token("es")
    assert world.everywhere(known) == {ACCEPTED}
    pids = {worker.pid for worker in world.gateway.workers()}
    world.provider.break_down("500")
    seen = {ACCEPTED}
    while seen != {503}:
        seen = world.everywhere(known)
        assert seen <= {ACCEPTED, 503}, seen
        time.sleep(0.05)
    document = assert_problem(world.gateway.client.get(ROUTE, headers=bearer(known)), 503)
    assert document["reason"] == "jwks unavailable"
    assert world.everywhere(invented(world, 1)[0]) == {503}
    world.provider.break_down("")
    world.everywhere_eventually(known, ACCEPTED)
    assert {worker.pid for worker in world.gateway.workers()} == pids
