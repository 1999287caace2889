"""A flow run's own process, by `command` in prefect.yaml: `python -m deployments.flow_process`.

Without a command the worker starts each run as two Pythons, one after the other: the first prepares a workspace by the
deployment's pull steps, of which there are none here, and becomes the second, which has to import Prefect again. That
costs every run a second of a core before its first step.

One that comes late, of a worker that stood still, finds that its run has ended or is due once more (`flows.unbegun`),
or that another process has begun it since, and leaves it: Prefect itself would let it begin.

A session of its own, as the first Python would have made: a signal to the worker's group is not for its runs.

`--yielding` is for the runs that may wait (backups, drills, verification, reports): they compress, encrypt and hash for
minutes beside a gateway that answers within milliseconds. Measured on one core, beside a process that wants all of it,
p95 of lookups 11.5 ms, of searches 14, of creates 13, of a mix 15 at the same priority; 0.24, 1.4, 2.8 and 1.1 with
`NICE`; since a gateway's workers take turns (`gateway.scheduling`) 3.6 of lookups, the others as before. Not for
what holds writes back, a restore or a move: that is to be over soon.
"""

from __future__ import annotations

import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path

from deployments.prefect_command import uncollected

NICE = 10  # a tenth of the share of a process at 0, when both want all
_AUTOGROUP = Path("/proc/self/autogroup")


def main() -> None:
    with suppress(PermissionError):  # it leads one already
        os.setsid()
    if "--yielding" in sys.argv[1:]:
        sys.argv.remove("--yielding")  # Prefect takes an argument for the id of a run
        leave_the_cpu_to_others()
    with uncollected():
        import prefect.flow_engine  # noqa: F401
    if not wanted(os.environ.get("PREFECT__FLOW_RUN_ID")):
        return
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def wanted(run_id: str | None) -> bool:
    """Whether the run is still this process's to begin. Raises when Prefect cannot be asked, as the engine would."""
    if run_id is None:
        return True  # the engine says what is wrong
    from uuid import UUID

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(run_id)).state
    return state is None or not (state.is_final() or state.is_scheduled() or state.is_running())


def leave_the_cpu_to_others() -> None:
    """This process and its children. Outside of control groups Linux shares the CPU among sessions first, so this
    session says it too (`man 7 sched`, autogroup)."""
    os.nice(NICE)
    with suppress(OSError):  # there are none here, or the kernel wants fewer changes a second: the share is fair then
        _AUTOGROUP.write_text(str(NICE))


if __name__ == "__main__":
    main()
