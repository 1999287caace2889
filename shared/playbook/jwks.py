"""Auth outages: what the issuer serves now against what each gateway worker holds, and fetching it everywhere."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import httpx

from shared import jwk, workers
from shared.errors import Transient
from shared.jwk import MAX_BYTES, VerificationKey
from shared.playbook import limit
from shared.playbook.action import Context, Finding, Outcome, Request
from shared.settings import Settings, redact_url
from shared.workers import Keys, Report


class IssuerUnavailable(Transient):
    """The issuer's keys cannot be had: it does not answer, or with something that is no key set."""


def serves(settings: Settings) -> dict[str | None, VerificationKey]:
    """The usable keys that the issuer publishes now, by id. Raises `IssuerUnavailable`."""
    settings.require("jwks_url")
    url = redact_url(settings.jwks_url)
    body = b""
    deadline = time.monotonic() + settings.jwks_timeout_seconds
    try:
        with (
            httpx.Client(timeout=settings.jwks_timeout_seconds) as client,
            client.stream("GET", settings.jwks_url, headers={"Accept-Encoding": "identity"}) as response,
        ):
            response.raise_for_status()
            for piece in response.iter_raw():
                body += piece
                if len(body) > MAX_BYTES or time.monotonic() > deadline:
                    raise IssuerUnavailable(f"{url} sends too much, or too slowly")
        keys = jwk.usable_keys(jwk.published(body))
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError, RecursionError) as e:
        raise IssuerUnavailable(f"{url}: {type(e).__name__}: {redact_url(str(e))[:300]}") from e
    if not keys:
        raise IssuerUnavailable(f"{url} publishes no key that may be used")
    return keys


def status(context: Context, request: Request, _: Any) -> Outcome:
    """Is every worker able to verify what the issuer signs now? One that met no token yet needs none."""
    settings = context.settings
    findings: list[Finding] = []
    served: list[str] | None = None
    try:
        keys = serves(settings)
        served = _kids(keys)
        algorithms = ", ".join(f"{kid or '-'} {key.algorithm}" for kid, key in keys.items())
        findings.append(Finding("issuer", algorithms, "answers with at least one usable key", True))
    except IssuerUnavailable as e:
        findings.append(Finding("issuer", str(e), "answers with at least one usable key", False))
    reports = workers.reports(settings)
    table: list[dict[str, Any]] = []
    for pid, report in sorted(reports.items()):
        keys_held = report.keys if report is not None else Keys([])
        age_seconds = None if keys_held.asked_at is None else round(time.time() - keys_held.asked_at, 1)
        asked = keys_held.asked_at is not None or keys_held.failed != ""
        missing = sorted(set(served or ()) - set(keys_held.kids)) if asked else []
        table.append(
            {
                "worker": pid,
                "kids": keys_held.kids,
                "missing": missing,
                "withdrawn": sorted(set(keys_held.kids) - set(served)) if served is not None else [],
                "age_seconds": age_seconds,
                "failing": keys_held.failed,
            }
        )
    oldest = max((row["age_seconds"] for row in table if row["age_seconds"] is not None), default=None)
    limit_seconds = settings.jwks_ttl_seconds + settings.jwks_timeout_seconds
    never = [row["worker"] for row in table if row["age_seconds"] is None and row["failing"]]
    without = [row["worker"] for row in table if row["missing"]]
    old = oldest is not None and oldest > limit_seconds
    failing = [row["worker"] for row in table if row["failing"]]
    findings += [
        Finding("workers", len(table), "at least 1", bool(table)),
        Finding("workers without keys", never, "none", not never),
        Finding("workers without a key that is served", without, "none", not without if served is not None else None),
        Finding("workers whose last fetch failed", failing, "none", not failing),
        Finding("oldest keys (s)", oldest, f"at most {limit_seconds:g}", None if oldest is None else not old),
    ]
    bad = [finding.name for finding in findings if finding.ok is False]
    said = f"{len(served)} keys served" if served is not None else "the issuer does not answer"
    return Outcome(
        action=request.action,
        kind="read",
        target=redact_url(settings.jwks_url),
        summary=f"{said}; " + (f"not as it should be: {', '.join(bad)}" if bad else "every worker holds them"),
        findings=findings,
        tables={"workers": table},
        proposal=["engram", "act", "refresh-jwks", "--reason", "keys are missing"] if without or never else [],
    )


def refresh(context: Context, request: Request, _: Any) -> Outcome:
    """Every worker fetches the issuer's keys now, and drops the tokens it verified with keys that are gone."""
    settings = context.settings
    before = _held(workers.reports(settings))
    fetched: dict[int, bool] = {}
    if not request.dry_run:
        asked = limit.once(context, request, "jwks_refresh")

        def is_fresh(report: Report) -> bool:
            return report.keys.asked_at is not None and report.keys.asked_at >= asked.set_at and not report.keys.failed

        patience_seconds = limit.OBEYED_SECONDS + settings.limits_poll_seconds + settings.jwks_timeout_seconds
        fetched = dict(workers.wait_until_said(settings, is_fresh, patience_seconds))
    after = before if request.dry_run else _held(workers.reports(settings))
    failed = sum(not fresh for fresh in fetched.values())
    said = f"fetched by {len(fetched) - failed} of {len(fetched)} workers" if fetched else "no worker was asked"
    return Outcome(
        action=request.action,
        kind="reversible",
        target="jwks",
        summary=said,
        before=before,
        after=after,
        dry_run=request.dry_run,
        verified=not failed if fetched else None,
        workers=fetched,
    )


def _held(reports: dict[int, Report | None]) -> dict[str, Any]:
    """By pid: the keys and when they were asked for."""
    return {
        str(pid): None
        if report is None
        else {
            "kids": report.keys.kids,
            "asked_at": None
            if report.keys.asked_at is None
            else datetime.fromtimestamp(report.keys.asked_at, UTC).isoformat(),
            "failed": report.keys.failed,
        }
        for pid, report in sorted(reports.items())
    }


def _kids(keys: dict[str | None, VerificationKey]) -> list[str]:
    return sorted(kid or "-" for kid in keys)
