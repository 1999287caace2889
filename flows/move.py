"""move: plan → copy → arrive → lock → final-copy → fence → route → release. A tenant goes to another machine.

This run is on the source; `arrive` starts the target's (`flows.move_arrive`), and from there on the two go by the
journal's row alone: see `shared.move`.
"""

import time
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from pydantic import Field

from flows import artifact, machine, policy
from flows.core import configuration, control_plane, objects
from flows.machine import Elsewhere
from shared import move as core
from shared import move_journal, move_plan
from shared.departure import Departure, leaving
from shared.errors import Permanent
from shared.lease import Lease
from shared.move import Copied, Fenced, Held, Moved, Routed
from shared.move_plan import MovePlan
from shared.tenant import TENANT_ID_PATTERN

MACHINE_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


@task(name="plan", **policy.READ)
def plan(tenant_id: str, target: str) -> MovePlan:
    return move_plan.plan(configuration(), control_plane(), tenant_id, target)


@task(name="copy", **policy.READ)
def copy(departure: Departure) -> Copied:
    return core.copy(departure, objects(), flow_run_id=artifact.flow_run_id())


@task(name="arrive", **policy.READ)
def arrive(departure: Departure, copied: Copied) -> Copied:
    """Start the target's run and wait until it has the first copy. Nothing is held meanwhile."""
    chosen = departure.plan
    elsewhere = machine.start("move-arrive", chosen.target, {"move_id": str(chosen.move_id)})
    _taken_up(departure, elsewhere)
    return core.wait_staged(departure, copied)


def _taken_up(departure: Departure, elsewhere: Elsewhere) -> None:
    """Raises `Permanent` when no worker of the target takes the run up: a machine's name with a typo is seen here."""
    seconds = configuration().prefect_pick_up_seconds
    deadline = time.monotonic() + seconds
    while move_journal.get(control_plane(), departure.plan.move_id).state == "copied":
        if (cause := machine.ended(elsewhere)) is not None:
            raise Permanent(cause)
        if time.monotonic() > deadline:
            raise Permanent(f"no worker of machine {elsewhere.machine_id} took up {elsewhere.url} in {seconds:g} s")
        time.sleep(1.0)


@task(name="lock", **policy.ONCE)
def lock(departure: Departure, copied: Copied, reason: str) -> Lease:
    get_run_logger().info("the target has backup %s", copied.backup.backup_id)
    return core.lock(departure, reason=reason)


@task(name="final-copy", **policy.ONCE)
def final_copy(departure: Departure, copied: Copied, lease: Lease) -> Held:
    return core.final_copy(departure, objects(), copied, lease, flow_run_id=artifact.flow_run_id())


@task(name="fence", **policy.ONCE)
def fence(departure: Departure, held: Held) -> Fenced:
    return core.fence(departure, held)


@task(name="route", **policy.ONCE)
def route(departure: Departure, fenced: Fenced) -> Routed:
    return core.route(departure, fenced)


@task(name="release", **policy.FINISH)
def release(departure: Departure, routed: Routed, copy_ms: float) -> Moved:
    return core.release(departure, routed, copy_ms)


@flow(name="move", flow_run_name="move-{tenant_id}-to-{machine_id}", **policy.FLOW)
def move(
    tenant_id: Annotated[str, Field(pattern=TENANT_ID_PATTERN)],
    machine_id: Annotated[str, Field(pattern=MACHINE_ID_PATTERN)],
    dry_run: bool = False,
    reason: Annotated[str, Field(max_length=500)] = "",
    requested_by: Annotated[str, Field(max_length=100)] = "operator",
) -> dict[str, Any]:
    """Move a tenant to another machine without losing a write. Writes pause for a copy of its database, reads go on.

    Args:
        tenant_id: The tenant that moves.
        machine_id: Where to. A worker of that machine has to run.
        dry_run: Only report the plan (size, memories, how long writes were held the last times); change nothing.
        reason: Why. Written into the lease and the moves table.
        requested_by: Who asks for it.
    """
    if (elsewhere := machine.forwarded(tenant_id)) is not None:
        return elsewhere
    chosen = plan(tenant_id, machine_id)
    if dry_run:
        _report(chosen, f"Plan: move of {tenant_id}", "Dry run: nothing was changed", {})
        return {"tenant_id": tenant_id, "source": chosen.source, "target": chosen.target, "outcome": "dry_run"}
    try:
        moved = _run(chosen, requested_by, reason)
    except BaseException as e:  # a cancellation too; always raised on
        _report(chosen, f"Move of {tenant_id} failed", f"{type(e).__name__}: {e}", {})
        raise
    _report(
        chosen,
        f"Move: {tenant_id}",
        f"Machine {moved.target} serves it; writes were held for {moved.held_ms:.0f} ms",
        {
            "writes held for ms": moved.held_ms,
            "first copy, nothing held, ms": moved.copy_ms,
            "memories moved": moved.memories,
            "bytes moved": moved.size_bytes,
            "active generation": moved.generation,
            "backup of the moment": moved.final_backup_id,
            f"files on {moved.source}": f"kept for {moved.kept_hours:g} hours",
        },
    )
    return {
        "move_id": str(moved.move_id),
        "tenant_id": tenant_id,
        "source": moved.source,
        "target": moved.target,
        "outcome": "moved",
        "held_ms": moved.held_ms,
    }


def _run(chosen: MovePlan, requested_by: str, reason: str) -> Moved:
    began = time.monotonic()
    with leaving(
        configuration(),
        control_plane(),
        chosen,
        requested_by=requested_by,
        reason=reason,
        flow_run_id=artifact.flow_run_id(),
    ) as departure:
        copied = arrive(departure, copy(departure))
        copy_ms = (time.monotonic() - began) * 1000
        held = final_copy(departure, copied, lock(departure, copied, reason or "move"))
        return release(departure, route(departure, fence(departure, held)), copy_ms)


def _report(chosen: MovePlan, title: str, sentence: str, more: dict[str, Any]) -> None:
    artifact.report(
        artifact.key("move", chosen.tenant_id),
        title,
        sentence,
        {
            "tenant": chosen.tenant_id,
            "from machine": chosen.source,
            "to machine": chosen.target,
            "tenants there": chosen.target_tenants,
            "memories": chosen.memories,
            "bytes": chosen.size_bytes,
            "usual window in ms": chosen.window_ms,
            **more,
        },
    )
