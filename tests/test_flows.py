"""The flows on a real Prefect server: what an operator sees when a step fails, and what is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
)
from prefect.client.schemas.objects import State

from flows import core as flow_core
from flows.act import act
from flows.backup import backup
from flows.drill import restore_test
from flows.metering import metering
from flows.restore import restore
from flows.retention import retention
from flows.verify import verify
from shared import catalogue, registry
from shared import metering as metering_core
from shared.control_plane import ControlPlane
from shared.playbook import audit
from shared.settings import settings as cached_settings
from shared.spool import Spool
from tests.core_fixtures import World, event, new_world, settings_in
from tests.expiry_fixtures import few, run_sql, statuses
from tests.metering_fixtures import segment

pytest_plugins = ("tests.core_fixtures", "tests.flow_fixtures")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def flow_world(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A tenant whose settings the flows read from the environment, as in a worker."""
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(world.settings.data_dir))
    monkeypatch.setenv("ENGRAM_CONTROL_PLANE_URL", world.settings.control_plane_url.get_secret_value())
    monkeypatch.setenv("ENGRAM_RESTORE_DRAIN_TIMEOUT_SECONDS", "0.5")
    for cached in (cached_settings, flow_core.control_plane, flow_core.objects):
        cached.cache_clear()
    yield world
    flow_core.control_plane().close()


def outcome(state: State[Any]) -> Any:
    return state.result(raise_on_failure=False)


def artifact_of(state: State[Any]) -> str:
    """The markdown artifact of a run, as the server has it."""
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]),
                type=ArtifactFilterType(any_=["markdown"]),
            )
        )
    return str(found[0].data)


def test_a_backup_lists_what_failed_and_does_the_rest(flow_world: World) -> None:
    """One corrupt tenant must neither stop the others nor end in a green run."""
    flow_world.write("kept")
    broken = f"{flow_world.tenant_id}-broken"
    registry.create(flow_world.control_plane, flow_world.settings, broken)
    directory = flow_world.settings.tenants_dir / broken
    (directory / "engram.db").write_bytes(b"not a database at all" * 500)
    state = backup(tenants=[broken, flow_world.tenant_id], return_state=True)
    assert state.is_failed() and broken in str(state.message)
    results = {r["tenant_id"]: r for r in outcome(state)}
    assert results[broken]["error"] and results[flow_world.tenant_id]["error"] is None
    assert catalogue.newest(flow_world.control_plane, flow_world.tenant_id).manifest["memories"] == 1
    assert catalogue.list_of(flow_world.control_plane, broken) == []
    assert f"| {broken} |" in artifact_of(state)


def test_a_restore_reports_what_it_did(flow_world: World) -> None:
    """The artifact is what an operator reads after the run; the row is what a machine reads."""
    flow_world.write("one", "two")
    made = flow_world.back_up()
    flow_world.write("three")
    state = restore(flow_world.tenant_id, return_state=True)
    assert state.is_completed(), state.message
    assert flow_world.rows() == ["one", "two"]
    assert "writes were held for" in artifact_of(state) and made.sha256 in artifact_of(state)
    row = flow_world.control_plane.row("restore_by_flow_run", flow_run_id=str(state.state_details.flow_run_id))
    assert row is not None and row["state"] == "restored" and row["locked_ms"] > 0
    assert flow_world.lease_holder() is None


def test_a_dry_run_changes_nothing(flow_world: World) -> None:
    """It says how many writes would be lost, and leaves no row behind."""
    flow_world.write("one")
    flow_world.back_up()
    flow_world.write("two", "three")
    state = restore(flow_world.tenant_id, dry_run=True, return_state=True)
    assert state.is_completed()
    assert "2 live writes would be lost" in artifact_of(state)
    assert flow_world.rows() == ["one", "two", "three"]


def test_a_restore_test_that_fails_is_a_failed_run_with_its_report(flow_world: World) -> None:
    """A drill is there to be red when the backup is bad."""
    flow_world.write("one")
    made = flow_world.back_up()
    good = restore_test(flow_world.tenant_id, return_state=True)
    assert good.is_completed() and outcome(good)["outcome"] == "pass"
    path = flow_world.object_path(made)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    state = restore_test(flow_world.tenant_id, return_state=True)
    assert state.is_failed() and "sha256" in str(state.message)
    assert "| sha256 | no |" in artifact_of(state)


