"""Imports into a spool that is a disk of its own, or full."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from shared import correction, spool
from shared.control_plane import ControlPlane
from shared.errors import Refused
from tests.core_fixtures import event, settings_in
from tests.disk_fixtures import file_system
from tests.metering_fixtures import query
from tests.test_spool import segment

pytest_plugins = ("tests.metering_fixtures",)


def test_an_import_enters_a_spool_on_a_disk_of_its_own(
    core_control_plane: ControlPlane, core_url: str, tmp_path: Path
) -> None:
    """A file is staged on the disk it is for: from another one it could not be renamed into its place."""
    settings = settings_in(tmp_path / "data", core_url)
    settings.data_dir.mkdir()
    file = segment(tmp_path, [event(), event()])
    with file_system(settings.spool_dir, "size=1m"):
        done = correction.bring_in(core_control_plane, settings, file, reason="r", requested_by="me", apply=True)
        [path] = spool.sealed(settings.spool_dir)
        assert done.segments == [path.stem] and len(spool.read(path).events) == 2


def test_an_import_the_spool_has_no_room_for_is_refused_and_leaves_no_record(
    core_control_plane: ControlPlane, core_url: str, tmp_path: Path
) -> None:
    """It would have the gateway refuse its clients' writes."""
    settings = settings_in(tmp_path / "data", core_url, usage_spool_limit_bytes=8_000)
    settings.spool_dir.mkdir(parents=True)
    segment(settings.spool_dir, [event()])
    file, who = segment(tmp_path, [event() for _ in range(200)]), secrets.token_hex(8)
    with pytest.raises(Refused, match="room for 3904"):
        correction.bring_in(core_control_plane, settings, file, reason="r", requested_by=who, apply=True)
    assert len(spool.sealed(settings.spool_dir)) == 1
    assert query(core_control_plane, "SELECT 1 FROM usage_corrections WHERE requested_by = %s", who) == []
