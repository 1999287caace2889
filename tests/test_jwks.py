"""The key cache against a real HTTP issuer that rotates, fails, stalls and lies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.jwks import LATER_SECONDS, MAX_LATER, MAX_WAITING, MIN_RETRY_SECONDS, Jwks, JwksUnavailable
from shared.jwk import verification_key
from shared.settings import Settings
from tests.gateway_stack import Issuer, new_key


def with_jwks(test: Callable[[Jwks, Issuer], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        issuer = Issuer()
        values = {"jwks_url": issuer.url, "jwks_cooldown_seconds": 60.0} | settings
        jwks = Jwks(Settings(**values), httpx.AsyncClient(trust_env=False, timeout=5))
        try:
            await test(jwks, issuer)
        finally:
            await jwks.close()
            issuer.close()

    asyncio.run(run())


async def until(check: Callable[[], bool]) -> None:
    """The limit only ends a broken test."""
    async with asyncio.timeout(20):
        while not check():
            await asyncio.sleep(0.01)


def test_many_at_once_cost_one_fetch() -> None:
    """A cold worker under load asks the issuer once, and everybody waits for that."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        found = await asyncio.gather(*(jwks.find(issuer.keys[0].kid) for _ in range(50)))
        assert all(found) and issuer.fetches == 1

    with_jwks(test)


def test_a_rotated_key_works_at_once_and_invented_kids_cost_one_fetch() -> None:
    """An unknown kid is fetched for even right after a load; then the cool-down holds."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        assert await jwks.find(issuer.keys[0].kid)
        rotated = new_key("ES256")
        issuer.keys = [rotated]
        assert await jwks.find(rotated.kid)
        assert issuer.fetches == 2 and jwks.generation == 2
        for n in range(20):
            assert await jwks.find(f"invented-{n}") is None
        assert issuer.fetches == 2

    with_jwks(test)


def test_a_new_key_is_found_by_the_next_fetch_when_somebody_elses_invention_used_up_this_one() -> None:
    """Whoever can reach the gateway can invent ids; its clients must not be refused for it. All wait for one fetch."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        assert await jwks.find("invented") is None and issuer.fetches == 2
        rotated = new_key("ES256")
        issuer.keys.append(rotated)
        found = await asyncio.gather(*(jwks.find(rotated.kid) for _ in range(50)))
        assert all(found) and issuer.fetches == 3

    with_jwks(test, jwks_cooldown_seconds=0.5)


