"""sweep: disk → records → runs. What dead restores left is finished or undone; their Prefect runs are marked.

The resident drain looks at the disk every `ENGRAM_SWEEP_SECONDS`, so a dead restore is repaired within seconds; this
flow is the same, every minute, where an operator sees it, and the only part that may correct Prefect's own records.
"""

import os
from datetime import UTC, datetime
from typing import Any

import psutil
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from flows import artifact, policy, unbegun
from flows.core import configuration, control_plane
from flows.missed import superseded
from shared import move_settle, queues
from shared import sweep as core
from shared.errors import Permanent
from shared.sweep import Swept

_UNFINISHED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


@task(name="disk", **policy.READ)
def disk() -> list[Swept]:
    return core.sweep_disk(configuration())


@task(name="records", **policy.READ)
def records(found: list[Swept]) -> list[Swept]:
    """Of restores, then of moves."""
    found = [*found, *core.sweep_records(configuration(), control_plane())]
    return [*found, *move_settle.sweep_moves(configuration(), control_plane())]


@task(name="runs", **policy.READ)
def runs(found: list[Swept]) -> list[Swept]:
    """End runs whose process, on this machine, is gone: they would say Running, or Cancelling, for ever. Settle those
    that no process began, of any machine."""
    marked: list[Swept] = []
    unfinished = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=unfinished, limit=200):
            if str(run.id) != flow_run.get_id() and (end := _end(client, run)):
                client.set_flow_run_state(run.id, end, force=True)
                marked.append(Swept(run.name, "run without a process", f"marked {end.name}"))
    return [*found, *marked]


def _end(client: SyncPrefectClient, run: FlowRun) -> State[Any] | None:
    """What a run without a process is to be; None when it has one, or said so itself after it was listed."""
    patience = configuration().prefect_pick_up_seconds
    if unbegun.given_up(run, patience):
        now = client.read_flow_run(run.id)
        return unbegun.settled(now) if unbegun.given_up(now, patience) else None
    if not _process_is_gone(run):
        return None
    match client.read_flow_run(run.id).state_type:
        case StateType.CANCELLING:
            return Cancelled(message="its process is gone (sweep)")
        case state if state in _UNFINISHED:
            return Crashed(message="its process is gone (sweep)")
    return None


def _process_is_gone(run: FlowRun) -> bool:
    """Only for a process this one can see: a pid says nothing about another machine's or container's."""
    if run.labels.get("prefect.worker.name") in queues.worker_names(configuration()):
        pid = run.infrastructure_pid or ""
    elif run.labels.get(policy.PROCESSES_LABEL) == policy.visible_processes():
        pid = str(run.labels.get(policy.PID_LABEL))
    else:
        return False
    if not pid.isdigit():
        return False
    started: datetime | None = run.start_time
    if _retried(run):
        assert run.state is not None  # it was listed by its state
        if (datetime.now(UTC) - run.state.timestamp).total_seconds() < configuration().prefect_pick_up_seconds:
            return False  # the pid may still be the one of the try before
        started = None if run.state.is_pending() else run.state.timestamp
    try:
        process = psutil.Process(int(pid))
        # A pid used again belongs to something younger than the run's start.
        reused = started is not None and process.create_time() > started.timestamp() + 5
        return bool(reused or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _retried(run: FlowRun) -> bool:
    """Whether somebody has a run that had ended done once more: `start_time` is of its first try."""
    return run.run_count > (0 if run.state_type == StateType.PENDING else 1)


@flow(name="sweep", flow_run_name="sweep", **policy.FLOW)
def sweep() -> dict[str, Any] | State[Any]:
    """Finish or undo whatever dead restores left on this machine; mark runs whose process is gone."""
    if (missed := superseded()) is not None:
        return missed
    found = runs(records(disk()))
    if found:
        artifact.report(
            "sweep",
            "Sweep",
            f"{len(found)} traces of dead runs, {sum(s.ok for s in found)} put right",
            {"machine": configuration().machine_id, "pid": os.getpid()},
            artifact.table(
                ("tenant or run", "found", "done", "ok"), ((s.tenant_id, s.found, s.done, s.ok) for s in found)
            ),
        )
    if stuck := [s for s in found if not s.ok]:
        raise Permanent("; ".join(f"{s.tenant_id} {s.done}" for s in stuck))
    return {"swept": [{"what": s.tenant_id, "found": s.found, "done": s.done} for s in found]}
