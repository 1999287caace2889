"""backup: choose → back-up. One run for all tenants of a machine; what fails is listed, the rest goes on."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows import artifact, machine, policy
from flows.core import configuration, control_plane, objects
from flows.machine import Elsewhere
from flows.missed import superseded
from shared import backup as backup_core
from shared import fleet as core
from shared import fleet_run, registry
from shared.errors import EngramError, Permanent
from shared.fleet_run import Chosen, Done, Run
from shared.receipt import Receipt

_LISTED = 200  # tenants in the report; all that failed come first


class Tenants(Receipt, frozen=True):
    """Whom a run is for: one value, so that Prefect does not look into thousands."""

    chosen: list[Chosen]


@task(name="choose", **policy.READ)
def choose(run: Run, tenants: list[str] | None) -> Tenants:
    began = fleet_run.begin(control_plane(), run)
    found = fleet_run.choose(control_plane(), run, tenants)
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
    machine_id: Annotated[str, Field(max_length=100)] | None = None,
) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Take a consistent snapshot of each tenant's database, store it, read it back, enter it in the catalogue.

    Args:
        tenants: Ids of the tenants to back up now, changed or not. Leave it None when all is on.
        all: Back up every tenant that changed since its last backup, each on its own machine.
        kind: What the catalogue says of these backups.
        force: With all, also back up tenants that did not change.
        shard: With all, only this part of the tenants, counted from 0.
        shards: Into how many parts the tenants are divided.
        run_id: Go on with this run: tenants it has finished are not done again. None starts one of its own.
        machine_id: With all, only the tenants of this machine. None is every machine.
    """
    settings = configuration()
    if (missed := superseded()) is not None:
        return missed
    if bool(tenants) == all:
        raise Permanent("name the tenants or choose all, one of the two")
    if shard >= shards:
        raise Permanent(f"shard {shard} of {shards}: shards count from 0")
    if machine_id and not all:
        raise Permanent("a machine goes with all; named tenants have theirs")
    own_id = artifact.flow_run_id()
    run = Run(
        run_id=run_id or own_id or fleet_run.new_run_id(),
        machine_id=settings.machine_id,
        kind=kind,
        shard=shard,
        shards=shards,
        force=force or bool(tenants),
        flow_run_id=own_id,
    )
    named = _by_machine(tenants) if tenants else dict.fromkeys([machine_id] if machine_id else _machines())
    forwarded = {"all": all, "kind": kind, "force": force, "shard": shard, "shards": shards, "run_id": run.run_id}
    others = {
        m: machine.start("backup", m, {**forwarded, "tenants": names, "machine_id": None if names else m})
        for m, names in named.items()
        if m != settings.machine_id
    }
    ended: list[Done] = []
    refused: dict[str, str] = {}
    if tenants and settings.machine_id in named:
        ended = back_up(run, choose(run, named[settings.machine_id]))
    elif settings.machine_id in named:
        try:
            with fleet_run.holding(settings, run):
                ended = back_up(run, choose(run, None))
        except EngramError as e:
            if not others:
                raise
            refused[settings.machine_id] = str(e)
    for m, started in others.items():
        if (cause := machine.wait(started)) is not None:
            refused[m] = cause
        ended += fleet_run.made_by(control_plane(), str(started.flow_run_id), named[m], error=cause)
    return _end(run, ended, refused, others)


def _by_machine(tenants: list[str]) -> dict[str, list[str] | None]:
    """The named tenants by machine. Raises for one that does not exist before anything is done."""
    found: dict[str, list[str] | None] = {}
    for tenant_id in dict.fromkeys(tenants):
        tenant = registry.get_active(control_plane(), tenant_id)
        found[tenant.machine_id] = [*(found.get(tenant.machine_id) or []), tenant.tenant_id]
    return found


def _machines() -> list[str]:
    """Every machine that has tenants, and this one."""
    return sorted({row["machine_id"] for row in control_plane().rows("fleet_machines")} | {configuration().machine_id})


def _end(
    run: Run, ended: list[Done], refused: Mapping[str, str], others: Mapping[str, Elsewhere]
) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Report; Failed when any tenant or machine failed, with the causes in the state's message."""
    failed = [done for done in ended if done.error is not None]
    _report(run, ended, failed, refused, others)
    results = [done.as_dict() for done in ended]
    if failed or refused:
        causes = [f"machine {m}: {cause}" for m, cause in refused.items()]
        causes += [f"{done.tenant_id}: {done.error}" for done in failed[:5]]
        said = f"{len(failed)} of {len(ended)} backups failed" if failed else f"{len(refused)} machines failed"
        return Failed(message=f"{said}: {'; '.join(causes)}", data=results)
    return results


def _report(
    run: Run, ended: list[Done], failed: list[Done], refused: Mapping[str, str], others: Mapping[str, Elsewhere]
) -> None:
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
        *(
            [
                artifact.table(
                    ("machine", "run", "result"), ((m, o.url, refused.get(m, "ok")) for m, o in others.items())
                )
            ]
            if others
            else []
        ),
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
