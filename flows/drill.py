"""restore-test: pick → download → smoke → record. A drill that fails ends the run Failed, with its report."""

from pathlib import Path
from typing import Any

from prefect import flow, task

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from shared import drill as core
from shared.drill import Drilled, Fetched, Picked
from shared.errors import CorruptBackup, ObjectStoreUnavailable


@task(name="pick", **policy.READ)
def pick(tenant_id: str | None) -> Picked:
    return core.pick(control_plane(), tenant_id)


@task(name="download", **policy.ONCE)
def download(picked: Picked, sandbox: Path) -> Fetched:
    return core.fetch(objects(), picked, sandbox, control_plane())


@task(name="smoke", **policy.ONCE)
def smoke(fetched: Fetched) -> Drilled:
    return core.run(fetched)


@task(name="record", **policy.READ)
def record(drilled: Drilled) -> Drilled:
    return core.record(control_plane(), drilled, flow_run_id=artifact.flow_run_id())


@flow(name="restore-test", flow_run_name="restore-test", **policy.FLOW)
def restore_test(
    tenant_id: str | None = None,
) -> dict[str, Any]:
    """Restore a backup into a sandbox and prove that it works, without touching the tenant.

    Args:
        tenant_id: The tenant to drill. None takes the one least recently drilled.
    """
    picked = pick(tenant_id or None)
    artifact.rename_run(f"restore-test-{picked.tenant_id}")
    with core.sandbox(configuration()) as sandbox:
        fetched = download(picked, sandbox)
        drilled = record(smoke(fetched))
    _report(drilled)
    if drilled.outcome == "fail":
        raise CorruptBackup(f"restore test of {picked.tenant_id} failed: {_first_failure(drilled)}")
    if drilled.outcome == "inconclusive":
        raise ObjectStoreUnavailable(f"restore test of {picked.tenant_id} is inconclusive: {_first_failure(drilled)}")
    return {
        "test_id": str(picked.test_id),
        "tenant_id": picked.tenant_id,
        "backup_id": str(picked.backup.backup_id),
        "outcome": drilled.outcome,
        "rto_ms": drilled.rto_ms,
        "rpo_seconds": drilled.rpo_seconds,
        "checks": [check.as_dict() for check in drilled.checks],
    }


def _first_failure(drilled: Drilled) -> str:
    return next(f"{check.name}: {check.seen}" for check in drilled.checks if not check.passed)


def _report(drilled: Drilled) -> None:
    picked = drilled.picked
    artifact.report(
        artifact.key("restore-test", picked.tenant_id),
        f"Restore test of {picked.tenant_id}: {drilled.outcome}",
        f"{drilled.outcome}: {sum(c.passed for c in drilled.checks)} of {len(drilled.checks)} checks held",
        {
            "tenant": picked.tenant_id,
            "why this one": picked.reason,
            "backup": picked.backup.backup_id,
            "taken at": picked.backup.ts,
            "RTO in ms": drilled.rto_ms,
            "RPO in seconds": drilled.rpo_seconds,
        },
        artifact.table(("check", "held", "seen", "ms"), ((c.name, c.passed, c.seen, c.ms) for c in drilled.checks)),
    )
