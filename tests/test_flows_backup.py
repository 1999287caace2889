"""The backup flow over a machine's tenants on a real Prefect server: what fails, is gone on with, or is elsewhere."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import core as flow_core
from flows import machine as machine_core
from flows.backup import backup
from flows.machine import Elsewhere
from flows.sweep import _process_is_gone
from shared import catalogue, fleet_run, queues
from shared.errors import ControlPlaneUnavailable, LeaseHeld
from shared.fleet import Fleet
from shared.settings import settings as cached_settings
from tests.fleet_fixtures import Machine
from tests.ports import free_ports
from tests.test_flows import artifact_of, outcome

pytest_plugins = ("tests.core_fixtures", "tests.fleet_fixtures", "tests.flow_fixtures")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def flow_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The machine as its worker's flows see it."""
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(machine.settings.data_dir))
    monkeypatch.setenv("ENGRAM_CONTROL_PLANE_URL", machine.settings.control_plane_url.get_secret_value())
    monkeypatch.setenv("ENGRAM_MACHINE_ID", machine.settings.machine_id)
    caches = (cached_settings, flow_core.control_plane, flow_core.objects)
    for cached in caches:
        cached.cache_clear()
    yield machine
    flow_core.control_plane().close()
    for cached in caches:
        cached.cache_clear()


def run(machine: Machine, **parameters: Any) -> State[Any]:
    return backup(all=True, machine_id=machine.settings.machine_id, return_state=True, **parameters)


def test_a_red_run_lists_its_failures_and_the_same_run_again_does_only_those(flow_machine: Machine) -> None:
    """Two tasks whatever the number of tenants; a retry of the run in Prefect is the same run, and so is `run_id`."""
    bad, *good = flow_machine.tenants
    file = flow_machine.paths(bad).database.resolve()
    content = file.read_bytes()
    file.write_bytes(b"x" * 8192)
    state = run(flow_machine)
    assert state.is_failed() and f"{bad}: " in str(state.message) and "1 of 4 backups failed" in str(state.message)
    assert f"| {bad} | " in artifact_of(state) and "3 of 4 tenants backed up, 0 unchanged, 1 failed" in artifact_of(
        state
    )
    flow_run_id = state.state_details.flow_run_id
    assert flow_run_id is not None
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    assert {task.name.rpartition("-")[0] for task in tasks} == {"choose", "back-up"} and len(tasks) == 2

    file.write_bytes(content)
    again = run(flow_machine, run_id=str(flow_run_id), force=True)
    assert again.is_completed(), again.message
    done = {d["tenant_id"]: d for d in outcome(again)}
    assert [t for t, d in done.items() if not d["skipped"]] == [bad]
    assert all(len(catalogue.list_of(flow_machine.control_plane, t)) == 1 for t in good)
    assert {d["backup_id"] for d in done.values()} == {
        str(catalogue.newest(flow_machine.control_plane, t).backup_id) for t in flow_machine.tenants
    }


def test_a_run_whose_end_postgresql_does_not_take_is_reported_all_the_same(
    flow_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of work, told tenant by tenant; red, and gone on with by the next `--resume`."""

    def away(*_: object) -> None:
        raise ControlPlaneUnavailable("away at the end")

    monkeypatch.setattr(Fleet, "record", away)
    state = run(flow_machine)
    assert state.is_failed() and "could not be closed" in str(state.message)
    assert {d["tenant_id"] for d in outcome(state) if d["error"] is None} == set(flow_machine.tenants)
    assert "4 of 4 tenants backed up" in artifact_of(state) and "away at the end" in artifact_of(state)
    assert fleet_run.unfinished(flow_machine.control_plane, flow_machine.settings).run_id


def test_a_machine_where_no_run_can_be_started_does_not_keep_the_others_from_theirs(flow_machine: Machine) -> None:
    """Prefect knows no deployment here, so nothing starts elsewhere; each tenant is answered for."""
    mine, away = flow_machine.tenants[:2]
    with flow_machine.control_plane.transaction() as connection:
        connection.execute("UPDATE tenants SET machine_id = 'm-away' WHERE tenant_id = %s", (away,))
    state = backup(tenants=[away, mine], return_state=True)
    assert state.is_failed() and "could not be started on machine m-away" in str(state.message)
    done = {d["tenant_id"]: d for d in outcome(state)}
    assert done[mine]["error"] is None and "could not be started" in done[away]["error"]
    assert "could not be started" in artifact_of(state)


def test_a_run_elsewhere_that_prefect_cannot_tell_about_has_a_bound(flow_machine: Machine) -> None:
    """The report of what is known must not be lost with the server."""
    elsewhere = Elsewhere("m-away", uuid4(), "a-link")
    assert "was deleted" in str(machine_core.wait(elsewhere))
    flow_core.configuration().prefect_pick_up_seconds = 0.1
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    with temporary_settings({PREFECT_API_URL: nobody}):
        assert "Prefect does not answer" in str(machine_core.wait(elsewhere))


def test_a_run_done_once_more_is_not_taken_for_dead(flow_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect keeps the first try's start, and its pid until the next has one: no sweep may end the second for it."""
    monkeypatch.setenv("ENGRAM_PREFECT_PICK_UP_SECONDS", "30")
    cached_settings.cache_clear()
    ours = {"prefect.worker.name": queues.worker_names(flow_core.configuration())[0]}
    long_ago, now = (datetime.now(UTC) - timedelta(days=days) for days in (3, 0))
    dead = subprocess.Popen(["true"])
    dead.wait()

    def gone(pid: int, count: int, state: State[Any]) -> bool:
        run = FlowRun(id=uuid4(), flow_id=uuid4(), labels=ours, infrastructure_pid=str(pid), run_count=count,
                      start_time=long_ago, state=state, state_type=state.type)  # fmt: skip
        return _process_is_gone(run)

    def at(kind: StateType, when: datetime) -> State[Any]:
        return State(type=kind, timestamp=when)

    assert gone(os.getpid(), 1, at(StateType.RUNNING, long_ago)), "used again by something younger"
    assert not gone(os.getpid(), 2, at(StateType.RUNNING, now))
    assert not gone(dead.pid, 2, at(StateType.RUNNING, now)) and not gone(dead.pid, 1, at(StateType.PENDING, now))
    assert gone(dead.pid, 2, at(StateType.RUNNING, now - timedelta(minutes=1)))
    assert gone(dead.pid, 1, at(StateType.RUNNING, now))


def test_a_second_run_beside_a_living_one_is_refused(flow_machine: Machine) -> None:
    """Two of them would do everything twice; the refusal names the machine."""
    with fleet_run.holding(flow_machine.settings, flow_machine.run()):
        state = run(flow_machine)
    assert state.is_failed() and isinstance(outcome(state), LeaseHeld)
    assert flow_machine.settings.machine_id in str(state.message)


@pytest.mark.parametrize(
    "wrong", [{"shard": 2, "shards": 2}, {"tenants": ["acme"], "all": True}, {"tenants": ["acme"], "machine_id": "m"}]
)
def test_parameters_that_contradict_each_other_are_refused(flow_machine: Machine, wrong: dict[str, Any]) -> None:
    """One line that says what is wrong, and nothing is done."""
    state = backup(**({"all": "tenants" not in wrong} | wrong), return_state=True)
    assert state.is_failed() and flow_machine.count() == 0
