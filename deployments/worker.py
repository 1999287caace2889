"""This machine's two Prefect workers in one process: `python -m deployments.worker`.

`shared.queues` says why two: a restore never waits behind backups. In one process, because a second one would take
another 118 MB for a loop that asks every other second. When either ends by an error both do, and whoever supervises
this process starts it again; flow runs outlive it.

Before the ordinary one starts, what was missed while nobody worked is settled (`flows.missed`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import anyio
from prefect.workers.process import ProcessWorker

from flows import missed
from shared import log as logs
from shared import queues
from shared.errors import exit_code
from shared.log import get_logger
from shared.safety import refuse_unsafe
from shared.settings import Settings

log = get_logger("worker")


def workers(settings: Settings) -> tuple[ProcessWorker, ProcessWorker]:
    """The ordinary and the urgent one, not yet started. Their pool must be there: they make none."""
    ordinary, urgent = queues.worker_names(settings)
    its_own, its_urgent = settings.machine_id, queues.urgent(settings.machine_id)
    return (
        _worker(settings, ordinary, [its_own, queues.SHARED], settings.prefect_worker_limit),
        _worker(settings, urgent, [its_urgent, queues.SHARED_URGENT, queues.UPKEEP], settings.prefect_urgent_limit),
    )


def _worker(settings: Settings, name: str, polled: list[str], limit: int) -> ProcessWorker:
    return ProcessWorker(
        work_pool_name=settings.prefect_work_pool,
        name=name,
        work_queues=polled,
        limit=limit,
        create_pool_if_not_found=False,
    )


async def main(settings: Settings) -> None:
    """Until SIGTERM or SIGINT, also where that is inherited as ignored (`… &`)."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None  # asyncio.run made it
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    ordinary, urgent = workers(settings)

    async def after_settling() -> None:
        await missed.settle()
        await ordinary.start(printer=log.info)

    with contextlib.suppress(asyncio.CancelledError):
        async with anyio.create_task_group() as group:
            group.start_soon(urgent.start, False, False, log.info)
            group.start_soon(after_settling)


if __name__ == "__main__":
    with exit_code():
        refuse_unsafe(configured := Settings())
    # The `python` of prefect.yaml is this one, also when nobody activated its environment.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    logs.configure(configured.log_level)
    asyncio.run(main(configured))
