"""retention: ahead → expired → drop → audit → plan → mark → delete → strays. What is too old goes, and why is said.

Usage: the days that will be needed are made, those too old dropped. Backups: every tenant's are held against its plan,
a page of tenants at a time; what has no place is deleted, objects that no row knows are looked at.

What keeps a day or a backup from going is a failed run, not a green one, when it wants a person: a day whose
books differ, a plan that does not exist, a store that refuses or is away. The rest goes all the same. An
object lock is no failure: its objects are listed, and tried again by the next run.
"""

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from flows.missed import superseded
from shared import expiry, keys, strays, uploads
from shared import partitions as core
from shared.bucket import Upload
from shared.errors import EngramError
from shared.expiry import Page, Planned, Removed
from shared.partitions import Dropped, Expired
from shared.receipt import Receipt
from shared.strays import Stray

_LISTED = 200  # lines of a table in the report; what failed or goes comes first


class Line(Receipt, frozen=True):
    """One tenant of the report. `kept` and `why` count reasons."""

    tenant_id: str
    plan_id: str
    kept: int
    kept_as: str
    going: int
    why: str
    problem: str | None


class Removals(Receipt, frozen=True):
    """One value, so that Prefect does not look into thousands."""

    all: list[Removed]


class Strays(Receipt, frozen=True):
    found: list[Stray]
    uploads: list[Upload]
    problems: list[str]


@task(name="ahead", **policy.READ)
def ahead(dry_run: bool) -> dict[str, Any]:
    """Make today's partition and the next days', and attach again what an earlier retention took away."""
    settings = configuration()
    taken_back = []
    if not dry_run:
        taken_back = core.take_back(control_plane(), settings)
        core.ensure_ahead(control_plane(), settings)
    row = control_plane().row("fleet_ages") or {}
    return {"days ahead": row.get("usage_partitions_ahead_days"), "taken back": ", ".join(map(str, taken_back))}


@task(name="expired", **policy.READ)
def expired(_partitions: dict[str, Any]) -> list[Expired]:
    """The days beyond the retention, each with its books."""
    found = core.expired(control_plane(), configuration())
    get_run_logger().info("%d days beyond the retention", len(found))
    return found


@task(name="drop", task_run_name="drop-{found.day}", **policy.READ)
def drop(found: Expired) -> Dropped:
    return core.drop(control_plane(), configuration(), found)


@task(name="audit", **policy.READ)
def audit(_dropped: list[Dropped]) -> int:
    """Remove the audit rows that are of no day whose events are there; how many."""
    before = core.audit_from(control_plane(), configuration())
    removed = 0
    while portion := control_plane().execute("usage_segments_expire", before=before):
        removed += portion
    held_before = datetime.now(UTC) - timedelta(days=configuration().usage_tally_days + 1)  # as long as tallies
    while control_plane().execute("usage_held_expire", before=held_before):
        pass
    return removed


@task(name="plan", task_run_name="plan-after-{after}", **policy.READ)
def plan(after: str) -> Page:
    """The next tenants' backups against their plans."""
    return expiry.plan(control_plane(), configuration(), after=after)


@task(name="mark", **policy.READ)
def mark(page: Page) -> int:
    """Decide again and take what goes off the catalogue; how many."""
    return len(expiry.mark(control_plane(), configuration(), page.planned))


@task(name="delete", **policy.READ)
def delete(marked: int) -> Removals:
    """Remove the objects of this run's and of earlier runs' rows, and deleted tenants' keys that open nothing more."""
    removed = expiry.remove(control_plane(), objects(), configuration())
    for tenant_id, count in keys.erase_left(control_plane()).items():
        get_run_logger().info("%d keys of the deleted tenant %s erased", count, tenant_id)
    get_run_logger().info("%d marked, %d attended to", marked, len(removed))
    return Removals(removed)


@task(name="strays", task_run_name="strays", **policy.READ)
def find_strays(dry_run: bool) -> Strays:
    """Objects without a row, and uploads never finished."""
    settings = configuration()
    found, aborted, problems = [], [], []
    try:
        found = list(strays.find(control_plane(), objects(), settings, dry_run=dry_run))
        aborted = uploads.clear(settings, dry_run=dry_run)
    except EngramError as e:
        problems.append(f"looking for stray objects: {e}")
    return Strays(found, aborted, problems)


def _line(planned: Planned) -> Line:
    return Line(
        planned.tenant_id,
        planned.plan_id,
        len(planned.keep),
        _counted(_kind(reason) for v in planned.keep for reason in v.reason.split(", ")),
        len(planned.delete),
        _counted(v.reason for v in planned.delete),
        planned.problem,
    )


def _kind(reason: str) -> str:
    """`daily 2026-11-23` is one of the daily ones."""
    return reason if reason == "last good" else reason.replace(":", " ").split(" ")[0]


def _counted(reasons: Iterable[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()))


