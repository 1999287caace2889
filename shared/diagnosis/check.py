"""The checks of each subject, and how one runs.

A check returns what it saw. When it cannot look, whatever the reason, that is its finding: one that crashed would take
the others' findings with it, and one that said nothing would look like health.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import NamedTuple

from shared.diagnosis import books, edge, issuer, played, store, table, tenant
from shared.diagnosis.finding import Diagnosis, Finding, Subject, unseen
from shared.diagnosis.sight import SAMPLE_SECONDS, Sight
from shared.errors import EngramError
from shared.log import get_logger
from shared.settings import Settings

log = get_logger("diagnosis")


class Check(NamedTuple):
    """`look` may raise; `run` does not."""

    name: str
    look: Callable[[Sight], Finding | Iterable[Finding]]


_GATEWAY = Check("gateway", edge.ready)
_PROMETHEUS = Check("prometheus", edge.prometheus)
_CONTROL_PLANE = Check("control-plane", books.control_plane)
_WORKERS = Check("workers", edge.workers)
_VOLUME = Check("volume", played.volume)
CHECKS: Mapping[Subject, tuple[Check, ...]] = {
    "auth": (
        _GATEWAY,
        _PROMETHEUS,
        Check("auth-failures", edge.auth_failures),
        Check("keys", played.keys),
        Check("clock", issuer.clock),
        _WORKERS,
    ),
    "tenant-db": (
        _GATEWAY,
        _PROMETHEUS,
        _CONTROL_PLANE,
        _VOLUME,
        Check("open-failures", edge.open_failures),
        Check("errors", edge.errors),
        Check("permissions", played.permission),
        Check("maintenance", tenant.maintenance),
        Check("database", tenant.databases),
    ),
    "latency": (
        _GATEWAY,
        _PROMETHEUS,
        Check("latency", edge.latency),
        Check("errors", edge.errors),
        Check("refusals", edge.refusals),
        _WORKERS,
        Check("machine", edge.machine),
        Check("busiest-tenant", played.tenants),
        _VOLUME,
    ),
    "metering": (
        _GATEWAY,
        _PROMETHEUS,
        _CONTROL_PLANE,
        _VOLUME,
        Check("spool", books.spool),
        Check("usage-writes", books.writes),
        Check("partitions", books.partitions),
    ),
    "backups": (
        _CONTROL_PLANE,
        _VOLUME,
        Check("object-store", store.reachable),
        Check("last-good-backup", store.ages),
        Check("corrupt-backups", store.corrupt),
        Check("restore-tests", store.drills),
    ),
}


def run(check: Check, sight: Sight) -> list[Finding]:
    """What a check saw; one finding that says why, when it could not look."""
    try:
        found = check.look(sight)
        return [found] if isinstance(found, Finding) else list(found)
    except EngramError as e:
        return [unseen(check.name, e)]
    except Exception as e:  # the edge of a check: a driver's error, or a bug of ours, must not hide what others saw
        log.error("check_failed", check=check.name, exc_info=e)
        return [unseen(check.name, f"{type(e).__name__}: {e}")]


def conclude(settings: Settings, subject: Subject, tenant_id: str | None, findings: Iterable[Finding]) -> Diagnosis:
    """All findings and the one proposal."""
    found = list(findings)
    return Diagnosis(subject, tenant_id, settings.machine_id, datetime.now(UTC), found, table.decide(found))


def diagnose(
    settings: Settings, subject: Subject, tenant_id: str | None = None, *, sample_seconds: float = SAMPLE_SECONDS
) -> Diagnosis:
    """The subject's checks side by side, in threads of this process."""
    checks = CHECKS[subject]
    with Sight(settings, tenant_id, sample_seconds=sample_seconds) as sight, ThreadPoolExecutor(len(checks)) as threads:
        found = [finding for findings in threads.map(lambda c: run(c, sight), checks) for finding in findings]
    return conclude(settings, subject, tenant_id, found)
