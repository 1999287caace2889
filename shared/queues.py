"""Work queues: on which one a run waits, and which worker takes it from there.

A machine has two workers, each with a limit of its own. The one takes what may wait: backups, drills, verification,
reports; they hold its places for hours. The other takes what must not wait behind those: restores, and what looks and
repairs. (One worker would give a free place to the queue with the best priority, but when backups hold all places there
is none to give.)

    queue, by priority       polled by
    {machine_id}-urgent      the machine's urgent worker
    urgent                   every machine's urgent worker: what forms in the UI start, which know no machine; a run
                             for a tenant of another machine has its twin run there
    upkeep                   every machine's urgent worker. No more of them run at a time than prefect.yaml says
                             (`concurrency_limit`), and that leaves a place for a restore
    default                  every machine's ordinary worker: scheduled runs, which find their machines themselves
    {machine_id}             the machine's ordinary worker: runs of its tenants that may wait
"""

from __future__ import annotations

from shared.settings import Settings

SHARED, SHARED_URGENT, UPKEEP = "default", "urgent", "upkeep"
# The shared queue of a deployment that is not on `default`, as in prefect.yaml (`work_queue_name`).
URGENT = {
    "restore": SHARED_URGENT,
    "restore-undo": SHARED_URGENT,
    "move-arrive": SHARED_URGENT,
    "act": SHARED_URGENT,
    "diagnose": UPKEEP,
    "sweep": UPKEEP,
}


def queue(machine_id: str, deployment: str) -> str:
    """Where a run of `deployment` for a tenant of that machine belongs."""
    return urgent(machine_id) if deployment in URGENT else machine_id


def urgent(machine_id: str) -> str:
    return f"{machine_id}-urgent"


def worker_names(settings: Settings) -> tuple[str, str]:
    """What this machine's two workers are called in Prefect."""
    name = f"engram-{settings.machine_id}"
    return name, urgent(name)
