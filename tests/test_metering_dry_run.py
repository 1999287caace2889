"""A dry run does everything but insert, and nothing it has seen is lost or billed twice afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared import dry_run, spool
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.core_fixtures import event, settings_in
from tests.metering_fixtures import at_once, check_counted, drain, query, segment

pytest_plugins = ("tests.metering_fixtures",)

WRITTEN = ("usage_events", "usage_hourly", "usage_daily", "usage_quarantine", "usage_segments")


@pytest.fixture
def dry(tmp_path: Path, core_url: str) -> Settings:
    return settings_in(tmp_path, core_url, usage_dry_run=True)


@pytest.fixture
def wet(dry: Settings) -> Settings:
    return dry.model_copy(update={"usage_dry_run": False})


def written(control_plane: ControlPlane) -> list[object]:
    return [query(control_plane, f"SELECT count(*) FROM {table}") for table in WRITTEN]


def test_a_dry_run_says_what_would_be_billed_and_writes_nothing(
    core_control_plane: ControlPlane, dry: Settings, wet: Settings, tenant_id: str
) -> None:
    """New, known, repeated and impossible events are told apart as the real drain would; the file is kept whole."""
    known = [event(tenant_id) for _ in range(4)]
    segment(wet, known)
    drain(core_control_plane, wet)
    before = written(core_control_plane)
    new = [event(tenant_id, at=datetime.now(UTC) - timedelta(days=n)) for n in (0, 20, 300)]
    path = segment(dry, [*known, *new, *new[:2], event(tenant_id, api_calls=-1)])
    raw = path.read_bytes()
    [seen] = drain(core_control_plane, dry)
    assert (seen.events, seen.inserted, seen.duplicates, seen.quarantined) == (10, 3, 6, 1)
    assert seen.dry_run
    assert written(core_control_plane) == before
    assert drain(core_control_plane, dry) == []
    assert [kept.read_bytes() for kept in dry_run.segments(dry)] == [raw]
    check_counted(core_control_plane, tenant_id, known)


def test_after_dry_run_is_switched_off_its_segments_are_billed_once_and_only_when_asked(
    core_control_plane: ControlPlane, dry: Settings, wet: Settings, tenant_id: str
) -> None:
    """Neither lost in silence, nor billed by surprise, nor twice."""
    staged, billed = [event(tenant_id) for _ in range(5)], [event(tenant_id) for _ in range(5)]
    segment(dry, [*staged, *billed[:2]])
    drain(core_control_plane, dry)
    segment(wet, billed)
    drain(core_control_plane, wet)
    check_counted(core_control_plane, tenant_id, billed)
    assert len(dry_run.segments(wet)) == 1
    assert (dry_run.bill(wet), dry_run.bill(wet)) == (1, 0)
    [drained] = drain(core_control_plane, wet)
    assert (drained.inserted, drained.duplicates, drained.dry_run) == (5, 2, False)
    check_counted(core_control_plane, tenant_id, [*staged, *billed])


def test_the_command_gives_the_segments_back_and_refuses_while_dry_run_is_on(
    core_control_plane: ControlPlane, dry: Settings, wet: Settings, tenant_id: str
) -> None:
    """An operator decides, by one command; with the setting still on it would only go round in a circle."""
    staged = [event(tenant_id) for _ in range(3)]
    segment(dry, staged)
    drain(core_control_plane, dry)

    def engram(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        url = dry.control_plane_url.get_secret_value()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("ENGRAM_")}
        environment = kept | {"ENGRAM_DATA_DIR": str(dry.data_dir), "ENGRAM_CONTROL_PLANE_URL": url} | more
        command = [sys.executable, "-m", "deployments.cli", "usage-dry-runs", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    refused = engram("--bill", ENGRAM_USAGE_DRY_RUN="true")
    assert refused.returncode == 3 and "ENGRAM_USAGE_DRY_RUN" in refused.stderr
    assert json.loads(engram("--json").stdout) == {"kept": 1, "given_back": 0, "discarded": 0}
    assert json.loads(engram("--bill", "--json").stdout) == {"kept": 0, "given_back": 1, "discarded": 0}
    drain(core_control_plane, wet)
    check_counted(core_control_plane, tenant_id, staged)
    segment(dry, [event(tenant_id)])
    drain(core_control_plane, dry)
    assert engram("--discard").returncode == 2 and len(dry_run.segments(dry)) == 1
    gone = engram("--discard", "--reason", "staging", "--json")
    assert json.loads(gone.stdout) == {"kept": 0, "given_back": 0, "discarded": 1}
    check_counted(core_control_plane, tenant_id, staged)


def test_two_dry_runs_at_once_examine_every_segment(
    core_control_plane: ControlPlane, dry: Settings, tenant_id: str
) -> None:
    """One moves the file while the other has it open."""
    paths = {segment(dry, [event(tenant_id) for _ in range(20)]).name for _ in range(20)}
    at_once(*[lambda: drain(core_control_plane, dry)] * 3)
    assert spool.sealed(dry.spool_dir) == []
    assert {path.name for path in dry_run.segments(dry)} == paths