def test_one_run_drills_several_tenants_and_goes_on_after_one_fails(alone: World) -> None:
    """A weekly run is of a share of all tenants: each has its row and its line, and the bad one is named."""
    url = alone.settings.control_plane_url.get_secret_value()
    worlds = [alone, *(new_world(alone.settings.data_dir, url, alone.control_plane) for _ in range(3))]
    for number, one in enumerate(worlds):
        one.write(*[f"row {n}" for n in range(number + 1)])
    made = {one.tenant_id: one.back_up() for one in worlds}
    bad = worlds[1]
    path = bad.object_path(made[bad.tenant_id])
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    state = restore_test(count=4, return_state=True)
    assert state.is_failed() and f"1 of 4 restore tests did not pass: {bad.tenant_id} fail" in str(state.message)
    result = outcome(state)
    assert {t["tenant_id"]: t["outcome"] for t in result["tests"]} == {
        one.tenant_id: "fail" if one is bad else "pass" for one in worlds
    }
    rows = run_sql(alone, "SELECT tenant_id, outcome, flow_run_id FROM restore_tests")
    assert {r["flow_run_id"] for r in rows} == {str(state.state_details.flow_run_id)} and len(rows) == 4
    report = artifact_of(state)
    assert "3 of 4 restore tests passed" in report and all(f"| {one.tenant_id} |" in report for one in worlds)
    assert not list(alone.settings.sandbox_dir.glob("drill-*/*"))


def test_a_metering_run_drains_the_spool_once(flow_world: World) -> None:
    """Two runs over the same spool count an event once; the artifact says how many were new."""
    spool = Spool(flow_world.settings)
    for _ in range(25):
        spool.append(event(flow_world.tenant_id))
    spool.close()
    first, second = metering(return_state=True), metering(return_state=True)
    assert outcome(first)["inserted"] == 25 and outcome(second)["events"] == 0
    assert "25 of 25 events were new" in artifact_of(first)
    with flow_world.control_plane.transaction() as connection:
        counted = connection.execute(
            "SELECT count(*) AS n FROM usage_events WHERE tenant_id = %s", (flow_world.tenant_id,)
        ).fetchone()
    assert counted == {"n": 25}


