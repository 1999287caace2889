"""restore-undo: plan → copy → lock → swap → verify → release. The last restore taken back, the same safe way.

Undoing twice is undoing the undo: each makes `engram.db.bak` the database it replaced.
"""

from typing import Annotated, Any

from prefect import flow, task
from pydantic import Field

from flows import machine, policy, restore_report
from flows.core import configuration, control_plane
from flows.restore import recorded, replace
from shared import plan as planning
from shared import restore as core
from shared.plan import Plan
from shared.restore import Hold, Staged
from shared.tenant import TENANT_ID_PATTERN


@task(name="plan", **policy.READ)
def plan(tenant_id: str) -> Plan:
    return planning.plan_undo(configuration(), control_plane(), tenant_id)


@task(name="copy", **policy.READ)
def copy(chosen: Plan, hold: Hold) -> Staged:
    return core.copy_previous(hold, chosen)


@flow(name="restore-undo", flow_run_name="restore-undo-{tenant_id}", **policy.FLOW)
def restore_undo(
    tenant_id: Annotated[str, Field(pattern=TENANT_ID_PATTERN)],
    dry_run: bool = False,
    reason: Annotated[str, Field(max_length=500)] = "",
    requested_by: Annotated[str, Field(max_length=100)] = "operator",
) -> dict[str, Any]:
    """Bring back the database from before the last restore. What was written since stays in engram.db.bak.

    Args:
        tenant_id: The tenant whose last restore is taken back.
        dry_run: Only report the plan (what comes back, writes that would leave the live database).
        reason: Why. Written into the lease and the restores table.
        requested_by: Who asks for it.
    """
    if (elsewhere := machine.forwarded(tenant_id)) is not None:
        return elsewhere
    chosen = plan(tenant_id)
    if dry_run:
        return restore_report.planned(chosen)
    with recorded(chosen, requested_by, reason) as hold:
        staged = copy(chosen, hold)
        released = replace(chosen, staged, None, reason or "undo")
    return restore_report.done(chosen, staged, released, None)
