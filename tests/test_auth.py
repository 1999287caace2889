"""Tokens: what is accepted, and that every other one is refused for the reason it should be.

A real `Jwks` against a real HTTP issuer; the tokens are assembled by hand, so that they can be wrong.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from typing import Any

import httpx
import pytest

from gateway.auth import Authenticator, Caller, Unauthenticated
from gateway.jwks import Jwks
from shared.settings import Settings
from tests.gateway_stack import AUDIENCE, ISSUER, Issuer, new_key, segment, sign


@pytest.fixture(scope="module")
def issuer():
    running = Issuer()
    running.extra = [new_key("RS256", "weak", bits=1_024).jwk(), {"kty": "oct", "k": "c2VjcmV0", "kid": "oct"}]
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
        issuer.token("acme", header={"typ": ...}),
        issuer.token("acme", aud=["other", AUDIENCE]),
        issuer.token("acme", scope=["memories:read"]),
        issuer.token("acme", scope=...),
        issuer.token("acme", exp=now + 60.5, iat=now + 5, nbf=now + 5),
        issuer.token("acme", exp=now - 5),
        issuer.token("acme", header={"jku": "http://evil", "x5u": "http://evil", "jwk": {"kty": "oct"}}),
    ]
    assert [type(x) for x in judge(issuer, *variations)] == [Caller] * len(variations)


WRONG_CLAIMS = [
    ({"exp": ...}, "claims"),
    ({"exp": "9999999999"}, "claims"),
    ({"exp": True}, "claims"),
    ({"exp": None}, "claims"),
    ({"exp": 10**400}, "claims"),
    ({"exp": -(10**400)}, "claims"),
    ({"exp": [9999999999]}, "claims"),
    ({"exp": 1}, "expired"),
    ({"nbf": 4_000_000_000}, "not_yet_valid"),
    ({"nbf": "0"}, "claims"),
    ({"iat": 4_000_000_000}, "not_yet_valid"),
    ({"iat": False}, "claims"),
    ({"iss": ...}, "issuer"),
    ({"iss": ISSUER + "/"}, "issuer"),
    ({"iss": [ISSUER]}, "issuer"),
    ({"aud": ...}, "audience"),
    ({"aud": "other"}, "audience"),
    ({"aud": []}, "audience"),
    ({"aud": [AUDIENCE, 1]}, "audience"),
    ({"aud": {AUDIENCE: 1}}, "audience"),
    ({"tenant_id": ...}, "claims"),
    ({"tenant_id": 7}, "claims"),
    ({"tenant_id": ["acme"]}, "claims"),
    ({"tenant_id": "../acme"}, "claims"),
    ({"tenant_id": "Acme"}, "claims"),
    ({"tenant_id": "acme\n"}, "claims"),
    ({"scope": 1}, "claims"),
    ({"scope": ["search", 1]}, "claims"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG_CLAIMS)
def test_a_wrong_claim_refuses_the_token(issuer: Issuer, changes: dict[str, Any], reason: str) -> None:
    """Each claim is required where it must be and of exactly its type; PyJWT alone lets most of these pass."""
    assert judge(issuer, issuer.token("acme", **changes)) == [reason]


def test_a_token_cannot_choose_how_it_is_verified(issuer: Issuer) -> None:
    """alg none, HS256 with the public key as its secret, another key's alg, crit, b64, a foreign typ or kid."""
    es, rs, _ = issuer.keys
    good = issuer.claims("acme")
    none = segment(json.dumps({"alg": "none", "kid": es.kid})) + "." + segment(json.dumps(good)) + "."
    head = segment(json.dumps({"alg": "HS256", "kid": "oct"})) + "." + segment(json.dumps(good))
    mac = hmac.digest(b"secret", head.encode(), hashlib.sha256)
    cases = [
        (none, "algorithm"),
        (head + "." + base64.urlsafe_b64encode(mac).rstrip(b"=").decode(), "algorithm"),
        (sign(es, good, {"alg": "RS256"}), "algorithm"),
        (sign(es, good, {"alg": "ES384"}), "algorithm"),
        (sign(es, good, {"alg": ["ES256"]}), "algorithm"),
        (sign(es, good, {"kid": rs.kid}), "algorithm"),
        (sign(es, good, {"crit": ["exp"], "exp": 1}), "malformed"),
        (sign(es, good, {"b64": False}), "malformed"),
        (sign(es, good, {"typ": "dpop+jwt"}), "malformed"),
        (sign(es, good, {"kid": 1}), "malformed"),
        (sign(es, good, {"kid": ""}), "malformed"),
        (sign(es, good, {"kid": ...}), "unknown_kid"),
        (sign(es, good, {"kid": "nobody"}), "unknown_kid"),
        (sign(new_key("RS256", "weak", bits=1_024), good), "unknown_kid"),
        (sign(new_key("ES256", es.kid), good), "signature"),
    ]
    assert judge(issuer, *[token for token, _ in cases]) == [reason for _, reason in cases]


def test_a_token_that_is_not_one_is_refused(issuer: Issuer) -> None:
    """Wrong parts, alphabets, JSON, depth or length: always a reason, never an exception."""
    good = issuer.token("acme")
    head, body, signature = good.split(".")
    cases = [
        ("x", "malformed"),
        (f"{head}.{body}", "malformed"),
        (f"{good}.", "malformed"),
        (f"{head}.{body}.", "malformed"),
        (f"{head}=.{body}.{signature}", "malformed"),
        (f"{head}.{body}.{signature[:-4]}+/+/", "malformed"),
        (f"{segment('[]')}.{body}.{signature}", "malformed"),
        (f"{segment('{')}.{body}.{signature}", "malformed"),
        (f"{segment('[' * 5_000)}.{body}.{signature}", "malformed"),
        (f"{head}.{segment('{}')}.{signature}", "signature"),
        (f"{head}.{body}.{signature[:80]}", "signature"),
        (good + "A" * 8_192, "too_large"),
        (sign(issuer.keys[0], '{"exp": NaN}'), "malformed"),
        (sign(issuer.keys[0], "[]"), "malformed"),
    ]
    assert judge(issuer, *[token for token, _ in cases]) == [reason for _, reason in cases]


def test_one_key_without_an_id_serves_tokens_without_one(issuer: Issuer) -> None:
    """A missing kid is unambiguous only when there is exactly one key."""
    alone = Issuer()
    try:
        alone.keys = [new_key("ES256")]
        token = alone.token("acme", header={"kid": ...})
        assert isinstance(judge(alone, token)[0], Caller)
    finally:
        alone.close()


def test_the_cache_never_outlives_the_token_or_its_key(issuer: Issuer) -> None:
    """A remembered token is refused once it expires, and once its key is no longer published."""

    async def run() -> None:
        own = Issuer()
        configured = Settings(
            jwks_url=own.url, jwt_issuer=ISSUER, jwt_leeway_seconds=0, jwks_ttl_seconds=0.05, jwks_cooldown_seconds=0
        )
        jwks = Jwks(configured, httpx.AsyncClient(trust_env=False))
        authenticator = Authenticator(configured, jwks)
        brief = own.token("acme", exp=time.time() + 0.5)
        long = own.token("acme")
        for token in (brief, long):
            assert (await authenticator.caller([f"Bearer {token}".encode()])).tenant_id == "acme"
        await asyncio.sleep(0.6)
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
