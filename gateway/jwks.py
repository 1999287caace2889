"""The issuer's public keys: a small async cache, because PyJWT's blocks the loop and refuses rotated keys.

    fresh (younger than the TTL)        serve
    old, up to `jwks_stale_max_seconds` serve, refresh in the background (stale-if-error)
    older, or never loaded              wait for a fetch; none to be had → `JwksUnavailable`
    unknown `kid`                       one fetch, then a cool-down: a rotated key works at once, a flood of
                                        invented kids costs one fetch per cool-down

There is one fetch at a time and everybody waits for the same one. After a failure nothing is fetched for
`jwks_cooldown_seconds`. `generation` counts changes of the key set: whoever caches what a key said watches it.

A key brings its algorithm (kty, crv → alg); the token's header can only agree with it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from shared import metrics
from shared.log import get_logger
from shared.settings import Settings

MAX_BYTES = 262_144
MAX_KEYS = 100
MIN_RSA_BITS = 2_048
_ALGORITHMS = {("RSA", None): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
log = get_logger("jwks")


class JwksUnavailable(Exception):
    """There are no keys to judge a token by."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    algorithm: str
    key: Any

    def verifies(self, signed: bytes, signature: bytes) -> bool:
        ok: bool = jwt.get_algorithm_by_name(self.algorithm).verify(signed, self.key, signature)
        return ok


class Jwks:
    """For one event loop. `client` is closed by `close`."""

    def __init__(self, settings: Settings, client: httpx.AsyncClient) -> None:
        self._url = settings.jwks_url
        self._ttl = settings.jwks_ttl_seconds
        self._cooldown = settings.jwks_cooldown_seconds
        self._stale_max = settings.jwks_stale_max_seconds
        self._client = client
        self._keys: dict[str | None, VerificationKey] = {}
        self._published: list[dict[str, Any]] = []
        self._refresh_at = self._expires_at = self._quiet_until = self._unknown_quiet_until = 0.0
        self._fetching: asyncio.Task[None] | None = None
        self.generation = 0

    async def close(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
        await self._client.aclose()

    def usable(self) -> bool:
        """Whether the keys may still be relied on; starts a refresh in the background when one is due."""
        now = time.monotonic()
        if now >= self._refresh_at:
            if now >= self._expires_at:
                return False
            if now >= self._quiet_until:
                self._fetch_once()
        return True

    async def load(self) -> None:
        """Return with usable keys, or raise `JwksUnavailable`."""
        if not self.usable():
            if self._fetching is not None or time.monotonic() >= self._quiet_until:
                await asyncio.shield(self._fetch_once())
            if not self.usable():
                raise JwksUnavailable(f"no keys from {self._url}")

    async def find(self, kid: str | None) -> VerificationKey | None:
        """The key of that id; without an id, the only key there is. Raises `JwksUnavailable`."""
        await self.load()
        key = self._find(kid)
        if key is None and kid is not None:
            now = time.monotonic()
            if self._fetching is not None or now >= max(self._unknown_quiet_until, self._quiet_until):
                self._unknown_quiet_until = now + self._cooldown
                await asyncio.shield(self._fetch_once())
                key = self._find(kid)
        return key

    def refresh(self) -> None:
        """Fetch now, whatever the TTL and the cool-down say: an operator knows that the keys changed."""
        self._fetch_once()

    def _find(self, kid: str | None) -> VerificationKey | None:
        if kid is not None:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _fetch_once(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            published = await self._get()
            keys = _usable_keys(published)
            if not keys:
                raise ValueError("the issuer published no usable key")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as e:
            metrics.jwks_fetch_total.labels("error").inc()
            self._quiet_until = time.monotonic() + self._cooldown
            log.error("jwks_fetch_failed", error=type(e).__name__, cause=str(e)[:300], keys=len(self._keys))
        else:
            metrics.jwks_fetch_total.labels("ok").inc()
            now = time.monotonic()
            self._refresh_at = now + self._ttl
            self._expires_at = now + self._ttl + self._stale_max
            if published != self._published:
                self._keys, self._published = keys, published
                self.generation += 1
                log.info("jwks_loaded", keys=len(keys), generation=self.generation)
        finally:
            self._fetching = None

    async def _get(self) -> list[dict[str, Any]]:
        body = b""
        async with self._client.stream("GET", self._url) as response:
            response.raise_for_status()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_BYTES:
                    raise ValueError(f"the key set is larger than {MAX_BYTES} bytes")
        document = msgspec.json.decode(body)
        found = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(found, list) or len(found) > MAX_KEYS:
            raise ValueError("not a JSON Web Key Set")
        return [jwk for jwk in found if isinstance(jwk, dict)]


def _usable_keys(published: list[dict[str, Any]]) -> dict[str | None, VerificationKey]:
    """The keys we can and may use; of two with one id the first, so a later one cannot displace it."""
    keys: dict[str | None, VerificationKey] = {}
    for jwk in published:
        kid = jwk.get("kid")
        if (kid is None or isinstance(kid, str)) and kid not in keys and (key := verification_key(jwk)):
            keys[kid] = key
    return keys


def verification_key(jwk: dict[str, Any]) -> VerificationKey | None:
    """None for a key that is not for us: symmetric, private, weak, of another curve, or not for signatures."""
    kty = jwk.get("kty")
    crv = None if kty == "RSA" else jwk.get("crv")
    try:
        algorithm = _ALGORITHMS.get((kty, crv))  # type: ignore[arg-type]
    except TypeError:  # an unhashable value where a string belongs
        return None
    if algorithm is None or "d" in jwk or jwk.get("alg", algorithm) != algorithm:
        return None
    if jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ("verify",)):
        return None
    try:
        key = jwt.get_algorithm_by_name(algorithm).from_jwk(jwk)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return None
    return VerificationKey(algorithm, key)
