"""backup: choose → back-up. One run for all tenants of a machine, or of a shard of them; what fails is listed, the rest
goes on. The run that the schedule starts does its own machine's first shard and starts a run for each of the others."""

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
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
from shared.errors import ControlPlaneUnavailable, EngramError, Permanent
from shared.fleet_run import Chosen, Done, Run
from shared.receipt import Receipt

_LISTED = 200  # tenants in the report; all that failed come first


class Tenants(Receipt, frozen=True):
    """Whom a run is for: one value, so that Prefect does not look into thousands."""

    run: Run
    chosen: list[Chosen]


class BackedUp(Receipt, frozen=True):
    """How each tenant ended. `unclosed`: why the run's row could not be closed; the run counts as unfinished then."""

    ended: list[Done]
    unclosed: str | None = None


class Part(Receipt, frozen=True):
    """What one run does: named tenants of a machine, or all of one shard of it."""

    machine_id: str
    tenants: tuple[str, ...] | None = None
    shard: int = 0
    shards: int = 1

    def __str__(self) -> str:
        return self.machine_id + (f", shard {self.shard} of {self.shards}" if self.shards > 1 else "")


@task(name="choose", **policy.READ)
def choose(run: Run, tenants: tuple[str, ...] | None) -> Tenants:
    begun = fleet_run.begin(control_plane(), run)
    found = fleet_run.choose(control_plane(), run, tenants)
    get_run_logger().info("run %s of machine %s: %d tenants", run.run_id, run.machine_id, len(found))
    return Tenants(begun, found)


@task(name="back-up", **policy.ONCE)
def back_up(tenants: Tenants) -> BackedUp:
    """Retries are inside, tenant by tenant."""
    settings, run, total, log = configuration(), tenants.run, len(tenants.chosen), get_run_logger()
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
    try:
        fleet.record(ended)
    except ControlPlaneUnavailable as e:  # what was done is done, and is to be reported
        log.error("the row of run %s could not be closed: %s", run.run_id, e)
        return BackedUp(ended, f"the run's row could not be closed: {e}")
    return BackedUp(ended)


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
    shard: Annotated[int, Field(ge=0)] | None = None,
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
        shard: With all, only this part of a machine's tenants, counted from 0. None is every part, a run for each.
        shards: Into how many parts a machine's tenants are divided.
        run_id: Go on with this run: tenants it has finished are not done again. None starts one of its own.
        machine_id: With all, only the tenants of this machine. None is every machine.
    """
    settings = configuration()
    if (missed := superseded()) is not None:
        return missed
    if bool(tenants) == all:
        raise Permanent("name the tenants or choose all, one of the two")
    if shard is not None and shard >= shards:
        raise Permanent(f"shard {shard} of {shards}: shards count from 0")
    if tenants and (machine_id or shards > 1):
        raise Permanent("a machine and shards go with all; named tenants have their machine")
    own_id = artifact.flow_run_id()
    run_id = run_id or own_id or fleet_run.new_run_id()
    if tenants:
        parts = [Part(m, tuple(names)) for m, names in _by_machine(tenants).items()]
    else:
        wanted = range(shards) if shard is None else [shard]
        parts = [Part(m, None, n, shards) for m in ([machine_id] if machine_id else machine.every()) for n in wanted]
    mine = next((part for part in parts if part.machine_id == settings.machine_id), None)
    others: dict[Part, Elsewhere] = {}
    refused: dict[str, str] = {}
    ended: list[Done] = []
    for part in parts:
        if part is not mine:
            try:
                others[part] = _start(part, kind, force, run_id)
            except EngramError as e:  # the other machines are not to go without for it
                if len(parts) == 1:
                    raise
                refused[str(part)] = str(e)
                ended += _none_of(part, str(e))
    if mine is not None:
        run = Run(
            run_id=run_id,
            machine_id=settings.machine_id,
            kind=kind,
            shard=mine.shard,
            shards=mine.shards,
            force=force or bool(tenants),
            flow_run_id=own_id,
            whole=not tenants,
        )
        try:
            with nullcontext() if tenants else fleet_run.holding(settings, run):
                backed = back_up(choose(run, mine.tenants))
        except EngramError as e:
            if len(parts) == 1:
                raise
            refused[str(mine)] = str(e)
            ended += _none_of(mine, str(e))
        else:
            ended += backed.ended
            refused |= {str(mine): backed.unclosed} if backed.unclosed else {}
    for part, elsewhere in others.items():
        if (cause := machine.wait(elsewhere)) is not None:
            refused[str(part)] = cause
        try:
            found = fleet_run.made_by(control_plane(), str(elsewhere.flow_run_id), part.tenants, error=cause)
        except ControlPlaneUnavailable as e:
            refused.setdefault(str(part), f"it completed, {elsewhere.url}; what it stored could not be listed: {e}")
            ended += _none_of(part, refused[str(part)])
        else:
            ended += found
    return _end(run_id, ended, refused, others)


def _none_of(part: Part, cause: str) -> list[Done]:
    """Tenants that were asked for by name are answered by name."""
    return [Done(tenant_id, error=cause) for tenant_id in part.tenants or ()]


def _start(part: Part, kind: str, force: bool, run_id: str) -> Elsewhere:
    """The part as a run on its machine's queue."""
    parameters: dict[str, Any] = {"kind": kind, "run_id": run_id}
    if part.tenants:
        parameters |= {"tenants": list(part.tenants)}
    else:
        parameters |= {"all": True, "force": force, "machine_id": part.machine_id}
        parameters |= {"shard": part.shard, "shards": part.shards}
    return machine.start("backup", part.machine_id, parameters, part=f"{part.shard}/{part.shards}")


