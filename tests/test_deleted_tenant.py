"""A tenant's directory that is deleted under open connections, and made again: the worst an operator's `rm` can do."""

from __future__ import annotations

import shutil

import pytest

from shared import catalogue, registry
from shared.engine import database, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import InMaintenance, TenantDatabaseUnavailable
from tests.core_fixtures import World
from tests.restore_fixtures import perform

pytest_plugins = ("tests.core_fixtures",)


def test_a_write_through_an_open_connection_goes_to_the_database_that_was_made_again(world: World) -> None:
    """The generation has the same number and the old lock file still locks: only its link count tells."""
    world.write("gone")
    opened = TenantDatabase(world.paths)
    with opened.read() as connection:
        assert memories.count(connection) == 1
    shutil.rmtree(world.paths.root)
    with pytest.raises(TenantDatabaseUnavailable), opened.write():
        pass
    assert database.create(world.paths)
    with pytest.raises(InMaintenance):
        opened.look_up(memories.count)
    with opened.write() as connection:
        memories.create(connection, NewMemory("kept"))
    opened.close()
    assert world.rows() == ["kept"]


def test_a_deleted_tenant_is_restored_and_open_connections_follow(world: World) -> None:
    """A restore into nothing starts counting generations anew."""
    world.write("one")
    world.back_up()
    opened = TenantDatabase(world.paths)
    with opened.write() as connection:
        memories.create(connection, NewMemory("lost with the directory"))
    shutil.rmtree(world.paths.root)
    perform(world)
    with opened.write() as connection:
        memories.create(connection, NewMemory("two"))
    opened.close()
    assert world.rows() == ["one", "two"]


def test_the_newest_backup_is_never_the_safety_backup_of_what_was_replaced(world: World) -> None:
    """Restoring twice must not bring back the damage; by its time or id the safety backup is still there."""
    world.write("good")
    good = world.back_up()
    world.write("damage")
    safety = world.back_up("safety")
    assert catalogue.newest(world.control_plane, world.tenant_id) == good
    assert catalogue.newest(world.control_plane, world.tenant_id, at=safety.ts) == safety
    assert catalogue.get(world.control_plane, world.tenant_id, safety.backup_id) == safety
    assert registry.get(world.control_plane, world.tenant_id).state == "active"