def test_a_retention_run_shows_what_it_would_drop_then_drops_it_and_is_red_for_what_it_must_keep(
    flow_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day is dropped under somebody's eyes, and one whose rollups differ is not passed over in silence."""
    monkeypatch.setenv("ENGRAM_USAGE_RETENTION_DAYS", "30")
    long_ago = [datetime.now(UTC) - timedelta(days=n) for n in (41, 40)]
    with ControlPlane(flow_world.settings) as control_plane:
        for at in long_ago:
            segment(flow_world.settings, [event(flow_world.tenant_id, at=at)] * 2)
        list(metering_core.drain_all(control_plane, flow_world.settings))
        with control_plane.transaction() as connection:
            sql = "UPDATE usage_daily SET api_calls = 9 WHERE tenant_id = %s AND bucket < %s"
            connection.execute(
                sql, (flow_world.tenant_id, long_ago[1].replace(hour=0, minute=0, second=0, microsecond=0))
            )
    cached_settings.cache_clear()
    dry, state = retention(dry_run=True, return_state=True), retention(return_state=True)
    assert dry.is_failed() and state.is_failed() and f"{long_ago[0]:%F}" in str(state.message)
    assert "would be dropped" in artifact_of(dry)
    assert f"| {long_ago[0]:%F} | attached | 1 |" in artifact_of(state) and "hours and days differ" in artifact_of(
        state
    )
    dropped = flow_world.control_plane.rows("usage_days_dropped", days=[at.date() for at in long_ago])
    assert [row["day"] for row in dropped] == [long_ago[1].date()]


@pytest.fixture
def alone(tmp_path: Path, control_plane_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Like `flow_world`, alone in its control plane: for what looks at every tenant's backups."""
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ENGRAM_CONTROL_PLANE_URL", control_plane_url)
    for cached in (cached_settings, flow_core.control_plane, flow_core.objects):
        cached.cache_clear()
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)
    flow_core.control_plane().close()


def test_a_retention_run_deletes_what_has_no_place_after_a_dry_run_that_shows_it(alone: World) -> None:
    """The table says what is kept as what; a plan that does not exist is a red run, and keeps all of its tenants'."""
    kept, gone = few(alone)
    dry = retention(dry_run=True, return_state=True)
    assert dry.is_completed(), dry.message
    assert "3 backups of 1 tenants would be deleted" in artifact_of(dry)
    assert set(statuses(alone).values()) == {"available"} and len(alone.objects.keys("tenants")) == 4
    state = retention(return_state=True)
    assert state.is_completed(), state.message
    assert statuses(alone) == {kept: "available", **dict.fromkeys(gone, "deleted")}
    assert len(alone.objects.keys("tenants")) == 1
    assert "3 backups deleted" in artifact_of(state) and "1 last, 1 last good" in artifact_of(state)
    assert f"| {alone.tenant_id} | standard | 1 |" in artifact_of(state)
    assert outcome(state)["backups"] == {"kept": 1, "planned": 3, "deleted": 3}
    run_sql(alone, "UPDATE tenants SET plan_id = 'gone'")
    red = retention(return_state=True)
    assert red.is_failed() and "there is no plan gone" in str(red.message)


def test_a_verify_run_marks_what_is_not_whole_and_is_red(alone: World) -> None:
    """The corrupt one is not chosen any more; the run says which tenant wants a new backup."""
    alone.write("one")
    good = alone.back_up()
    bad = alone.back_up()
    assert verify(limit=9, return_state=True).is_completed()
    path = alone.object_path(bad)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    state = verify(limit=9, return_state=True)
    assert state.is_failed() and bad.key in str(state.message)
    assert f"engram backup {alone.tenant_id}" in artifact_of(state)
    assert outcome(state)["backup_now"] == [alone.tenant_id]
    assert catalogue.newest(alone.control_plane, alone.tenant_id).backup_id == good.backup_id
    assert verify(limit=9, return_state=True).is_completed()  # known, and listed


def test_secrets_never_reach_parameters_or_artifacts(flow_world: World) -> None:
    """Prefect shows both to anybody who can open its UI."""
    flow_world.write("one")
    state = backup(tenants=[flow_world.tenant_id], return_state=True)
    with get_client(sync_client=True) as client:
        assert state.state_details.flow_run_id is not None
        parameters = client.read_flow_run(state.state_details.flow_run_id).parameters
    password = flow_world.settings.control_plane_url.get_secret_value().split(":")[2].split("@")[0]
    assert password not in artifact_of(state) + str(parameters)
    assert os.environ["ENGRAM_CONTROL_PLANE_URL"]


def test_an_action_of_the_playbook_reports_and_is_recorded_as_the_runs(flow_world: World) -> None:
    """What it changed and how to undo it in the artifact; its row names the run. Nonsense and refusals end Failed."""
    state = act("shed", arguments={"classes": ["search"]}, reason="overload", ttl_seconds=60, return_state=True)
    assert state.is_completed(), state.message
    run_id = str(state.state_details.flow_run_id)
    report = artifact_of(state)
    assert "engram act limits clear shed" in report and "overload" in report
    row = audit.history(flow_world.control_plane, action="shed", limit=1)[0]
    assert (row["flow_run_id"], row["door"], row["state"], row["after"]) == (run_id, "prefect", "done", ["search"])
    undone = act("clear-limit", arguments={"limit": "shed"}, reason="over", return_state=True)
    assert outcome(undone)["before"] == ["search"]
    assert "free inodes" in artifact_of(act("volume-health", tenant_id=flow_world.tenant_id, return_state=True))
    for name, more in (("shed", {}), ("restart-workers", {"reason": "no gateway runs here"})):
        failed = act(name, **more, return_state=True)  # type: ignore[call-overload]
        assert failed.is_failed(), name
