"""restore: plan → download → safety-backup → lock → swap → verify → release, as in the runbook."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from pydantic import Field

from flows import artifact, machine, policy, restore_report
from flows.core import configuration, control_plane, objects
from shared import backup as backup_core
from shared import plan as planning
from shared import restore as core
from shared.catalogue import Backup
from shared.errors import CorruptDatabase, TenantDatabaseUnavailable
from shared.lease import Lease
from shared.plan import Plan
from shared.receipt import Receipt
from shared.restore import Hold, Released, Staged, Swapped, Verified
from shared.tenant import TENANT_ID_PATTERN


class Safety(Receipt, frozen=True):
    """The safety backup, or why there is none."""

    backup: Backup | None
    error: str | None


@task(name="plan", **policy.READ)
def plan(tenant_id: str, backup_id: str | None, at: datetime | None) -> Plan:
    return planning.plan(configuration(), control_plane(), tenant_id, backup_id=backup_id, at=at, objects=objects)


@task(name="download", **policy.READ)
def download(chosen: Plan, hold: Hold) -> Staged:
    progress = artifact.Progress("restore-download", f"{chosen.size_bytes:,} bytes")
    return core.download(objects(), hold, chosen, progress=lambda received: progress.show(received, chosen.size_bytes))


@task(name="safety-backup", **policy.READ)
def safety_backup(staged: Staged) -> Safety:
    """The live database, stored before it is replaced. One that cannot be read is kept as engram.db.bak alone."""
    settings, tenant_id = configuration(), staged.plan.tenant_id
    try:
        with backup_core.work(settings.data_dir / "tmp", "safety") as directory:
            stored = backup_core.store(
                objects(), backup_core.take(settings, tenant_id, directory), control_plane(), kind="safety"
            )
    except (CorruptDatabase, TenantDatabaseUnavailable) as e:
        get_run_logger().warning("no safety backup: %s", e)
        return Safety(None, str(e))
    return Safety(
        backup_core.register(control_plane(), stored, kind="safety", flow_run_id=artifact.flow_run_id()), None
    )


@task(name="lock", **policy.ONCE)
def lock(staged: Staged, safety: Safety | None, reason: str) -> Lease:
    if safety is not None and safety.backup is not None:
        get_run_logger().info("safety backup %s", safety.backup.backup_id)
    return core.lock(staged, holder=f"{staged.plan.kind} {staged.plan.restore_id}", reason=reason)


@task(name="swap", **policy.ONCE)
def swap(staged: Staged, lease: Lease) -> Swapped:
    return core.swap(staged, lease)


@task(name="verify", **policy.ONCE)
def verify(swapped: Swapped) -> Verified:
    return core.verify(swapped)


@task(name="put-back", **policy.ONCE)
def put_back(swapped: Swapped) -> Swapped:
    return core.put_back(swapped)


@task(name="release", **policy.FINISH)
def release(chosen: Plan, lease: Lease, verified: Verified) -> Released:
    return core.release(chosen, lease, verified)


def replace(chosen: Plan, staged: Staged, safety: Safety | None, reason: str) -> Released:
    """The part that a restore and an undo have in common, from the lock to the release."""
    lease = lock(staged, safety, reason)
    swapped = swap(staged, lease)
    try:
        verified = verify(swapped)
    except CorruptDatabase:
        get_run_logger().error("the new database does not verify; putting the old one back")
        release(chosen, lease, verify(put_back(swapped)))
        raise
    return release(chosen, lease, verified)


@flow(name="restore", flow_run_name="restore-{tenant_id}", **policy.FLOW)
def restore(
    tenant_id: Annotated[str, Field(pattern=TENANT_ID_PATTERN)],
    backup_id: UUID | None = None,
    at: datetime | None = None,
    dry_run: bool = False,
    with_safety_backup: bool = True,
    reason: Annotated[str, Field(max_length=500)] = "",
    requested_by: Annotated[str, Field(max_length=100)] = "operator",
) -> dict[str, Any]:
    """Replace a tenant's live database by a verified backup. Writes pause for milliseconds; the old one is kept.

    Args:
        tenant_id: The tenant whose database is replaced.
        backup_id: A backup's id from the catalogue. None takes the newest verified one.
        at: Take the newest verified backup not after this time, or Litestream's copy (if on) when that is nearer.
        dry_run: Only report the plan (backup, age, writes that would be lost); change nothing.
        with_safety_backup: Store a backup of the live database first. One that cannot be read is kept as engram.db.bak.
        reason: Why. Written into the lease and the restores table.
        requested_by: Who asks for this restore.
    """
    if (elsewhere := machine.forwarded(tenant_id)) is not None:
        return elsewhere
    chosen = plan(tenant_id, str(backup_id) if backup_id else None, at)
    if dry_run:
        return restore_report.planned(chosen)
    with recorded(chosen, requested_by, reason) as hold:
        staged = download(chosen, hold)
        chosen = staged.plan  # of the backup, when Litestream's copy failed
        safety = safety_backup(staged) if with_safety_backup and chosen.live_error is None else None
        released = replace(chosen, staged, safety, reason or "restore")
    return restore_report.done(chosen, staged, released, safety.backup if safety else None)


@contextmanager
def recorded(chosen: Plan, requested_by: str, reason: str) -> Iterator[Hold]:
    """`shared.hold.running`, with the cause of a run that ends badly in an artifact."""
    try:
        with core.running(
            configuration(),
            control_plane(),
            chosen,
            requested_by=requested_by,
            reason=reason,
            flow_run_id=artifact.flow_run_id(),
        ) as hold:
            yield hold
    except BaseException as e:  # a cancellation too; always raised on
        restore_report.failed(chosen, e)
        raise
