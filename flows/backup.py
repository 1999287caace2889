"""backup: snapshot → upload → register for each tenant asked for; what fails is listed, the rest goes on."""

from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from shared import backup as core
from shared import registry
from shared.catalogue import Backup, Stored
from shared.errors import EngramError, Permanent
from shared.snapshot import Snapshot


@task(name="snapshot", task_run_name="snapshot-{tenant_id}", **policy.READ)
def snapshot(tenant_id: str, directory: Path) -> Snapshot:
    return core.take(configuration(), tenant_id, directory)


@task(name="upload", **policy.READ)
def upload(taken: Snapshot) -> Stored:
    return core.store(objects(), taken)


@task(name="register", **policy.READ)
def register(stored: Stored, kind: str) -> Backup:
    return core.register(control_plane(), stored, kind=kind, flow_run_id=artifact.flow_run_id())


def run_name() -> str:
    """backup-all, backup-acme, or backup-acme-and-3-more."""
    parameters = flow_run.get_parameters() or {}
    tenants = parameters.get("tenants") or ["all"]
    return f"backup-{tenants[0]}" + (f"-and-{len(tenants) - 1}-more" if len(tenants) > 1 else "")


@flow(name="backup", flow_run_name=run_name, **policy.FLOW)
def backup(
    tenants: list[str] | None = None,
    all: bool = False,
    kind: Literal["manual", "scheduled"] = "manual",
) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Take a consistent snapshot of each tenant's database, store it, read it back, enter it in the catalogue.

    Args:
        tenants: Ids of the tenants to back up now. Leave it None when all is on.
        all: Back up every tenant of this machine.
        kind: What the catalogue says of these backups.
    """
    chosen = _choose(tenants, all)
    results: list[dict[str, Any]] = []
    progress = artifact.Progress("backup-progress", f"{len(chosen)} tenants")
    with core.work(configuration().data_dir / "tmp", "backup") as directory:
        for done, tenant_id in enumerate(chosen, start=1):
            results.append(_one(tenant_id, directory, kind))
            progress.show(done, len(chosen))
    failed = [r for r in results if r["error"]]
    _report(results, failed)
    if failed:
        causes = "; ".join(f"{r['tenant_id']}: {r['error']}" for r in failed[:5])
        return Failed(message=f"{len(failed)} of {len(results)} backups failed: {causes}", data=results)
    return results


def _choose(tenants: list[str] | None, all_tenants: bool) -> list[str]:
    if bool(tenants) == all_tenants:
        raise Permanent("name the tenants or choose all, one of the two")
    if tenants:
        return [registry.get_active(control_plane(), t).tenant_id for t in dict.fromkeys(tenants)]
    machine = configuration().machine_id
    return [
        t.tenant_id for t in registry.list_all(control_plane()) if t.machine_id == machine and t.state != "creating"
    ]


def _one(tenant_id: str, directory: Path, kind: str) -> dict[str, Any]:
    try:
        taken = snapshot(tenant_id, directory)
        stored = upload(taken)
        made = register(stored, kind)
    except EngramError as e:
        get_run_logger().error("backup of tenant %s failed: %s", tenant_id, e)
        return _result(tenant_id, error=str(e))
    finally:
        (directory / f"{tenant_id}.sqlite").unlink(missing_ok=True)
    return _result(tenant_id, made=made)


def _result(tenant_id: str, *, made: Backup | None = None, error: str | None = None) -> dict[str, Any]:
    return {
        "tenant_id": tenant_id,
        "backup_id": str(made.backup_id) if made else None,
        "key": made.key if made else None,
        "sha256": made.sha256 if made else None,
        "size_bytes": made.size_bytes if made else None,
        "skipped": False,
        "error": error,
    }


def _report(results: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    good = len(results) - len(failed)
    artifact.report(
        "backup",
        "Backup",
        f"{good} of {len(results)} tenants backed up" + (f", {len(failed)} failed" if failed else ""),
        {"bytes": sum(r["size_bytes"] or 0 for r in results)},
        artifact.table(
            ("tenant", "result", "size_bytes", "backup_id", "key"),
            (
                (r["tenant_id"], r["error"] or "ok", r["size_bytes"], r["backup_id"], r["key"])
                for r in sorted(results, key=lambda r: r["error"] is None)
            ),
        ),
    )
