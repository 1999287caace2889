"""Runs that a worker took up and no process ever began: they would say Pending for ever.

A worker marks a run Pending, starts its process, and then notes that process's id; the process itself marks the run
Running. A worker that dies between the first two leaves a run that nobody has, and no id to ask after, on a queue
that may be any machine's. So time decides, and only of a run without an id: `PATIENCE` times as long as a worker is
given to take up a run at all (ten minutes, as delivered), which is longer than a living worker's client asks Prefect
again for one answer. A process that comes even later finds its run ended and leaves (`deployments.flow_process`), so
that no restore is done that somebody was told had died.

A run of a schedule is scheduled once more, due when it was: the next worker does it, or a later run of its schedule in
its place (`flows.missed`). What somebody asked for ends Crashed: whoever waits for it must hear of it, and a restore
must not begin minutes after that.
"""

from datetime import UTC, datetime
from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Crashed, Scheduled

from flows.missed import schedule_of

PATIENCE = 5


def given_up(run: FlowRun, pick_up_seconds: float) -> bool:
    """Whether no process has it, nor will have."""
    if run.state is None or not run.state.is_pending() or run.infrastructure_pid:
        return False
    return (datetime.now(UTC) - run.state.timestamp).total_seconds() > PATIENCE * pick_up_seconds


def settled(run: FlowRun) -> State[Any]:
    """What becomes of a run that was given up."""
    cause = "a worker took it up and ended before it began; nothing was done"
    if schedule_of(run) is not None and run.run_count == 0:
        return Scheduled(scheduled_time=run.expected_start_time, message=f"{cause}, so it is due once more (sweep)")
    return Crashed(message=f"{cause} (sweep)")
