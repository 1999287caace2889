"""retention: ahead → expired → drop → audit. The days of usage that will be needed are made, those too old go.

What keeps a day from being dropped is a failed run, not a green one: rollups that differ from the day's events want a
person. The other days are dropped all the same.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow, get_run_logger, task

from flows import artifact, policy
from flows.core import configuration, control_plane
from shared import partitions as core
from shared.errors import Permanent
from shared.partitions import Dropped, Expired


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
    """The days beyond the retention, each compared with its rollups."""
    found = core.expired(control_plane(), configuration())
    get_run_logger().info("%d days beyond the retention", len(found))
    return found


@task(name="drop", task_run_name="drop-{found.day}", **policy.READ)
def drop(found: Expired) -> Dropped:
    return core.drop(control_plane(), configuration(), found)


@task(name="audit", **policy.READ)
def audit(_dropped: list[Dropped]) -> int:
    """Remove the audit rows of segments drained before the retention; how many."""
    before = datetime.now(UTC) - timedelta(days=configuration().usage_retention_days)
    removed = 0
    while portion := control_plane().execute("usage_segments_expire", before=before):
        removed += portion
    return removed


@flow(name="retention", flow_run_name="retention", **policy.FLOW)
def retention(dry_run: bool = False) -> dict[str, Any]:
    """Make the days that usage will need and drop those beyond the retention. Rollups are never dropped.

    Args:
        dry_run: Report what would be dropped and change nothing.
    """
    facts = {"retention in days": configuration().usage_retention_days, **ahead(dry_run)}
    found = expired(facts)
    kept = [day for day in found if not day.droppable]
    dropped = [] if dry_run else [drop(day) for day in found if day.droppable]
    if not dry_run:
        facts["audit rows removed"] = audit(dropped)
    outcome = {day.day: "would be dropped" if dry_run else "not dropped" for day in found if day.droppable}
    outcome |= {day.day: "kept: its events and rollups differ" for day in kept}
    outcome |= {day.day: "dropped" for day in dropped}
    artifact.report(
        "retention",
        "Retention",
        f"{len(dropped)} of {len(found)} days beyond the retention dropped" + (" (dry run)" if dry_run else ""),
        facts,
        artifact.table(
            ("day", "state before", "events", "size_bytes", "tenants_differing", "outcome"),
            ((d.day, d.state, d.events, d.size_bytes, d.tenants_differing, outcome[d.day]) for d in found),
        ),
    )
    if kept:
        raise Permanent(
            "; ".join(f"{d.day}: the events and rollups of {d.tenants_differing} tenants differ" for d in kept)
        )
    return {"dropped": [str(d.day) for d in dropped], "expired": [str(d.day) for d in found], **facts}
