"""Which check does this token fail? The configuration of issuer and audience, held against a token a client was given.

The token is never shown, logged or stored: what is reported are its public claims, cut, beside what they should be.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from shared import registry
from shared.errors import ControlPlaneUnavailable, UnknownTenant
from shared.jwk import VerificationKey
from shared.playbook import jwks
from shared.playbook.action import Context, Finding, Outcome, Request
from shared.playbook.jwks import IssuerUnavailable
from shared.token import (
    Parts,
    Rules,
    Unauthenticated,
    bearer,
    check_audience,
    check_issuer,
    check_times,
    json_object,
    scopes_of,
    take_apart,
    tenant_of,
)

_SHOWN_CHARS = 200
MEANING = {
    "missing": "there is no token",
    "malformed": "it is not a token of three base64url parts with a plain header",
    "too_large": "it is larger than is accepted",
    "algorithm": "its algorithm is not accepted, or not the key's",
    "unknown_kid": "the issuer publishes no key of that id",
    "signature": "its signature is not the key's: another issuer's key, or it was changed",
    "expired": "it has expired",
    "not_yet_valid": "it is of the future: a clock is wrong",
    "issuer": "`iss` is not ENGRAM_JWT_ISSUER",
    "audience": "`aud` does not name ENGRAM_JWT_AUDIENCE",
    "claims": "a claim is missing or of the wrong type",
    "jwks_unavailable": "the issuer's keys cannot be had",
}


def explain(context: Context, request: Request, _: Any) -> Outcome:
    """Every check in the gateway's order; the first that fails is the reason of its 401."""
    assert request.token is not None  # `perform` refuses a request without one
    findings: list[Finding] = []
    failures: list[str] = []

    def check(name: str, normal: str, job: Callable[[], Any], said: object = None) -> Any:
        try:
            seen = job()
        except Unauthenticated as e:
            failures.append(e.reason)
            seen = MEANING[e.reason] if said is None else f"{_cut(said)}: {MEANING[e.reason]}"
            findings.append(Finding(name, seen, normal, False))
            return None
        findings.append(Finding(name, _cut(seen), normal, True))
        return seen

    raw = request.token.get_secret_value().strip().removeprefix("Bearer ").strip()
    parts: list[Parts] = []

    def form() -> str:
        parts.append(take_apart(Rules.of(context.settings), bearer([b"Bearer " + raw.encode("utf-8", "replace")])))
        return f"{parts[0].algorithm}, kid {parts[0].kid or '-'}"

    check("form", "three parts, a plain header, RS256, ES256 or EdDSA", form)
    if parts:
        _check_key(context, parts[0], check)
        claims = check("payload", "claims in plain JSON, no name twice", lambda: _Claims(json_object(parts[0].payload)))
        if claims is not None:
            _check_claims(context, claims, check, findings)
    reason = failures[0] if failures else None
    inactive = any(finding.ok is False for finding in findings)
    if reason == "jwks_unavailable":
        summary = "cannot be judged (503): the issuer's keys cannot be had"
    elif reason is not None:
        summary = f"refused with 401, reason {reason}: {MEANING[reason]}"
    else:
        summary = "a good token, but its tenant is refused with 403" if inactive else "a good token"
    return Outcome(action=request.action, kind="read", target="token", summary=summary, findings=findings)


class _Claims(dict[str, Any]):
    """Claims that print as how many they are."""

    def __str__(self) -> str:
        return f"{len(self)} claims"


def _check_key(context: Context, parts: Parts, check: Callable[..., Any]) -> None:
    keys: list[VerificationKey] = []

    def known() -> str:
        try:
            served = jwks.serves(context.settings)
        except IssuerUnavailable:
            raise Unauthenticated("jwks_unavailable") from None
        key = served.get(parts.kid) if parts.kid is not None else None
        if parts.kid is None and len(served) == 1:
            key = next(iter(served.values()))
        if key is None:
            raise Unauthenticated("unknown_kid")
        if key.algorithm != parts.algorithm:
            raise Unauthenticated("algorithm")
        keys.append(key)
        return f"{parts.kid or '-'}, {key.algorithm}"

    def signed() -> str:
        if not keys[0].verifies(parts.signed, parts.signature):
            raise Unauthenticated("signature")
        return "the key's"

    check("key", "published by the issuer now, of the token's algorithm", known)
    if keys:
        check("signature", "the key's", signed)


def _check_claims(context: Context, claims: dict[str, Any], check: Callable[..., Any], findings: list[Finding]) -> None:
    rules = Rules.of(context.settings)

    def times() -> str:
        return f"expires {datetime.fromtimestamp(check_times(rules, claims), UTC):%F %T} UTC"

    def issuer() -> str:
        check_issuer(rules, claims)
        return rules.issuer

    def audience() -> str:
        check_audience(rules, claims)
        return rules.audience

    check("times", f"not expired, not of the future, leeway {rules.leeway_seconds:g} s", times)
    check("issuer", rules.issuer, issuer, claims.get("iss"))
    check("audience", rules.audience, audience, claims.get("aud"))
    tenant_id = check("tenant", f"an id in `{rules.tenant_claim}`", lambda: tenant_of(rules, claims))
    check("scopes", "words in `scope`", lambda: " ".join(sorted(scopes_of(claims))) or "none")
    if tenant_id is not None:
        findings.append(_state(context, tenant_id))


def _state(context: Context, tenant_id: str) -> Finding:
    try:
        if context.control_plane is None:
            raise ControlPlaneUnavailable("not configured")
        state = registry.get(context.control_plane, tenant_id).state
    except UnknownTenant:
        return Finding("tenant state", "there is no such tenant", "active", False)
    except ControlPlaneUnavailable:
        return Finding("tenant state", "the control plane does not answer", "active", None)
    return Finding("tenant state", state, "active", state == "active")


def _cut(value: object) -> str:
    """For a table and a terminal: what prints, and not much of it."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