def test_a_new_key_is_found_although_the_first_fetch_for_it_fails() -> None:
    """An issuer that rotates may be restarting. The token is good: its client must not be told to throw it away."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        rotated = new_key("ES256")
        issuer.keys.append(rotated)
        issuer.failing = True
        waiting = asyncio.create_task(jwks.find(rotated.kid))
        await until(lambda: issuer.fetches == 2 and jwks.failed != "")
        issuer.failing = False
        assert await waiting and issuer.fetches == 3

    with_jwks(test, jwks_cooldown_seconds=0.5)
    assert Settings().jwks_cooldown_seconds + 1 < LATER_SECONDS, "nor by default"


def test_nobody_waits_for_an_id_that_was_just_looked_for_nor_for_long_nor_in_a_crowd() -> None:
    """Invented ids must not pile up in the gateway."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        async with asyncio.timeout(1):  # the fetch that gave the first keys was for this id too
            assert await jwks.find("invented") is None
        assert issuer.fetches == 1
        assert await jwks.find("another") is None and issuer.fetches == 2
        crowd = [asyncio.create_task(jwks.find(f"invented-{n}")) for n in range(MAX_LATER + 20)]
        await until(lambda: sum(t.done() for t in crowd) == 20)
        assert not any(await asyncio.gather(*crowd))
        assert issuer.fetches == 3

    with_jwks(test, jwks_cooldown_seconds=2)

    async def far(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        assert await jwks.find("invented") is None
        async with asyncio.timeout(0.5):
            assert await jwks.find("other") is None

    with_jwks(far)


def test_an_issuer_that_goes_on_failing_keeps_nobody_for_long_and_is_not_asked_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any cool-down either."""
    monkeypatch.setattr("gateway.jwks.LATER_SECONDS", 1.0)

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.failing = True
        assert await jwks.find("invented") is None
        assert 2 < issuer.fetches <= 2 + 1.0 / MIN_RETRY_SECONDS

    with_jwks(test, jwks_cooldown_seconds=0)


def test_a_key_published_after_a_fetch_was_answered_is_still_found() -> None:
    """Who joins a fetch that is under way may hold a token of a newer key: it is worth a fetch of its own."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        rotated = new_key("EdDSA")
        issuer.delay.clear()
        jwks.refresh()
        joined = [asyncio.create_task(jwks.find(rotated.kid)) for _ in range(10)]
        await until(lambda: issuer.fetches == 2)
        issuer.keys.append(rotated)
        issuer.delay.set()
        assert all(await asyncio.gather(*joined))
        assert issuer.fetches == 3

    with_jwks(test)


def test_a_forced_refresh_is_not_absorbed_by_a_fetch_under_way() -> None:
    """That one may have been answered before the keys changed; and what was verified is verified anew."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        dropped = issuer.keys[0]
        issuer.delay.clear()
        jwks.refresh()
        await until(lambda: issuer.fetches == 2)
        issuer.keys = issuer.keys[1:]
        generation = jwks.generation
        jwks.refresh()
        assert jwks.generation == generation + 1
        issuer.delay.set()
        await until(lambda: issuer.fetches == 3)
        await until(lambda: jwks.generation == generation + 2)
        issuer.failing = True
        assert await jwks.find(dropped.kid) is None

    with_jwks(test)


def test_a_forced_refresh_that_fails_is_tried_again_without_anybody_asking() -> None:
    """The operator has left; the time to live has not passed; the dropped key must go all the same."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.failing = True
        issuer.keys = issuer.keys[1:]
        jwks.refresh()
        await until(lambda: issuer.fetches >= 3)
        issuer.failing = False
        await until(lambda: jwks.generation == 3)

    with_jwks(test, jwks_cooldown_seconds=0.05)


def test_an_idle_worker_forgets_a_dropped_key_after_the_time_to_live() -> None:
    """The first request after a quiet night must not be served with yesterday's keys."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.keys = issuer.keys[1:]
        await until(lambda: jwks.generation == 2)

    with_jwks(test, jwks_ttl_seconds=0.05)


def test_no_more_than_a_bounded_number_of_requests_wait_for_a_hanging_issuer() -> None:
    """The rest is told at once that we cannot judge: waiting requests would fill the server."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        issuer.delay.clear()
        crowd = [asyncio.create_task(jwks.find("any")) for _ in range(MAX_WAITING + 20)]
        await until(lambda: sum(t.done() for t in crowd) == 20)
        assert all(isinstance(t.exception(), JwksUnavailable) for t in crowd if t.done())
        issuer.delay.set()
        await asyncio.wait(crowd)
        assert sum(t.exception() is None for t in crowd) == MAX_WAITING

    with_jwks(test)


def test_a_failing_issuer_is_served_stale_and_left_alone_for_the_cooldown() -> None:
    """Keys past their TTL keep serving, and one failure is one fetch, not one a request."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.failing = True
        await until(lambda: bool(jwks.failed))
        for _ in range(50):
            assert await jwks.find(issuer.keys[0].kid)
            await asyncio.sleep(0.002)
        assert issuer.fetches == 2

    with_jwks(test, jwks_ttl_seconds=0.01)


def test_stale_keys_have_a_hard_end() -> None:
    """Past `jwks_stale_max_seconds` no key may be trusted: the caller is told that we cannot judge."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.failing = True
        await asyncio.sleep(0.1)
        with pytest.raises(JwksUnavailable):
            await jwks.find(issuer.keys[0].kid)
        assert not jwks.usable()

    with_jwks(test, jwks_ttl_seconds=0.01, jwks_stale_max_seconds=0.01)


def test_without_any_keys_the_issuer_is_asked_once_per_cooldown(monkeypatch: pytest.MonkeyPatch) -> None:
    """An issuer that is down from the start is not hammered, and keys work as soon as it answers."""
    now = [1_000.0]
    monkeypatch.setattr("gateway.jwks.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        issuer.failing = True
        for _ in range(10):
            with pytest.raises(JwksUnavailable):
                await jwks.load()
        assert issuer.fetches == 1
        issuer.failing = False
        now[0] += 60
        await jwks.load()

    with_jwks(test)


def test_a_stalled_refresh_does_not_stall_requests() -> None:
    """The refresh of keys that still serve runs in the background."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.delay.clear()
        await asyncio.sleep(0.02)
        assert await asyncio.wait_for(jwks.find(issuer.keys[0].kid), 2)
        issuer.delay.set()

    with_jwks(test, jwks_ttl_seconds=0.01)


@pytest.mark.parametrize(
    "extra",
    [
        ["not a key"] * 200,
        [{"kty": "RSA", "kid": "pad", "pad": "x" * 300_000}],
    ],
)
def test_an_unreasonable_key_set_is_not_taken(extra: list[Any]) -> None:
    """A bound on bytes and keys: the issuer's mistake must not become our memory."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        issuer.extra = extra
        with pytest.raises(JwksUnavailable):
            await jwks.load()

    with_jwks(test)


def test_odd_keys_among_good_ones_are_passed_over() -> None:
    """One unusable entry must not take the others with it, and a repeated kid cannot displace the first."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        first = issuer.keys[0]
        issuer.extra = [None, 1, {}, {"kty": ["RSA"]}, {"kty": "EC", "crv": {}}, new_key("ES256", first.kid).jwk()]
        found = await jwks.find(first.kid)
        assert found is not None
        assert found.key.public_numbers() == first.private.public_key().public_numbers()

    with_jwks(test)


def test_only_public_signature_keys_of_our_algorithms_are_usable() -> None:
    """Symmetric, private, weak, foreign-curve and encryption keys are not keys to us."""
    rsa, ec = new_key("RS256").jwk(), new_key("ES256").jwk()
    assert verification_key(rsa) and verification_key(ec)
    for bad in (
        {"kty": "oct", "k": "AAAA"},
        new_key("RS256", bits=1_024).jwk(),
        ec | {"crv": "P-384"},
        ec | {"crv": "secp256k1"},
        ec | {"x": "AAAA"},
        ec | {"x": 5},
        ec | {"d": "AAAA"},
        ec | {"alg": "ES384"},
        ec | {"use": "enc"},
        rsa | {"alg": "RS512"},
        rsa | {"alg": "PS256"},
        rsa | {"key_ops": ["encrypt"]},
        rsa | {"n": None},
        rsa | {"e": "AQ"},
        rsa | {"e": "AA"},
        rsa | {"e": "BA"},
        rsa | {"e": rsa["n"]},
        rsa | {"key_ops": 5},
        rsa | {"key_ops": None},
        rsa | {"key_ops": "verify"},
        ec | {"y": ec["x"]},
        ec | {"kty": "OKP", "crv": "Ed448"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"},
    ):
        assert verification_key(bad) is None, bad
