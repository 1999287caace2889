"""The reserve: what backups, restore tests and verification leave free of the volume that tenants write to."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared import backup, drill, staging, verify
from shared.errors import NoSpace
from tests.core_fixtures import World, wait_until
from tests.fleet_fixtures import Machine

pytest_plugins = ("tests.core_fixtures", "tests.fleet_fixtures")

ALL = {"disk_reserve_bytes": 1 << 60}


def with_all_reserved(world: World) -> World:
    settings = world.settings.model_copy(update=ALL)
    return World(settings, world.control_plane, type(world.objects)(settings), world.tenant_id)


def test_a_run_of_backups_leaves_the_reserve_and_names_it(machine: Machine) -> None:
    """A tenant without a backup tonight is alerted; a full volume refuses every tenant's writes."""
    for done in machine.back_up(**ALL):
        assert done.error is not None and "ENGRAM_DISK_RESERVE_BYTES" in done.error
    assert all(done.error is None for done in machine.back_up())


def test_verification_and_restore_tests_leave_the_reserve_and_say_nothing_of_the_backup(world: World) -> None:
    """They can be done tomorrow, and a full disk is no fault of the backup."""
    world.write("one")
    made = world.back_up()
    full = with_all_reserved(world)
    with verify.sandbox(full.settings) as directory:
        examined = verify.examine(full.control_plane, full.objects, made, directory)
    assert examined.outcome == "inconclusive" and "ENGRAM_DISK_RESERVE_BYTES" in str(examined.cause)
    [picked] = drill.select(full.control_plane, full.settings, tenant_id=world.tenant_id)
    with drill.sandbox(full.settings) as directory:
        drilled = drill.run(
            full.control_plane, full.objects, drill.fetch(full.objects, picked, directory, full.control_plane)
        )
    assert drilled.outcome == "inconclusive"


def test_a_restore_may_use_the_reserve(world: World) -> None:
    """It brings a tenant back; it is what the room is for."""
    world.write("one")
    made = world.back_up()
    full = with_all_reserved(world)
    backup.fetch(full.objects, made, full.paths.root / "restore.sqlite", full.control_plane)
    with pytest.raises(NoSpace):
        backup.fetch(full.objects, made, full.settings.data_dir / "elsewhere", full.control_plane)


def test_another_volume_has_no_reserve(world: World) -> None:
    """No tenant writes there."""
    assert staging.reserve_bytes(world.settings, Path("/dev/shm")) == 0
    assert staging.reserve_bytes(world.settings, world.settings.data_dir) == world.settings.disk_reserve_bytes


def test_a_data_directory_that_is_not_there_has_no_reserve(world: World, tmp_path: Path) -> None:
    """An operator's computer has no tenants, and fetches a backup all the same."""
    settings = world.settings.model_copy(update={"data_dir": tmp_path / "nowhere"})
    assert staging.reserve_bytes(settings, tmp_path) == 0


def test_room_that_is_granted_and_not_yet_written_is_not_granted_again(tmp_path: Path) -> None:
    """Several that begin together would each see the same free disk, and write into the reserve."""
    size = int(shutil.disk_usage(tmp_path).free * 0.6)
    shared = staging.Staging(tmp_path, 1 << 62)

    def ask() -> None:
        with shared.hold(size):
            pass

    with ThreadPoolExecutor(1) as threads, shared.hold(size):
        second = threads.submit(ask)
        wait_until(lambda: second.done() or len(shared._waiting) == 1)
        assert not second.done()
    second.result()
    assert shared.peak_bytes == size
