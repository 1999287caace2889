"""Who is calling: RS256, ES256 or EdDSA tokens of one issuer, judged by its published keys.

What a token must be like is `shared.token`; which keys may sign, `shared.jwk`.

Every failure is the same 401 to the caller; the reason is a metric label and a field of the access line.
No keys at all is not the caller's failure: 503.

A verified token is remembered by its sha256 until it expires or the key set changes: 0.7 µs instead of 80.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from gateway.jwks import Jwks
from shared.jwk import VerificationKey
from shared.settings import Settings
from shared.token import Caller, Parts, Rules, Unauthenticated, bearer, judge, take_apart

__all__ = ["Authenticator", "Caller", "Unauthenticated"]


class Authenticator:
    """Turns an `Authorization` header into a `Caller`. For one event loop."""

    def __init__(self, settings: Settings, jwks: Jwks) -> None:
        self._rules = Rules.of(settings)
        self._jwks = jwks
        self._callers: dict[bytes, Caller] = {}
        self._max_callers = settings.jwt_cache_entries
        self._generation = -1

    async def caller(
        self, authorization: list[bytes], before_signature: Callable[[str | None], None] = lambda _: None
    ) -> Caller:
        """Raises `Unauthenticated` or `JwksUnavailable`.

        `before_signature` is called before the one check that costs something, and may raise to save that; with
        the tenant when everything but the signature is good, else with None.
        """
        token = bearer(authorization)
        digest = hashlib.sha256(token).digest()
        caller = self._known(digest)
        if caller is None:
            caller = await self._verify(token, before_signature)
            self._remember(digest, caller)
        return caller

    def known_caller(self, authorization: list[bytes]) -> Caller | None:
        """As `caller`, if the token was verified before and its field is spelt as most are; else None."""
        if len(authorization) != 1 or not authorization[0].startswith(b"Bearer "):
            return None
        return self._known(hashlib.sha256(authorization[0][7:]).digest())

    def _known(self, digest: bytes) -> Caller | None:
        if self._jwks.usable() and self._generation == self._jwks.generation:
            known = self._callers.get(digest)
            if known is not None and time.time() < known.expires_at:
                return known
        return None

    def _remember(self, digest: bytes, caller: Caller) -> None:
        if self._generation != self._jwks.generation:
            self._callers.clear()
            self._generation = self._jwks.generation
        if self._max_callers == 0:
            return
        if len(self._callers) >= self._max_callers:
            del self._callers[next(iter(self._callers))]  # the oldest entry: dicts keep their order
        self._callers[digest] = caller

    async def _verify(self, token: bytes, before_signature: Callable[[str | None], None]) -> Caller:
        parts = take_apart(self._rules, token)
        key = self._jwks.known(parts.kid)
        if key is None:
            key = await self._find_key(parts, before_signature)
        if key.algorithm != parts.algorithm:
            raise Unauthenticated("algorithm")
        caller, refusal = self._judged(parts.payload)
        tenant_id = caller.tenant_id if caller is not None else None
        before_signature(tenant_id)
        if not key.verifies(parts.signed, parts.signature):
            raise Unauthenticated("signature", tenant_id)
        if caller is None:
            raise refusal
        return caller

    async def _find_key(self, parts: Parts, before_signature: Callable[[str | None], None]) -> VerificationKey:
        """The key of a token that may be signed with one we have not heard of: only if the rest of it is good. Nobody
        waits for the issuer, nor has us ask it, with a token that no key could mend."""
        caller, refusal = self._judged(parts.payload)
        if caller is None:
            raise Unauthenticated("unknown_kid") if self._jwks.usable() else refusal
        before_signature(caller.tenant_id)
        key = await self._jwks.find(parts.kid)
        if key is None:
            raise Unauthenticated("unknown_kid", caller.tenant_id)
        return key

    def _judged(self, payload: bytes) -> tuple[Caller | None, Unauthenticated]:
        try:
            return judge(self._rules, payload), Unauthenticated("claims")
        except Unauthenticated as e:
            return None, e
