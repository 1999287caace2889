"""A store on a local disk: one that is full, another one than the tenants', or has something else in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import catalogue
from shared.errors import CorruptBackup, NoSpace, ObjectStoreUnavailable
from shared.objects import ObjectStore
from tests.core_fixtures import World, settings_in, sha256_of
from tests.disk_fixtures import file_system

pytest_plugins = ("tests.core_fixtures",)


def test_a_local_disks_refusal_is_no_lock(tmp_path: Path) -> None:
    """Its message has the path in it, and that the tenant's name."""
    store = ObjectStore(settings_in(tmp_path, ""))
    (tmp_path / "objects/tenants/worm").mkdir(parents=True)
    with pytest.raises(ObjectStoreUnavailable):
        store.delete("tenants/worm")


def test_a_local_store_on_a_full_disk_is_no_space_and_keeps_nothing(world: World, tmp_path: Path) -> None:
    """Another filesystem: the snapshot is copied, and half a copy must not be found later."""
    world.write("x" * 500_000)
    with file_system(tmp_path / "disk", "size=300k") as disk:
        world.change(object_store_url=disk.as_uri())
        with pytest.raises(NoSpace):
            world.back_up()
        assert not [path for path in disk.rglob("*") if path.is_file()]
    assert catalogue.list_of(world.control_plane, world.tenant_id) == []


def test_a_local_store_on_another_filesystem_gets_a_checked_copy(world: World, tmp_path: Path) -> None:
    """A link cannot reach there."""
    world.write("one")
    with file_system(tmp_path / "disk", "size=4m") as disk:
        world.change(object_store_url=disk.as_uri())
        made = world.back_up()
        assert sha256_of(disk / made.key) == made.sha256
        other, key = tmp_path / "object", made.key.replace(world.tenant_id, "acme")
        other.write_bytes(b"another")
        with pytest.raises(CorruptBackup):
            world.objects.put_file(key, other, "0" * 64)
        assert world.objects.put_file(key, other, sha256_of(other)) == len(b"another")