def _by_machine(tenants: list[str]) -> dict[str, list[str]]:
    """The named tenants by machine. Raises for one that does not exist before anything is done."""
    found: dict[str, list[str]] = {}
    for tenant_id in dict.fromkeys(tenants):
        tenant = registry.get_active(control_plane(), tenant_id)
        found.setdefault(tenant.machine_id, []).append(tenant.tenant_id)
    return found


def _end(
    run_id: str, ended: list[Done], refused: Mapping[str, str], others: Mapping[Part, Elsewhere]
) -> list[dict[str, Any]] | State[list[dict[str, Any]]]:
    """Report; Failed when any tenant or machine failed, with the causes in the state's message."""
    failed = [done for done in ended if done.error is not None]
    _report(run_id, ended, failed, refused, others)
    results = [done.as_dict() for done in ended]
    if failed or refused:
        causes = [f"machine {m}: {cause}" for m, cause in refused.items()]
        causes += [f"{done.tenant_id}: {done.error}" for done in failed[:5]]
        said = f"{len(failed)} of {len(ended)} backups failed" if failed else f"{len(refused)} parts of the run failed"
        return Failed(message=f"{said}: {'; '.join(causes)}", data=results)
    return results


def _report(
    run_id: str, ended: list[Done], failed: list[Done], refused: Mapping[str, str], others: Mapping[Part, Elsewhere]
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
            "machine": configuration().machine_id,
            "run": run_id,
            "bytes": sum(done.size_bytes or 0 for done in made),
        },
        *([artifact.table(("machine", "run", "result"), _parts(refused, others))] if refused or others else []),
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


def _parts(refused: Mapping[str, str], others: Mapping[Part, Elsewhere]) -> list[tuple[str, str | None, str]]:
    """The runs of the other parts, and what has none because it could not be started or is this one."""
    rows: list[tuple[str, str | None, str]] = [(str(p), e.url, refused.get(str(p), "ok")) for p, e in others.items()]
    started = {str(part) for part in others}
    return rows + [(name, None, cause) for name, cause in refused.items() if name not in started]
