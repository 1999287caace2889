"""How steps are run: one table. Only what the core calls transient is tried again, and only where the step is
safe to repeat; everything else ends Failed with its cause.

    READ      asks the control plane or the store and changes nothing, or only what it can do twice
    ONCE      a step that must not be repeated blindly (lock files move, a lease is held)
    FINISH    the last step of a restore: the data is safe, the control plane must hear of it
"""

import os
from typing import Any

from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun

from flows.core import configuration
from shared.errors import Transient

PID_LABEL, PROCESSES_LABEL = "engram.pid", "engram.processes"


def visible_processes() -> str:
    """Equal for two processes that see each other's pids: the machine, and the container on it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return f"{configuration().machine_id} {namespace}"


def note_process(flow: "Flow[..., Any]", flow_run: FlowRun, state: State[Any]) -> None:
    """Say whose process a run is that no worker started, so that a sweep can tell when it is gone."""
    if "prefect.worker.name" not in flow_run.labels:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(
                flow_run.id, {PID_LABEL: str(os.getpid()), PROCESSES_LABEL: visible_processes()}
            )


def is_transient(_task: "Task[..., Any]", _run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: the core's one question."""
    return isinstance(state.result(raise_on_failure=False), Transient)


_COMMON: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
READ: dict[str, Any] = {
    **_COMMON,
    "retries": 3,
    "retry_delay_seconds": [1, 4, 10],
    "retry_condition_fn": is_transient,
}
ONCE: dict[str, Any] = {**_COMMON, "retries": 0}
FINISH: dict[str, Any] = {
    **_COMMON,
    "retries": 10,
    "retry_delay_seconds": [0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8],
    "retry_condition_fn": is_transient,
}
FLOW: dict[str, Any] = {
    "persist_result": False,
    "validate_parameters": True,
    "log_prints": False,
    "on_running": [note_process],
}
