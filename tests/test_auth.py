"""Tokens: what is accepted, and that every other one is refused for the reason it should be.

A real `Jwks` against a real HTTP issuer; the tokens are assembled by hand, so that they can be wrong.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.auth import Authenticator, Caller, Unauthenticated
from gateway.jwks import Jwks
from shared.settings import Settings
from tests.gateway_stack import AUDIENCE, ISSUER, Issuer, new_key
from tests.token_cases import WeakKeys, refused


@pytest.fixture(scope="module")
def issuer():
    running = Issuer()
    yield running
    running.close()


def judge(issuer: Issuer, *tokens: str, **settings: Any) -> list[Caller | str]:
    """What one authenticator says to these tokens in turn: the caller, or the reason it refused."""

    async def run() -> list[Caller | str]:
        values = {"jwks_url": issuer.url, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE} | settings
        configured = Settings(**values)
        jwks = Jwks(configured, httpx.AsyncClient(trust_env=False))
        authenticator = Authenticator(configured, jwks)
        answers: list[Caller | str] = []
        for token in tokens:
            try:
                answers.append(await authenticator.caller([b"Bearer " + token.encode()]))
            except Unauthenticated as e:
                answers.append(e.reason)
        await jwks.close()
        return answers

    return asyncio.run(run())


def test_every_algorithm_of_the_house_is_accepted(issuer: Issuer) -> None:
    """RS256, ES256 and EdDSA keys all verify, and the second time comes from the cache with the same answer."""
    for key in issuer.keys:
        token = issuer.token("acme", key=key)
        first, second = judge(issuer, token, token)
        assert isinstance(first, Caller) and first == second
        assert first.tenant_id == "acme" and "search" in first.scopes


def test_harmless_variations_are_accepted(issuer: Issuer) -> None:
    """What the standards allow: at+jwt, no typ, a list of audiences or scopes, fractional times, small skew."""
    now = time.time()
    variations = [
        issuer.token("acme", header={"typ": "at+JWT"}),
        issuer.token("acme", header={"typ": "application/at+jwt"}),
        issuer.token("acme", header={"typ": ...}),
        issuer.token("acme", aud=["other", AUDIENCE]),
        issuer.token("acme", scope=["memories:read"]),
        issuer.token("acme", scope=...),
        issuer.token("acme", exp=now + 60.5, iat=now + 5, nbf=now + 5),
        issuer.token("acme", exp=now - 5),
        issuer.token("acme", header={"jku": "http://evil", "x5u": "http://evil", "x5c": ["e"], "jwk": {"kty": "oct"}}),
    ]
    assert [type(x) for x in judge(issuer, *variations)] == [Caller] * len(variations)


def test_where_access_tokens_must_say_that_they_are_no_other_type_is_taken_for_one(issuer: Issuer) -> None:
    """RFC 8725, 3.11: an issuer that marks them needs no luck with audiences to keep its ID tokens out."""
    types = ["at+jwt", "application/AT+JWT", "JWT", ...]
    tokens = [issuer.token("acme", header={"typ": typ}) for typ in types]
    answers = judge(issuer, *tokens, jwt_require_at_jwt=True)
    assert [type(x) for x in answers[:2]] == [Caller, Caller] and answers[2:] == ["malformed", "malformed"]


def test_a_token_of_a_new_key_waits_out_somebody_elses_invented_one_and_a_bad_one_waits_for_nothing() -> None:
    """Right after a key was published, while strangers send ids of keys that never were: no false 401."""

    async def run() -> None:
        issuer, forger, rotated = Issuer(), new_key("ES256"), new_key("EdDSA")
        configured = Settings(jwks_url=issuer.url, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwks_cooldown_seconds=0.5)
        jwks = Jwks(configured, httpx.AsyncClient(trust_env=False))
        authenticator = Authenticator(configured, jwks)

        async def caller(token: str) -> Caller:
            return await authenticator.caller([b"Bearer " + token.encode()])

        try:
            await jwks.load()
            with pytest.raises(Unauthenticated):
                await caller(issuer.token("acme", key=forger))
            issuer.keys.append(rotated)
            bad = asyncio.create_task(caller(issuer.token("acme", key=rotated, exp=1)))
            await asyncio.sleep(0)
            assert isinstance(bad.exception(), Unauthenticated), "in one step"
            assert (await caller(issuer.token("acme", key=rotated))).tenant_id == "acme"
        finally:
            await jwks.close()
            issuer.close()

    asyncio.run(run())


def test_only_a_token_that_is_good_otherwise_has_the_issuer_asked_and_within_what_its_address_may() -> None:
    """Strangers who invent ids by the thousand would have us answer 503 while the issuer is slow, whoever they are."""

    async def run() -> None:
        issuer, forger = Issuer(), new_key("ES256")
        configured = Settings(jwks_url=issuer.url, jwt_issuer=ISSUER, jwt_audience=AUDIENCE)
        jwks = Jwks(configured, httpx.AsyncClient(trust_env=False))
        authenticator = Authenticator(configured, jwks)

        def too_many(_: str | None) -> None:
            raise InterruptedError

        try:
            bad, plausible = (f"Bearer {issuer.token('acme', key=forger, **claims)}" for claims in ({"exp": 1}, {}))
            with pytest.raises(Unauthenticated, match="expired"):  # whatever the keys are: none were ever asked for
                await authenticator.caller([bad.encode()])
            assert issuer.fetches == 0
            await jwks.load()
            with pytest.raises(Unauthenticated, match="unknown_kid"):
                await authenticator.caller([bad.encode()])
            with pytest.raises(InterruptedError):
                await authenticator.caller([plausible.encode()], too_many)
            assert issuer.fetches == 1
        finally:
            await jwks.close()
            issuer.close()

    asyncio.run(run())


def test_every_token_of_the_table_is_refused_for_its_own_reason(issuer: Issuer) -> None:
    """RFC 8725 case by case: never accepted, never an exception, and no key is fetched from where a token says."""
    attacker = Issuer()
    weak = WeakKeys()
    issuer.extra = weak.published
    cases = refused(issuer, attacker, weak, "acme")
    assert len({case.name for case in cases}) == len(cases) > 250
    expected = {case.name: case.reason for case in cases}
    answers = judge(issuer, *[case.token for case in cases], jwks_cooldown_seconds=600)
    assert dict(zip(expected, answers, strict=True)) == expected
    assert attacker.fetches == 0
    attacker.close()


def test_one_key_without_an_id_serves_tokens_without_one(issuer: Issuer) -> None:
    """A missing kid is unambiguous only when there is exactly one key."""
    alone = Issuer()
    try:
        alone.keys = [new_key("ES256")]
        token = alone.token("acme", header={"kid": ...})
        assert isinstance(judge(alone, token)[0], Caller)
    finally:
        alone.close()


def test_the_cache_never_outlives_the_token_or_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A remembered token is refused once it expires, and once its key is no longer published."""
    ahead = [0.0]
    clock = SimpleNamespace(time=lambda: time.time() + ahead[0])
    for module in ("gateway.auth", "shared.token"):
        monkeypatch.setattr(f"{module}.time", clock)

    async def run() -> None:
        own = Issuer()
        configured = Settings(
            jwks_url=own.url, jwt_issuer=ISSUER, jwt_leeway_seconds=0, jwks_ttl_seconds=0.05, jwks_cooldown_seconds=0
        )
        jwks = Jwks(configured, httpx.AsyncClient(trust_env=False))
        authenticator = Authenticator(configured, jwks)
        brief = own.token("acme", exp=time.time() + 60)
        long = own.token("acme")
        for token in (brief, long):
            assert (await authenticator.caller([f"Bearer {token}".encode()])).tenant_id == "acme"
        ahead[0] = 60.0
        with pytest.raises(Unauthenticated, match="expired"):
            await authenticator.caller([f"Bearer {brief}".encode()])
        own.keys = own.keys[1:]
        with pytest.raises(Unauthenticated, match="unknown_kid"):
            for _ in range(100):  # the refresh runs in the background of the cached answers
                await authenticator.caller([f"Bearer {long}".encode()])
                await asyncio.sleep(0.05)
        await jwks.close()
        own.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "missing"),
        ([b""], "malformed"),
        ([b"Bearer"], "malformed"),
        ([b"Bearer "], "malformed"),
        ([b"Basic dXNlcg=="], "malformed"),
        ([b"Bearer a.b.c", b"Bearer a.b.c"], "malformed"),
    ],
)
def test_an_authorization_header_that_is_not_one_bearer_token_is_refused(
    issuer: Issuer, headers: list[bytes], reason: str
) -> None:
    """No key is fetched for these."""

    async def run() -> None:
        configured = Settings(jwks_url="http://127.0.0.1:9/", jwt_issuer=ISSUER)
        jwks = Jwks(configured, httpx.AsyncClient(trust_env=False))
        with pytest.raises(Unauthenticated, match=reason):
            await Authenticator(configured, jwks).caller(headers)
        await jwks.close()

    asyncio.run(run())
