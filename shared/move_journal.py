"""The journal of moves: one row each in `moves`, written by both machines, in this order:

    copying → copied → arriving → staged → held → final → ready → routed → done
    \\_______________________ undone is possible _________________/

`routed` is the one decision. It is made in the transaction that changes `tenants.machine_id`, under the proof that the
source still has its lease; before it any machine may make the row `undone`, after it none can. Both take the row's
lock, so exactly one of them happens, whoever is slow, stopped or dead.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from shared.control_plane import ControlPlane, rows
from shared.engine.schema import SCHEMA_VERSION
from shared.errors import LeaseHeld, LeaseLost, Permanent
from shared.lease import Lease
from shared.receipt import Receipt

State = Literal["copying", "copied", "arriving", "staged", "held", "final", "ready", "routed", "done", "undone"]
_FAST_SECONDS, _SLOW_SECONDS = 0.03, 0.5  # between two looks; slow while nobody's writes wait
_BEFORE: dict[State, State] = {
    "copied": "copying",
    "arriving": "copied",
    "staged": "arriving",
    "held": "staged",
    "final": "held",
    "ready": "final",
}


class Row(Receipt, frozen=True):
    """One row of `moves`. Times are PostgreSQL's."""

    move_id: UUID
    tenant_id: str
    source: str
    target: str
    state: State
    first_backup_id: UUID | None
    final_backup_id: UUID | None
    fence_epoch: int | None
    from_generation: int | None
    to_generation: int | None
    memories: int | None
    size_bytes: int | None
    held_ms: float | None
    error: str | None
    created_at: datetime
    held_at: datetime | None
    routed_at: datetime | None
    finished_at: datetime | None
    remove_after: datetime | None
    removed_at: datetime | None


def begin(
    control_plane: ControlPlane,
    move_id: UUID,
    tenant_id: str,
    source: str,
    target: str,
    *,
    requested_by: str,
    reason: str,
    flow_run_id: str | None,
) -> None:
    """Raises `LeaseHeld` when another move of the tenant is open, or the tenant is not on `source` any more."""
    row = control_plane.row(
        "move_begin",
        move_id=move_id,
        tenant_id=tenant_id,
        source=source,
        target=target,
        requested_by=requested_by,
        reason=reason,
        flow_run_id=flow_run_id,
    )
    if row is None:
        raise LeaseHeld(f"tenant {tenant_id} is being moved already, or is not on machine {source} any more")


def get(control_plane: ControlPlane, move_id: str | UUID) -> Row:
    """Raises `Permanent` when there is no such move."""
    row = control_plane.row("move_get", move_id=UUID(str(move_id)))
    if row is None:
        raise Permanent(f"there is no move {move_id}")
    return Row(**row)


def of_flow_run(control_plane: ControlPlane, flow_run_id: str) -> Row | None:
    """The move that a run made; None when it began none."""
    row = control_plane.row("move_by_flow_run", flow_run_id=flow_run_id)
    return get(control_plane, row["move_id"]) if row is not None else None


def step(control_plane: ControlPlane, move_id: UUID, state: State, **facts: Any) -> None:
    """One state further, with what is known now. Raises `Permanent` when the move was given up meanwhile."""
    names = (
        "first_backup_id",
        "final_backup_id",
        "epoch",
        "from_generation",
        "to_generation",
        "memories",
        "size_bytes",
    )
    values = dict.fromkeys(names) | facts
    if not control_plane.rows("move_step", move_id=move_id, state=state, from_state=_BEFORE[state], **values):
        raise _given_up(get(control_plane, move_id), f"it cannot become {state}")


def wait(
    control_plane: ControlPlane,
    move_id: UUID,
    seconds: float,
    *states: State,
    fast: bool = False,
) -> Row:
    """Until the row is in one of `states`. Raises `Permanent` when it is undone, or that takes longer than `seconds`
    (not to be tried again as it is: writes may be held)."""
    deadline = time.monotonic() + seconds
    while True:
        row = get(control_plane, move_id)
        if row.state in states:
            return row
        if row.state == "undone":
            raise _given_up(row, "nothing was moved")
        if time.monotonic() > deadline:
            raise Permanent(f"move {move_id} is still {row.state} after {seconds:g} s, not {' or '.join(states)}")
        time.sleep(_FAST_SECONDS if fast else _SLOW_SECONDS)


def route(control_plane: ControlPlane, row: Row, taken: Lease) -> None:
    """The decision, in one transaction: the lease is ours → the row is `routed` → the tenant is the target's.

    Raises `LeaseLost` or `Permanent` with nothing changed. `ControlPlaneUnavailable` may mean either: ask again.
    """
    with control_plane.transaction() as connection:
        if not rows(connection, "move_lease", tenant_id=row.tenant_id, epoch=taken.epoch, holder=taken.holder):
            raise LeaseLost(f"the lease on tenant {row.tenant_id} (epoch {taken.epoch}) expired or was taken")
        routed = rows(connection, "move_routed", move_id=row.move_id)
        if not routed:
            raise Permanent(f"move {row.move_id} was given up by the other machine or a sweep")
        moved = rows(
            connection,
            "move_tenant",
            tenant_id=row.tenant_id,
            source=row.source,
            target=routed[0]["target"],
            generation=routed[0]["to_generation"],
        )
        if not moved:
            raise Permanent(f"tenant {row.tenant_id} is not active on machine {row.source} any more")


def undo(control_plane: ControlPlane, move_id: UUID, error: str) -> Row:
    """Give the move up unless it is routed; the row as it is then."""
    control_plane.execute("move_undo", move_id=move_id, error=error[:400])
    return get(control_plane, move_id)


def done(control_plane: ControlPlane, row: Row, generation: int, keep_seconds: float) -> None:
    """The target serves that generation; the source may remove its files in `keep_seconds`. What the target itself had
    kept from an earlier stay of the tenant is gone."""
    with control_plane.transaction() as connection:
        if rows(connection, "move_done", move_id=row.move_id, seconds=keep_seconds):
            of_tenant = {"tenant_id": row.tenant_id, "generation": generation, "schema_version": SCHEMA_VERSION}
            rows(connection, "tenant_set_generation", **of_tenant)
            rows(connection, "moves_removed", tenant_id=row.tenant_id, machine_id=row.target)


def _given_up(row: Row, otherwise: str) -> Permanent:
    if row.state == "undone":
        return Permanent(f"move {row.move_id} was given up: {row.error or otherwise}")
    return Permanent(f"move {row.move_id} is {row.state}: {otherwise}")
