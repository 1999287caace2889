"""backup: choose → back-up. One run for all tenants of a machine; what fails is listed, the rest goes on."""

from collections import Counter
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from shared import backup as backup_core
from shared import fleet as core
from shared import registry
from shared.errors import Permanent
from shared.fleet import Chosen, Done, Run
from shared.receipt import Receipt

_LISTED = 200  # tenants in the report; all that failed come first


class Tenants(Receipt, frozen=True):
    """Whom a run is for: one value, so that Prefect does not look into thousands."""

    chosen: list[Chosen]


@task(name="choose", **policy.READ)
def choose(run: Run, tenants: list[str] | None) -> Tenants:
    began = core.begin(control_plane(), run)
    found = core.choose(control_plane(), run, tenants)
    get_run_logger().info("run %s of machine %s, begun %s: %d tenants", run.run_id, run.machine_id, began, len(found))
    return Tenants(found)


@task(name="back-up", **policy.ONCE)
def back_up(run: Run, tenants: Tenants) -> list[Done]:
    """Retries are inside, tenant by tenant."""
    settings, total, log = configuration(), len(tenants.chosen), get_run_logger()
    fleet = core.Fleet(settings, control_plane(), objects(), run)
    progress = artifact.Progress("backup-progress", f"{total} tenants of machine {run.machine_id}")
    ended: list[Done] = []
    with backup_core.work(settings.data_dir / "tmp", "backup") as directory:
        for done in fleet.back_up(tenants.chosen, directory):
            ended.append(done)
            if done.error is not None:
                log.error("backup of tenant %s failed: %s", done.tenant_id, done.error)
            if progress.move(len(ended), total):
                log.info("%d of %d tenants, %d failed", len(ended), total, sum(d.error is not None for d in ended))
    fleet.record(ended)
    return ended


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
    force: bool = False,
    shard: Annotated[int, Field(ge=0)] = 0,
    shards: Annotated[int, Field(ge=1, le=1000)] = 1,
    run_id: Annotated[str, Field(max_length=100)] | None = None,
) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Take a consistent snapshot of each tenant's database, store it, read it back, enter it in the catalogue.

    Args:
        tenants: Ids of the tenants to back up now, changed or not. Leave it None when all is on.
        all: Back up every tenant of this machine that changed since its last backup.
        kind: What the catalogue says of these backups.
        force: With all, also back up tenants that did not change.
        shard: With all, only this part of the tenants, counted from 0.
        shards: Into how many parts the tenants are divided.
        run_id: Go on with this run: tenants it has finished are not done again. None starts one of its own.
    """
    settings = configuration()
    if bool(tenants) == all:
        raise Permanent("name the tenants or choose all, one of the two")
    if shard >= shards:
        raise Permanent(f"shard {shard} of {shards}: shards count from 0")
    own_id = artifact.flow_run_id()
    run = Run(
        run_id=run_id or own_id or core.new_run_id(),
        machine_id=settings.machine_id,
        kind=kind,
        shard=shard,
        shards=shards,
        force=force or bool(tenants),
        flow_run_id=own_id,
    )
    if tenants:
        named = [registry.get_active(control_plane(), t).tenant_id for t in dict.fromkeys(tenants)]
        return _end(run, back_up(run, choose(run, named)))
    with core.holding(settings, run):
        return _end(run, back_up(run, choose(run, None)))


def _end(run: Run, ended: list[Done]) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Report; Failed when any tenant failed, with the causes in the state's message."""
    failed = [done for done in ended if done.error is not None]
    _report(run, ended, failed)
    results = [done.as_dict() for done in ended]
    if failed:
        causes = "; ".join(f"{done.tenant_id}: {done.error}" for done in failed[:5])
        return Failed(message=f"{len(failed)} of {len(ended)} backups failed: {causes}", data=results)
    return results


def _report(run: Run, ended: list[Done], failed: list[Done]) -> None:
    skipped = sum(done.skipped for done in ended)
    made = [done for done in ended if not done.skipped and done.error is None]
    said = [f"{len(made)} of {len(ended)} tenants backed up", f"{skipped} unchanged", f"{len(failed)} failed"]
    shown = sorted(ended, key=lambda done: (done.error is None, done.skipped))[: max(_LISTED, len(failed))]
    causes = Counter(done.error for done in failed).most_common(10)
    artifact.report(
        "backup",
        "Backup",
        ", ".join(said),
        {
            "machine": run.machine_id,
            "shard": f"{run.shard} of {run.shards}",
            "run": run.run_id,
            "bytes": sum(done.size_bytes or 0 for done in made),
        },
        *([artifact.table(("cause", "tenants"), causes)] if len(failed) > _LISTED else []),
        artifact.table(
            ("tenant", "result", "size_bytes", "backup_id", "key"),
            (
                (d.tenant_id, d.error or ("unchanged" if d.skipped else "ok"), d.size_bytes, d.backup_id, d.key)
                for d in shown
            ),
        ),
        *([f"{len(ended) - len(shown)} more tenants are not listed."] if len(shown) < len(ended) else []),
    )
