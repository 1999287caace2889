"""Packed backups: what is stored is packed as asked, opens with public tools, and comes back as it was."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pyrage
import pytest

from shared import backup, catalogue, keys
from shared.catalogue import Backup
from shared.errors import CorruptBackup, KeyUnavailable, NoSpace
from shared.objects import ObjectStore
from shared.tenant import parse_object_key
from tests.core_fixtures import World, contents_of, sha256_of

pytest_plugins = ("tests.core_fixtures",)

PACKINGS = {"none": "", "zstd": ".zst", "age": ".age", "zstd+age": ".zst.age"}


def packed(world: World, packing: str, **more: object) -> World:
    """The same tenant, packing like this from now on."""
    values = {
        "backup_compression": "zstd" if "zstd" in packing else "none",
        "backup_encryption": "age" if "age" in packing else "none",
        "backup_master_key": MASTER,
        **more,
    }
    world.settings = type(world.settings)(**(world.settings.model_dump() | values))
    world.objects = ObjectStore(world.settings)
    return world


def fetch(world: World, made: Backup, name: str = "back.sqlite") -> Path:
    destination = world.settings.data_dir / name
    backup.fetch(world.objects, made, destination, world.control_plane)
    return destination


MASTER = str(pyrage.x25519.Identity.generate())


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_backup_comes_back_as_it_was_however_it_is_packed(world: World, packing: str) -> None:
    """The catalogue says the plain file's sha256 and size, and the object's; the key says what opens it."""
    packed(world, packing)
    world.write("one", "two " * 1000)
    made = world.back_up()
    assert made.packing == packing
    assert made.key.endswith(f"_v{made.schema_version}.sqlite{PACKINGS[packing]}")
    parts = parse_object_key(made.key)
    assert parts is not None and parts.ts == made.ts
    stored = world.object_path(made)
    assert (made.stored_sha256, made.stored_bytes) == (sha256_of(stored), stored.stat().st_size)
    file = fetch(world, made)
    assert (made.sha256, made.size_bytes) == (sha256_of(file), file.stat().st_size)
    assert contents_of(file) == ["one", "two " * 1000]
    assert (made.key_id is not None) == ("age" in packing)
    assert [p.name for p in world.settings.data_dir.glob("*.sqlite*")] == ["back.sqlite"]
