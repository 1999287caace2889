"""Scheduled runs that were missed: of each schedule the newest is run once, the others end Cancelled and say why.

Prefect makes a schedule's runs ahead and never drops one: after a weekend without a worker three nightly backups are
due at once, and every sweep of every minute, oldest first. A server that was away brings what it had made ahead (an
hour's, and at least three runs of each schedule). So, twice:

- `settle`, before a worker takes ordinary runs: all at once, without a process for each;
- `superseded`, the first step of every scheduled flow: also when the server comes back under a worker that stayed.

Runs that somebody asked for are never touched, however late, nor those that somebody asked for again: they ran before.
A run that failed stands in for none. One that a worker took up does: it begins, or the sweep has it due once more
(`flows.unbegun`), and then it is looked at here like any other.
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Cancelled

from shared.log import get_logger

LATE = timedelta(seconds=60)  # sooner, a run is not missed: its worker is about to take it
_PAGE = 200  # the most the server gives
_MOST = 20_000  # runs looked at in one go: two weeks of every schedule
_AT_A_TIME = 8
_NOT_DONE = (StateType.CANCELLED, StateType.CANCELLING, StateType.FAILED, StateType.CRASHED)
_FAULTS = (httpx.HTTPError, PrefectException)
log = get_logger("missed")


def superseded() -> State[Any] | None:
    """Cancelled when this is a scheduled run so late that the next one of its schedule is due as well, else None."""
    context = FlowRunContext.get()
    mine = context.flow_run if context else None
    if mine is None or schedule_of(mine) is None or mine.run_count > 1 or _due(mine) > datetime.now(UTC) - LATE:
        return None
    later = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[_deployment(mine)]),
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate(
            {"after_": _due(mine) + timedelta(milliseconds=1), "before_": datetime.now(UTC)}
        ),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=later, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=_PAGE)
    for run in found:
        if schedule_of(run) == schedule_of(mine) and run.state_type not in _NOT_DONE:
            return _missed(run)
    return None


async def settle() -> int:
    """Cancel every late run but the newest of its schedule; how many. What fails is logged and ends nobody:
    `superseded` looks again when such a run starts."""
    try:
        return await _settle()
    except _FAULTS as e:
        log.error("missed_runs_not_read", cause=_cause(e))
        return 0


async def _settle() -> int:
    async with get_client() as client:
        late = [run async for run in _late(client)]
        turn, cancelled = asyncio.Semaphore(_AT_A_TIME), 0
        for newest, surplus in _by_schedule(late):

            async def cancel(run: FlowRun, instead: FlowRun = newest) -> bool:
                async with turn:
                    try:
                        await client.set_flow_run_state(run.id, _missed(instead))
                    except _FAULTS as e:
                        log.error("missed_run_not_cancelled", flow_run=run.name, cause=_cause(e))
                        return False
                    return True

            done = sum(await asyncio.gather(*map(cancel, surplus)))
            cancelled += done
            log.warning(
                "runs_missed",
                flow_run=newest.name,
                deployment_id=str(newest.deployment_id),
                cancelled=done,
                first_due=_due(surplus[-1]).isoformat(),
                run_instead=_due(newest).isoformat(),
            )
    return cancelled


async def _late(client: PrefectClient) -> Any:
    """Scheduled runs that are late, the newest first."""
    due = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": datetime.now(UTC) - LATE}),
    )
    for offset in range(0, _MOST, _PAGE):
        page = await client.read_flow_runs(
            flow_run_filter=due, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=_PAGE, offset=offset
        )
        for run in page:
            if schedule_of(run) is not None and run.run_count == 0:
                yield run
        if len(page) < _PAGE:
            return


def _by_schedule(late: list[FlowRun]) -> Iterator[tuple[FlowRun, list[FlowRun]]]:
    """The newest run of each schedule that has several, and its others."""
    for _, runs in groupby(
        sorted(late, key=lambda run: str(schedule_of(run))), key=schedule_of
    ):  # keeps the order inside
        newest, *surplus = runs
        if surplus:
            yield newest, surplus


def schedule_of(run: FlowRun) -> tuple[UUID, UUID | None] | None:
    """Which schedule made it; None for a run that somebody asked for."""
    if not run.auto_scheduled or run.deployment_id is None:
        return None
    return run.deployment_id, run.created_by.id if run.created_by else None


def _deployment(run: FlowRun) -> UUID:
    assert run.deployment_id is not None  # it has a schedule
    return run.deployment_id


def _due(run: FlowRun) -> datetime:
    assert run.expected_start_time is not None  # it was scheduled
    return run.expected_start_time


def _missed(instead: FlowRun) -> State[Any]:
    return Cancelled(message=f"missed; the run due {_due(instead):%F %T} UTC is done in its place")


def _cause(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]
