"""Bearer tokens: RS256, ES256 or EdDSA of one issuer, and everything about one that can be judged without a key.

PyJWT supplies the signature algorithms; the checks around them are ours, because it accepts a missing `exp`,
one that is a string or 10^400, repeated claims, any `typ` and 1024-bit RSA (FACTS). Nothing in the token chooses its
key or algorithm: `jku`, `x5u`, `x5c` and `jwk` are never looked at, `alg` must equal the key's. A header that would
make the payload something else than claims in plain JSON (`crit`, `b64`, `zip`, `enc`, `cty`) is refused, so is a
name that occurs twice in one object, and base64url in any but its one canonical form.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from typing import Any, NamedTuple

import msgspec

from shared.errors import UnsafeTenantId
from shared.settings import Settings
from shared.tenant import check_tenant_id

MAX_TOKEN_BYTES = 8_192
MAX_KID_CHARS = 256
MAX_SUBJECT_CHARS = 100
ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA"})
ACCESS_TYPES = frozenset({"at+jwt", "application/at+jwt"})
TYPES = ACCESS_TYPES | {"jwt"}
_CHANGES_THE_PAYLOAD = frozenset({"crit", "b64", "zip", "enc", "cty"})
_LATEST = float(1 << 53)
_SEGMENT = re.compile(rb"[A-Za-z0-9_-]+\Z")


class Unauthenticated(Exception):
    """`reason` is one of `shared.metrics.AUTH_FAILURES`; `tenant_id` whose token it would be, were it signed."""

    def __init__(self, reason: str, tenant_id: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.tenant_id = tenant_id


class Caller(NamedTuple):
    tenant_id: str
    scopes: frozenset[str]
    expires_at: float
    subject: str = ""  # for the book of actions; it decides nothing


class Rules(NamedTuple):
    """What `typ` and claims must say."""

    issuer: str
    audience: str
    tenant_claim: str
    leeway_seconds: float
    types: frozenset[str]

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        return cls(
            settings.jwt_issuer,
            settings.jwt_audience,
            settings.jwt_tenant_claim,
            settings.jwt_leeway_seconds,
            ACCESS_TYPES if settings.jwt_require_at_jwt else TYPES,
        )


class Parts(NamedTuple):
    """A token taken apart: a header that may be ours, what was signed, the payload as it came."""

    algorithm: str
    kid: str | None
    signed: bytes
    payload: bytes
    signature: bytes


def take_apart(rules: Rules, token: bytes) -> Parts:
    """Raises `Unauthenticated`: malformed, algorithm."""
    parts = token.split(b".")
    if len(parts) != 3:
        raise Unauthenticated("malformed")
    header = json_object(parts[0])
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise Unauthenticated("algorithm")
    typ = header.get("typ", "JWT")
    if not _CHANGES_THE_PAYLOAD.isdisjoint(header) or not isinstance(typ, str) or typ.lower() not in rules.types:
        raise Unauthenticated("malformed")
    kid = header.get("kid")
    if "kid" in header and not (isinstance(kid, str) and 0 < len(kid) <= MAX_KID_CHARS):
        raise Unauthenticated("malformed")
    return Parts(algorithm, kid, parts[0] + b"." + parts[1], parts[1], _base64url(parts[2]))


def judge(rules: Rules, payload: bytes) -> Caller:
    """Whose claims these are. Raises `Unauthenticated` with the first check that fails."""
    claims = json_object(payload)
    expires_at = check_times(rules, claims)
    check_issuer(rules, claims)
    check_audience(rules, claims)
    return Caller(tenant_of(rules, claims), scopes_of(claims), expires_at, subject_of(claims))


def check_times(rules: Rules, claims: dict[str, Any]) -> float:
    """When it expires."""
    now = time.time()
    expires_at = _seconds(claims.get("exp"))
    if now >= expires_at + rules.leeway_seconds:
        raise Unauthenticated("expired")
    for name in ("nbf", "iat"):
        if name in claims and _seconds(claims[name]) > now + rules.leeway_seconds:
            raise Unauthenticated("not_yet_valid")
    return expires_at


def check_issuer(rules: Rules, claims: dict[str, Any]) -> None:
    if claims.get("iss") != rules.issuer:
        raise Unauthenticated("issuer")


def check_audience(rules: Rules, claims: dict[str, Any]) -> None:
    audience = claims.get("aud")
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not all(isinstance(a, str) for a in audiences):
        raise Unauthenticated("audience")
    if rules.audience not in audiences:
        raise Unauthenticated("audience")


def tenant_of(rules: Rules, claims: dict[str, Any]) -> str:
    try:
        return check_tenant_id(claims.get(rules.tenant_claim))  # type: ignore[arg-type]
    except UnsafeTenantId:
        raise Unauthenticated("claims") from None


def scopes_of(claims: dict[str, Any]) -> frozenset[str]:
    return _scopes(claims.get("scope", ""))


def subject_of(claims: dict[str, Any]) -> str:
    """Who it was given to, as much of it as prints; empty when it does not say."""
    subject = claims.get("sub", "")
    if not isinstance(subject, str):
        raise Unauthenticated("claims")
    return "".join(c for c in subject[:MAX_SUBJECT_CHARS] if c.isprintable())


def bearer(authorization: list[bytes]) -> bytes:
    """The token in a request's `Authorization` fields. Raises `Unauthenticated`: missing, malformed, too_large."""
    if not authorization:
        raise Unauthenticated("missing")
    scheme, _, token = authorization[0].partition(b" ")
    token = token.strip()
    if len(authorization) > 1 or scheme.lower() != b"bearer" or not token:
        raise Unauthenticated("malformed")
    if len(token) > MAX_TOKEN_BYTES:
        raise Unauthenticated("too_large")
    return token


def _base64url(segment: bytes) -> bytes:
    if not _SEGMENT.match(segment):
        raise Unauthenticated("malformed")
    try:
        found = base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))
    except ValueError:
        raise Unauthenticated("malformed") from None
    if base64.urlsafe_b64encode(found).rstrip(b"=") != segment:  # unused bits that are set: another spelling
        raise Unauthenticated("malformed")
    return found


def json_object(segment: bytes) -> dict[str, Any]:
    text = _base64url(segment)
    try:
        found = msgspec.json.decode(text)
        json.loads(text.decode(), object_pairs_hook=_refuse_repeated)  # msgspec takes the last of two
    except (ValueError, RecursionError):
        raise Unauthenticated("malformed") from None
    if not isinstance(found, dict):
        raise Unauthenticated("malformed")
    return found


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")


def _seconds(value: object) -> float:
    """A NumericDate: a number, not a bool, not a string, not infinite, not 10^400."""
    if type(value) is not int and type(value) is not float:
        raise Unauthenticated("claims")
    if not -_LATEST < value < _LATEST or not math.isfinite(value):
        raise Unauthenticated("claims")
    return float(value)


def _scopes(value: object) -> frozenset[str]:
    words = value.split(" ") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise Unauthenticated("claims")
    return frozenset(w for w in words if w)
