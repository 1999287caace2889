"""move-arrive: stage → receive → serve. The target's half of a move; the source's run starts it (`flows.move`)."""

from typing import Any
from uuid import UUID

from prefect import flow, task

from flows import artifact, policy
from flows.core import configuration, control_plane, objects
from shared import move_arrive as core
from shared.move_arrive import Arrival, Arrived, Received, Staged


@task(name="stage", **policy.READ)
def stage(arrival: Arrival) -> Staged:
    size_bytes = arrival.row.size_bytes or 0
    progress = artifact.Progress("move-stage", f"the first copy of {arrival.row.tenant_id}")
    return core.stage(arrival, objects(), progress=lambda received: progress.show(received, size_bytes))


@task(name="receive", **policy.ONCE)
def receive(arrival: Arrival, staged: Staged) -> Received:
    return core.receive(arrival, objects(), staged)


@task(name="serve", **policy.FINISH)
def serve(arrival: Arrival, received: Received) -> Arrived:
    return core.serve(arrival, received)


@flow(name="move-arrive", flow_run_name="move-arrive-{move_id}", **policy.FLOW)
def move_arrive(move_id: UUID) -> dict[str, Any]:
    """Receive a tenant that another machine is about to give up. Started by the flow `move`, not by hand.

    Args:
        move_id: The row of the table moves that says who and from where.
    """
    with core.arriving(configuration(), control_plane(), str(move_id)) as arrival:
        artifact.rename_run(f"move-arrive-{arrival.row.tenant_id}")
        staged = stage(arrival)
        received = receive(arrival, staged)
        arrived = serve(arrival, received)
    artifact.report(
        artifact.key("move-arrive", arrived.tenant_id),
        f"Arrival: {arrived.tenant_id}",
        f"Machine {arrived.target} serves it; it came from {arrived.source}",
        {
            "tenant": arrived.tenant_id,
            "memories": arrived.memories,
            "sha256 of the copy": staged.backup.sha256,
            "active generation": arrived.generation,
        },
    )
    return {"tenant_id": arrived.tenant_id, "move_id": str(move_id), "generation": arrived.generation}
