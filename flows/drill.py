"""restore-test: pick → download → smoke → record, drill by drill. One that fails ends the run Failed, with its report;
the others go on. With Litestream on, its copies of the same tenants are tested too, and recorded apart (copy)."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import Field

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from flows.missed import superseded
from shared import drill as core
from shared import litestream, litestream_drill
from shared.drill import Drilled, Fetched, Picked, Trend
from shared.litestream_drill import CopyDrilled

_BARS = "▁▂▃▄▅▆▇█"


@task(name="pick", **policy.READ)
def pick(tenant_id: str | None, backup_id: str | None, count: int | None) -> list[Picked]:
    return core.select(control_plane(), configuration(), tenant_id=tenant_id, backup_id=backup_id, count=count)


@task(name="download", task_run_name="download-{picked.tenant_id}", **policy.ONCE)
def download(picked: Picked, sandbox: Path) -> Fetched:
    return core.fetch(objects(), picked, sandbox, control_plane())


@task(name="smoke", task_run_name="smoke-{fetched.picked.tenant_id}", **policy.ONCE)
def smoke(fetched: Fetched) -> Drilled:
    return core.run(control_plane(), objects(), fetched)


@task(name="record", task_run_name="record-{drilled.picked.tenant_id}", **policy.READ)
def record(drilled: Drilled) -> Drilled:
    return core.record(control_plane(), drilled, flow_run_id=artifact.flow_run_id())


@task(name="copy", task_run_name="copy-{tenant_id}", **policy.ONCE)
def copy(tenant_id: str, reason: str, sandbox: Path) -> CopyDrilled:
    drilled = litestream_drill.run(configuration(), objects(), tenant_id, sandbox, reason=reason)
    return litestream_drill.record(control_plane(), drilled, flow_run_id=artifact.flow_run_id())


@flow(name="restore-test", flow_run_name="restore-test", **policy.FLOW)
def restore_test(
    tenant_id: str | None = None,
    backup_id: str | None = None,
    count: Annotated[int, Field(ge=1, le=100_000)] | None = None,
) -> dict[str, Any] | State[dict[str, Any]]:
    """Restore backups into a sandbox and prove that they work, without touching the tenants.

    Args:
        tenant_id: The tenant to drill. None lets the selection policy choose.
        backup_id: With a tenant, which of its backups. None takes the newest.
        count: Without a tenant, how many are drilled. None takes the share of the settings.
    """
    if (missed := superseded()) is not None:
        return missed
    picked = pick(tenant_id or None, backup_id or None, count)
    names = [one.tenant_id for one in picked]
    artifact.rename_run(f"restore-test-{names[0]}" + (f"-and-{len(names) - 1}-more" if len(names) > 1 else ""))
    drilled: list[Drilled] = []
    copies: list[CopyDrilled] = []
    with core.sandbox(configuration()) as sandbox:
        for one in picked:
            drilled.append(record(smoke(download(one, sandbox))))
            if litestream.enabled(configuration()) and backup_id is None:
                copies.append(copy(one.tenant_id, one.reason, sandbox))
    _report(drilled, copies, core.trend(control_plane(), names[0] if len(names) == 1 else None))
    every: list[Drilled | CopyDrilled] = [*drilled, *copies]
    bad = [d for d in every if d.outcome != "pass"]
    worst = "fail" if any(d.outcome == "fail" for d in bad) else "inconclusive" if bad else "pass"
    tests = [d.as_dict() for d in drilled]
    result = {**(tests[0] if len(tests) == 1 else {}), "outcome": worst, "tests": tests}
    result |= {"copies": [c.as_dict() for c in copies]} if litestream.enabled(configuration()) else {}
    if bad:
        causes = "; ".join(_first_failure(d) for d in bad[:5])
        return Failed(message=f"{len(bad)} of {len(every)} restore tests did not pass: {causes}", data=result)
    return result


def _first_failure(drilled: Drilled | CopyDrilled) -> str:
    of = f"{drilled.picked.tenant_id}" if isinstance(drilled, Drilled) else f"Litestream's copy of {drilled.tenant_id}"
    failed = next(check for check in drilled.checks if not check.passed)
    return f"{of} {drilled.outcome}: {failed.name}: {failed.seen}"


def _report(drilled: list[Drilled], copies: list[CopyDrilled], trend: Trend) -> None:
    passed = sum(d.outcome == "pass" for d in drilled)
    tables = [_overview(drilled)]
    tables += [_copies(copies)] if copies else []
    tables += [_checks(d) for d in drilled if len(drilled) == 1 or d.outcome != "pass"][:20]
    tables += ["## The last drills, oldest first", _trend(trend)]
    if trend.never_total:
        left = trend.never_total - len(trend.never)
        more = f" and {left} more, all listed by `engram restore-test --never`" if left else ""
        tables.append(f"{trend.never_total} tenants with a backup were never drilled: {', '.join(trend.never)}{more}.")
    else:
        tables.append("Every tenant with a backup was drilled at least once.")
    one = drilled[0].picked.tenant_id if len(drilled) == 1 else None
    artifact.report(
        artifact.key("restore-test", one) if one else "restore-test",
        f"Restore test of {one}: {drilled[0].outcome}" if one else "Restore tests",
        f"{passed} of {len(drilled)} restore tests passed",
        {},
        *tables,
    )


def _overview(drilled: list[Drilled]) -> str:
    return artifact.table(
        ("tenant", "outcome", "why this one", "backup", "taken at", "RTO in ms", "download", "decrypt", "verify",
         "smoke", "RPO in seconds", "newest memory's age in seconds"),
        (
            (d.picked.tenant_id, d.outcome, d.picked.reason, d.picked.backup.backup_id, d.picked.backup.ts, d.rto_ms,
             d.download_ms, d.decrypt_ms, d.verify_ms, d.smoke_ms, d.rpo_seconds, d.sentinel_age_seconds)
            for d in drilled
        ),
    )  # fmt: skip


def _copies(copies: list[CopyDrilled]) -> str:
    return "## Litestream's copies\n\n" + artifact.table(
        ("tenant", "outcome", "state", "of", "RTO in ms", "seen"),
        (
            (c.tenant_id, c.outcome, c.point, c.point.at if c.point else None, c.rto_ms, "; ".join(
                check.seen for check in c.checks if not check.passed) or "every check held")
            for c in copies
        ),
    )  # fmt: skip


def _checks(drilled: Drilled) -> str:
    rows = ((c.name, c.passed, c.seen, c.ms) for c in drilled.checks)
    return f"## {drilled.picked.tenant_id}\n\n" + artifact.table(("check", "held", "seen", "ms"), rows)


def _trend(trend: Trend) -> str:
    """Outcomes and two lines of bars, each from 0 to its largest value; then the figures."""
    drills = trend.drills[::-1]
    outcomes = "".join({"pass": "✓", "fail": "✗"}.get(d["outcome"], "?") for d in drills)
    bars = artifact.table(
        ("outcome", "RTO", "RPO"),
        [(outcomes, _bars([d["rto_ms"] for d in drills]), _bars([d["rpo_seconds"] for d in drills]))],
    )
    rows = ((d["finished_at"], d["tenant_id"], d["outcome"], d["rto_ms"], d["rpo_seconds"]) for d in drills)
    return bars + "\n\n" + artifact.table(("at", "tenant", "outcome", "RTO in ms", "RPO in seconds"), rows)


def _bars(values: list[float | None]) -> str:
    most = max((v or 0.0 for v in values), default=0.0) or 1.0
    return "".join(_BARS[min(7, int(8 * (v or 0.0) / most))] for v in values)
