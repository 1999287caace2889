"""The token issuer as this machine sees it: does it answer, with keys, and is our clock the same as its own."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from shared.diagnosis.finding import Finding, bad, good, unseen
from shared.diagnosis.sight import HTTP_TIMEOUT_SECONDS, Sight
from shared.settings import redact_url

_NORMAL = "answers with at least one signing key"


def keys(sight: Sight) -> list[Finding]:
    """The key set and, from the same answer, the clocks."""
    url = sight.settings.jwks_url
    if not url:
        return [unseen("issuer", "ENGRAM_JWKS_URL is not set", _NORMAL)]
    try:
        answer = httpx.get(url, timeout=HTTP_TIMEOUT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        return [bad("issuer", f"no answer at {redact_url(url)}: {e or type(e).__name__}", _NORMAL, "issuer_down")]
    return [_key_set(answer), _clock(sight, answer)]


def _key_set(answer: httpx.Response) -> Finding:
    if answer.status_code != 200:
        return bad("issuer", f"answers {answer.status_code}", _NORMAL, "issuer_down")
    try:
        published = json.loads(answer.content)["keys"]
        usable = [k for k in published if k.get("use", "sig") == "sig" and k.get("kty") in ("RSA", "EC", "OKP")]
    except (ValueError, KeyError, TypeError, AttributeError):
        return bad("issuer", "answers something that is no key set", _NORMAL, "keys_unusable")
    seen = (
        f"{len(usable)} of {len(published)} keys are for signatures, in {answer.elapsed.total_seconds() * 1e3:.0f} ms"
    )
    return good("issuer", seen, _NORMAL) if usable else bad("issuer", seen, _NORMAL, "keys_unusable")


def _clock(sight: Sight, answer: httpx.Response) -> Finding:
    leeway = sight.settings.jwt_leeway_seconds
    normal = f"within {leeway:g} s of the issuer's"
    try:
        theirs = parsedate_to_datetime(answer.headers["Date"])
    except (KeyError, ValueError):
        return unseen("clock", "the issuer's answer has no date", normal)
    off = (datetime.now(UTC) - theirs).total_seconds()
    seen = f"{off:+.0f} s"
    return bad("clock", seen, normal, "clock_off") if abs(off) > leeway + 1 else good("clock", seen, normal)
