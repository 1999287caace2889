"""restore: plan → download → lock → swap → verify → release, as in the runbook."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from pydantic import Field

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from shared import plan as planning
from shared import restore as core
from shared.errors import CorruptDatabase
from shared.lease import Lease
from shared.plan import Plan
from shared.restore import Hold, Released, Staged, Swapped, Verified
from shared.tenant import TENANT_ID_PATTERN


@task(name="plan", **policy.READ)
def plan(tenant_id: str, backup_id: str | None, at: datetime | None) -> Plan:
    return planning.plan(configuration(), control_plane(), tenant_id, backup_id=backup_id, at=at)


@task(name="download", **policy.READ)
def download(chosen: Plan, hold: Hold) -> Staged:
    size_bytes = chosen.backup.size_bytes
    progress = artifact.Progress("restore-download", f"{size_bytes:,} bytes")
    return core.download(objects(), hold, chosen, progress=lambda received: progress.show(received, size_bytes))


@task(name="lock", **policy.ONCE)
def lock(staged: Staged, reason: str) -> Lease:
    return core.lock(staged, holder=f"restore {staged.plan.restore_id}", reason=reason)


@task(name="swap", **policy.ONCE)
def swap(staged: Staged, lease: Lease) -> Swapped:
    return core.swap(staged, lease)


@task(name="verify", **policy.ONCE)
def verify(swapped: Swapped) -> Verified:
    return core.verify(swapped)


@task(name="put back", **policy.ONCE)
def put_back(swapped: Swapped) -> Swapped:
    return core.put_back(swapped)


@task(name="release", **policy.FINISH)
def release(chosen: Plan, lease: Lease, verified: Verified) -> Released:
    return core.release(chosen, lease, verified)


@flow(name="restore", flow_run_name="restore-{tenant_id}", **policy.FLOW)
def restore(
    tenant_id: Annotated[str, Field(pattern=TENANT_ID_PATTERN)],
    backup_id: UUID | None = None,
    at: datetime | None = None,
    dry_run: bool = False,
    reason: Annotated[str, Field(max_length=500)] = "",
    requested_by: Annotated[str, Field(max_length=100)] = "operator",
) -> dict[str, Any]:
    """Replace a tenant's live database by a verified backup. Writes pause for milliseconds; the old one is kept.

    Args:
        tenant_id: The tenant whose database is replaced.
        backup_id: A backup's id from the catalogue. None takes the newest verified one.
        at: Take the newest verified backup not after this time. Not together with backup_id.
        dry_run: Only report the plan (backup, age, writes that would be lost); change nothing.
        reason: Why. Written into the lease and the restores table.
        requested_by: Who asks for this restore.
    """
    chosen = plan(tenant_id, str(backup_id) if backup_id else None, at)
    if dry_run:
        return _report_plan(chosen)
    with (
        _recorded(chosen, requested_by, reason),
        core.holding(configuration(), control_plane(), tenant_id) as hold,
    ):
        staged = download(chosen, hold)
        lease = lock(staged, reason or "restore")
        swapped = swap(staged, lease)
        try:
            verified = verify(swapped)
        except CorruptDatabase:
            get_run_logger().error("the restored database does not verify; putting the old one back")
            release(chosen, lease, verify(put_back(swapped)))
            raise
        released = release(chosen, lease, verified)
    return _report(chosen, staged, released)


@contextmanager
def _recorded(chosen: Plan, requested_by: str, reason: str) -> Iterator[None]:
    """The `restores` row and, when the run ends badly, its cause there and in an artifact."""
    core.begin(
        control_plane(),
        chosen,
        requested_by=requested_by,
        reason=reason,
        flow_run_id=artifact.flow_run_id(),
    )
    try:
        yield
    except BaseException as e:  # a cancellation too; always raised on
        core.fail(control_plane(), chosen, e)
        artifact.report(
            artifact.key("restore", chosen.tenant_id),
            f"Restore of {chosen.tenant_id} failed",
            f"{type(e).__name__}: {e}",
            _facts(chosen),
        )
        raise


def _facts(chosen: Plan) -> dict[str, Any]:
    return {
        "tenant": chosen.tenant_id,
        "backup": chosen.backup.backup_id,
        "taken at": chosen.backup.ts,
        "age in seconds": chosen.age_seconds,
        "size in bytes": chosen.backup.size_bytes,
        "sha256": chosen.backup.sha256,
        "schema version": chosen.backup.schema_version,
        "memories in the backup": chosen.backup.manifest.get("memories"),
        "memories in the live database": chosen.live_memories
        if chosen.live_error is None
        else f"unreadable: {chosen.live_error}",
        "live writes after the backup": chosen.writes_lost,
    }


def _schema_change(staged: Staged) -> str:
    stored, now = staged.migrated_from, staged.manifest.schema_version
    return f"v{now}, unchanged" if stored == now else f"v{stored}, migrated to v{now} on the copy"


def _report_plan(chosen: Plan) -> dict[str, Any]:
    sentence = f"Dry run: nothing was changed; {chosen.writes_lost or 0} live writes would be lost"
    if chosen.live_error is not None:
        sentence = "Dry run: nothing was changed; the live database cannot be read"
    artifact.report(artifact.key("restore", chosen.tenant_id), f"Plan for {chosen.tenant_id}", sentence, _facts(chosen))
    return {"tenant_id": chosen.tenant_id, "backup_id": str(chosen.backup.backup_id), "outcome": "dry_run"}


def _report(chosen: Plan, staged: Staged, released: Released) -> dict[str, Any]:
    artifact.report(
        artifact.key("restore", chosen.tenant_id),
        f"Restore of {chosen.tenant_id}",
        f"Restored to {artifact.cell(chosen.backup.ts)}; writes were held for {released.locked_ms:.1f} ms",
        {
            **_facts(chosen),
            "outcome": released.outcome,
            "writes held for ms": released.locked_ms,
            "active generation": released.generation,
            "schema": _schema_change(staged),
            "previous database": released.previous,
        },
    )
    return {
        "restore_id": str(released.restore_id),
        "tenant_id": released.tenant_id,
        "backup_id": str(released.backup_id),
        "outcome": released.outcome,
        "locked_ms": released.locked_ms,
        "previous": str(released.previous) if released.previous else None,
    }
