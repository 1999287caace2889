"""The token issuer's clock against ours: tokens carry its time. Its keys are the playbook's to look at (`played`)."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from shared.diagnosis.finding import Finding, bad, good, unseen
from shared.diagnosis.sight import HTTP_TIMEOUT_SECONDS, Sight
from shared.settings import redact_url


def clock(sight: Sight) -> Finding:
    """By the date of the issuer's answer, which is in whole seconds."""
    leeway, url = sight.settings.jwt_leeway_seconds, sight.settings.jwks_url
    name, normal = "clock", f"within {leeway:g} s of the issuer's"
    if not url:
        return unseen(name, "ENGRAM_JWKS_URL is not set", normal)
    try:
        theirs = parsedate_to_datetime(httpx.get(url, timeout=HTTP_TIMEOUT_SECONDS).headers["Date"])
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        return unseen(name, f"no answer at {redact_url(url)}: {e or type(e).__name__}", normal)
    except (KeyError, ValueError):
        return unseen(name, "the issuer's answer has no date", normal)
    off = (datetime.now(UTC) - theirs).total_seconds()
    seen = f"{off:+.0f} s"
    return bad(name, seen, normal, "clock_off") if abs(off) > leeway + 1 else good(name, seen, normal)
