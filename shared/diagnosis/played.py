"""The playbook's reading actions as checks: their findings, with the symptom each points at.

What an action could not judge is left out: it has looked, and there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from shared import workers
from shared.diagnosis.edge import is_slow
from shared.diagnosis.finding import Finding, Symptom, bad, good
from shared.diagnosis.sight import NotSeen, Sight
from shared.playbook import busiest, jwks, permissions
from shared.playbook import volume as volumes
from shared.playbook.action import Context, Request
from shared.playbook.action import Finding as Seen

DOMINANT_SHARE = 0.5
DOMINANT_RPS = 5.0
# By the names of the actions' findings; what is not named here is another check's, or nobody's.
VOLUME: Mapping[str, Symptom] = {
    "mounted read-only": "volume_read_only",
    "a file can be written": "volume_read_only",
    "free space (bytes)": "volume_full",
    "free inodes": "volume_full",
    "fsync (ms, slowest of 5)": "volume_slow",
    "its WAL (bytes)": "wal_large",
    "tenants with a large WAL": "wal_large",
}
PERMISSIONS: Mapping[str, Symptom] = {"wrong owner or mode": "permissions_wrong"}
KEYS: Mapping[str, Symptom] = {
    "issuer": "issuer_down",
    "workers without keys": "keys_unknown",
    "workers without a key that is served": "keys_unknown",
    "workers whose last fetch failed": "keys_unknown",
    "oldest keys (s)": "keys_unknown",
}


def volume(sight: Sight) -> Iterator[Finding]:
    """Space, inodes, read-only, how long an fsync takes; five small files are written and removed for that."""
    settings, tenant_id = sight.settings, sight.tenant_id
    if not settings.data_dir.is_dir():
        raise NotSeen(f"{settings.data_dir} is not there")
    seen = volumes.health(_context(sight), Request("volume-health", tenant_id), None).findings
    return _known(seen, VOLUME, path=str(settings.data_dir), tenant_id=tenant_id)


def permission(sight: Sight) -> Iterator[Finding]:
    """Of the named tenant's files; without a name those that do not open are looked at by `tenant.databases`."""
    if sight.tenant_id is None:
        return iter(())
    return wrong_permissions(sight, sight.tenant_id)


def wrong_permissions(sight: Sight, tenant_id: str) -> Iterator[Finding]:
    seen = permissions.check(_context(sight), Request("check-permissions", tenant_id), None).findings
    return _known(seen, PERMISSIONS, tenant_id=tenant_id)


def keys(sight: Sight) -> Iterator[Finding]:
    """The issuer's keys now, against those each worker holds."""
    return _known(jwks.status(_context(sight), Request("jwks-status"), None).findings, KEYS)


def tenants(sight: Sight) -> Finding:
    """One tenant that takes most is only wrong when the others wait for it."""
    reports = [report for report in workers.reports(sight.settings).values() if report is not None]
    name, normal = "busiest-tenant", f"below {DOMINANT_SHARE:.0%} of the requests while others wait"
    found = busiest.together([report.tenants for report in reports])
    served, seconds = sum(r.requests for r in reports), max((r.window_seconds for r in reports), default=0.0)
    if not found or not served or not seconds:
        return good(name, "no requests", normal)
    first, rps = found[0], found[0].requests / seconds
    seen = (
        f"{first.tenant_id}: {first.requests / served:.0%} of the requests, {rps:.1f} a second (last {seconds:.0f} s)"
    )
    dominant = len(found) > 1 and first.requests >= DOMINANT_SHARE * served and rps >= DOMINANT_RPS
    if dominant and is_slow(sight.figures):
        return bad(name, seen, normal, "tenant_dominates", tenant_id=first.tenant_id, rps=rps)
    return good(name, seen, normal)


def _no_space(seen: Seen) -> Literal["volume_full", ""]:
    """A write fails on a full volume too, and `statvfs` need not say so (quotas, reserved blocks)."""
    return "volume_full" if any(word in str(seen.seen) for word in ("space left", "quota")) else ""


def _context(sight: Sight) -> Context:
    return Context(sight.settings, None)


def _known(seen: list[Seen], symptoms: Mapping[str, Symptom], **facts: object) -> Iterator[Finding]:
    for one in seen:
        if one.name in symptoms and one.ok is not None:
            symptom = "" if one.ok else _no_space(one) or symptoms[one.name]
            yield Finding(one.name, one.seen, one.normal, one.ok, symptom, facts)