def usage(dry_run: bool) -> tuple[dict[str, Any], str, list[str]]:
    """The days of usage: facts, a table, and what wants a person."""
    facts = {"retention of usage in days": configuration().usage_retention_days, **ahead(dry_run)}
    found = expired(facts)
    kept = [day for day in found if not day.droppable]
    dropped = [] if dry_run else [drop(day) for day in found if day.droppable]
    if not dry_run:
        facts["audit rows removed"] = audit(dropped)
    outcome = {day.day: "would be dropped" if dry_run else "not dropped" for day in found if day.droppable}
    outcome |= {day.day: f"kept: {day.difference}" for day in kept}
    outcome |= {day.day: "dropped" for day in dropped}
    facts |= {"dropped": [str(d.day) for d in dropped], "expired": [str(d.day) for d in found]}
    table = artifact.table(
        ("day", "state before", "events", "size_bytes", "outcome"),
        ((d.day, d.state, d.events, d.size_bytes, outcome[d.day]) for d in found),
    )
    return facts, table, [f"kept: {d.difference}" for d in kept]


def backups(dry_run: bool) -> tuple[list[Line], list[Removed]]:
    """Every tenant's backups, a page of tenants at a time: what is kept and goes, and what became of it."""
    lines: list[Line] = []
    marked, after = 0, ""
    while True:
        page = plan(after)
        lines += [_line(planned) for planned in page.planned]
        if not dry_run and any(planned.delete for planned in page.planned):
            marked += mark(page)
        if page.after is None:
            break
        after = page.after
    return lines, [] if dry_run else delete(marked).all


@flow(name="retention", flow_run_name="retention", **policy.FLOW)
def retention(dry_run: bool = False) -> dict[str, Any] | State[dict[str, Any]]:
    """Delete what is beyond the retention: backups by each tenant's plan, single usage events but never their rollups.

    Args:
        dry_run: Report what would go and change nothing.
    """
    if (missed := superseded()) is not None:
        return missed
    facts, days, problems = usage(dry_run)
    lines, removed = backups(dry_run)
    stray = find_strays(dry_run)
    problems += [f"{line.tenant_id}: {line.problem}" for line in lines if line.problem]
    problems += [f"{r.key}: {r.outcome}: {r.cause}" for r in removed if r.outcome in expiry.FAILURES]
    problems += [*stray.problems, *(f"{s.key}: {s.cause}" for s in stray.found if s.outcome == "unread")]
    going, gone = sum(line.going for line in lines), sum(r.outcome == "deleted" for r in removed)
    _report(dry_run, facts, days, lines, removed, stray, problems)
    result = {
        **facts,
        "dry_run": dry_run,
        "backups": {"kept": sum(line.kept for line in lines), "planned": going, "deleted": gone},
        "tenants": [_dict(line) for line in lines],
        "removed": [_dict(r) for r in removed],
        "strays": [_dict(s) for s in stray.found],
        "uploads": [u.key for u in stray.uploads],
        "problems": problems,
    }
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        return Failed(message="; ".join(problems[:5]) + more, data=result)
    return result


def _dict(value: Receipt) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


def _report(
    dry_run: bool,
    facts: dict[str, Any],
    days: str,
    lines: list[Line],
    removed: list[Removed],
    stray: Strays,
    problems: list[str],
) -> None:
    outcomes = Counter(r.outcome for r in removed)
    going = sum(line.going for line in lines)
    said = f"{going} backups of {sum(line.going > 0 for line in lines)} tenants would be deleted"
    if not dry_run:
        said = f"{outcomes['deleted']} backups deleted"
        said += "".join(f", {count} {outcome}" for outcome, count in outcomes.items() if outcome != "deleted")
    first = sorted(lines, key=lambda line: (line.problem is None, line.going == 0, line.tenant_id))
    artifact.report(
        "retention",
        "Retention",
        f"{said}; {len(facts['dropped'])} of {len(facts['expired'])} days of usage dropped"
        + (" (dry run)" if dry_run else "")
        + (f"; {len(problems)} problems" if problems else ""),
        {
            **{name: value for name, value in facts.items() if not isinstance(value, list)},
            "tenants": len(lines),
            "backups kept": sum(line.kept for line in lines),
            "uploads never finished, aborted": len(stray.uploads),
        },
        *(f"- {problem}" for problem in problems[:_LISTED]),
        days,
        artifact.table(
            ("tenant", "plan", "kept", "kept as", "deleted" if not dry_run else "would go", "why"),
            ((x.tenant_id, x.plan_id, x.kept, x.kept_as, x.going, x.problem or x.why) for x in first[:_LISTED]),
        ),
        artifact.table(
            ("backup still there", "outcome", "cause"),
            [(r.key, r.outcome, r.cause) for r in removed if r.outcome != "deleted"][:_LISTED],
        ),
        artifact.table(
            ("object without a row", "size_bytes", "modified", "outcome", "cause"),
            ((s.key, s.size_bytes, s.modified_at, s.outcome, s.cause) for s in stray.found[:_LISTED]),
        ),
    )
