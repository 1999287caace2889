"""A backup: snapshot → store → register, and what the catalogue then says."""

from __future__ import annotations

import secrets
from datetime import timedelta
from uuid import uuid4

import pytest

from shared import backup, catalogue
from shared.errors import CorruptDatabase, ObjectStoreRefused, UnknownBackup
from shared.tenant import parse_object_key
from tests.core_fixtures import World, contents_of, new_world, sha256_of

pytest_plugins = ("tests.core_fixtures",)


def test_a_backup_is_an_object_and_a_row_that_say_the_same(world: World) -> None:
    """A row is a promise: the object is there, with that sha256 and those rows."""
    world.write("one", "two")
    made = world.back_up("scheduled")
    file = world.object_path(made)
    assert (sha256_of(file), file.stat().st_size) == (made.sha256, made.size_bytes)
    assert contents_of(file) == ["one", "two"]
    parts = parse_object_key(made.key)
    assert parts is not None
    assert (parts.tenant_id, parts.ts, parts.schema_version) == (world.tenant_id, made.ts, made.schema_version)
    assert (made.kind, made.status, made.manifest["memories"]) == ("scheduled", "available", 2)
    assert made.verified_at is not None
    assert catalogue.get(world.control_plane, world.tenant_id, str(made.backup_id)) == made


def test_the_local_copy_is_gone_once_it_is_stored(world: World) -> None:
    """Otherwise a fleet's backup fills the disk."""
    taken = backup.take(world.settings, world.tenant_id, world.settings.data_dir)
    assert taken.path.exists()
    backup.store(world.objects, taken)
    assert not taken.path.exists()


def test_a_crash_between_store_and_register_leaves_no_row(world: World) -> None:
    """An object nobody points at is harmless; a row without an object is a lie."""
    stored = backup.store(world.objects, backup.take(world.settings, world.tenant_id, world.settings.data_dir))
    with pytest.raises(UnknownBackup):
        catalogue.newest(world.control_plane, world.tenant_id)
    assert world.objects.exists(stored.key)
    assert world.back_up().key != stored.key


def test_registering_twice_keeps_the_first_row(world: World) -> None:
    """The reply may be lost, the flow tries again."""
    stored = backup.store(world.objects, backup.take(world.settings, world.tenant_id, world.settings.data_dir))
    first = backup.register(world.control_plane, stored)
    assert backup.register(world.control_plane, stored, kind="scheduled") == first
    assert catalogue.list_of(world.control_plane, world.tenant_id) == [first]


def test_a_store_that_holds_other_bytes_under_the_key_gets_no_row(world: World) -> None:
    """Nothing is overwritten and nothing registered."""
    taken = backup.take(world.settings, world.tenant_id, world.settings.data_dir)
    there = world.settings.data_dir / "objects" / catalogue.key_of(taken)
    there.parent.mkdir(parents=True)
    there.write_bytes(b"somebody else's")
    with pytest.raises(ObjectStoreRefused):
        backup.store(world.objects, taken)
    assert there.read_bytes() == b"somebody else's"
    assert catalogue.list_of(world.control_plane, world.tenant_id) == []


def test_a_corrupt_database_is_not_stored(world: World) -> None:
    """The last good backup stays the newest."""
    world.write("one")
    good = world.back_up()
    world.paths.database.resolve().write_bytes(b"x" * 8192)
    with pytest.raises(CorruptDatabase):
        world.back_up()
    assert catalogue.list_of(world.control_plane, world.tenant_id) == [good]


def test_newest_and_at_choose_by_time_and_never_a_bad_one(world: World) -> None:
    """`--at` means the newest backup not after that instant that can be trusted."""
    made = [world.back_up() for _ in range(3)]
    newest = catalogue.newest
    assert newest(world.control_plane, world.tenant_id) == made[2]
    assert newest(world.control_plane, world.tenant_id, at=made[1].ts) == made[1]
    assert newest(world.control_plane, world.tenant_id, at=made[2].ts - timedelta(microseconds=1)) == made[1]
    with pytest.raises(UnknownBackup):
        newest(world.control_plane, world.tenant_id, at=made[0].ts - timedelta(microseconds=1))
    world.control_plane.execute("backup_found_corrupt", backup_id=made[2].backup_id, reason="test")
    assert newest(world.control_plane, world.tenant_id) == made[1]
    with pytest.raises(UnknownBackup, match="corrupt"):
        catalogue.get(world.control_plane, world.tenant_id, made[2].backup_id)
    listed = catalogue.list_of(world.control_plane, world.tenant_id)
    assert [b.backup_id for b in listed] == [b.backup_id for b in reversed(made)]
    assert [b.status for b in listed] == ["corrupt", "available", "available"]


def test_a_backup_of_another_tenant_is_unknown(world: World) -> None:
    """An id from somebody else's catalogue must not restore here."""
    other = new_world(world.settings.data_dir, world.settings.control_plane_url.get_secret_value(), world.control_plane)
    theirs = other.back_up()
    for wrong in (theirs.backup_id, uuid4(), "not-a-uuid", secrets.token_hex(200)):
        with pytest.raises(UnknownBackup):
            catalogue.get(world.control_plane, world.tenant_id, wrong)


def test_a_working_directory_is_gone_after_the_run_and_after_the_next_run_of_a_dead_one(world: World) -> None:
    """Snapshots hold a tenant's data; they must not lie about."""
    parent = world.settings.data_dir / "tmp"
    dead = parent / "backup-dead"
    dead.mkdir(parents=True)
    (dead / "acme.sqlite").write_bytes(b"left over")
    with backup.work(parent, "backup") as first, backup.work(parent, "backup") as second:
        (first / "x").write_bytes(b"x")
        with backup.work(parent, "backup"):
            assert (first / "x").exists()
            assert second.exists()
        assert not dead.exists()
    assert list(parent.iterdir()) == []
