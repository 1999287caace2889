"""The key cache against a real HTTP issuer that rotates, fails, stalls and lies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from gateway.jwks import Jwks, JwksUnavailable, verification_key
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


def test_a_failing_issuer_is_served_stale_and_left_alone_for_the_cooldown() -> None:
    """Keys past their TTL keep serving, and one failure is one fetch, not one a request."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        await jwks.load()
        issuer.failing = True
        await asyncio.sleep(0.02)
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


def test_without_any_keys_the_issuer_is_asked_once_per_cooldown() -> None:
    """An issuer that is down from the start is not hammered, and keys work as soon as it answers."""

    async def test(jwks: Jwks, issuer: Issuer) -> None:
        issuer.failing = True
        for _ in range(10):
            with pytest.raises(JwksUnavailable):
                await jwks.load()
        assert issuer.fetches == 1
        issuer.failing = False
        await asyncio.sleep(0.6)
        await jwks.load()

    with_jwks(test, jwks_cooldown_seconds=0.5)


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
    ):
        assert verification_key(bad) is None, bad
