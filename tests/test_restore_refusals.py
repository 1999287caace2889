"""Bad snapshots of every kind: refused before any lock, the live database untouched, writes going on."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from shared import catalogue
from shared.engine import schema
from shared.errors import (
    CorruptBackup,
    SchemaTooNew,
)
from tests.core_fixtures import LIVE, World, new_world
from tests.restore_fixtures import (
    begun,
    check_unlocked,
    identity,
    run,
    state_of,
)

pytest_plugins = ("tests.core_fixtures",)


def newer(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
        connection.execute("PRAGMA journal_mode = DELETE")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def overwrite_page(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[2 * 4096 : 3 * 4096] = b"\xff" * 4096
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


BAD: dict[str, Callable[[Path], object]] = {
    "one bit flipped": flip,
    "cut": cut,
    "empty": lambda file: os.truncate(file, 0),
    "not SQLite": lambda file: file.write_bytes(b"not a database" * 1000),
    "missing": lambda file: file.unlink(),
    "newer schema": newer,
}
KNOWN_BAD = {
    "cut": cut,
    "empty": BAD["empty"],
    "not SQLite": BAD["not SQLite"],
    "a page overwritten": overwrite_page,
    "newer schema": newer,
}
CASES = [(name, damage, False) for name, damage in BAD.items()] + [(n, d, True) for n, d in KNOWN_BAD.items()]


def refused(world: World, error: type[Exception] | tuple[type[Exception], ...]) -> None:
    """A restore that is refused before any lock, with the live database exactly as it was."""
    before = identity(world)
    chosen = begun(world)
    with pytest.raises(error):
        run(world, chosen)
    assert identity(world) == before
    assert world.control_plane.row("lease_get", tenant_id=world.tenant_id) is None  # never locked
    assert state_of(world, chosen) == "refused"
    check_unlocked(world)
    world.write("still writing")
    assert world.rows() == [*LIVE, "still writing"]


def set_sha256(world: World, sha256: str) -> None:
    with world.control_plane.transaction() as connection:
        connection.execute("UPDATE backups SET sha256 = %s WHERE tenant_id = %s", (sha256, world.tenant_id))


@pytest.mark.parametrize(
    ("damage", "known"),
    [case[1:] for case in CASES],
    ids=[f"{name}, sha256 {'of that' if known else 'of the original'}" for name, _, known in CASES],
)
def test_a_bad_snapshot_is_refused_before_any_lock(
    backed: World, damage: Callable[[Path], object], known: bool
) -> None:
    """Whatever is wrong with the object, the live database is not touched and writes go on."""
    file = backed.object_path(catalogue.newest(backed.control_plane, backed.tenant_id))
    damage(file)
    if known:
        set_sha256(backed, hashlib.sha256(file.read_bytes()).hexdigest())
    refused(backed, (CorruptBackup, SchemaTooNew) if known and damage is newer else CorruptBackup)


def test_a_wrong_sha256_in_the_catalogue_is_refused(backed: World) -> None:
    """Which of the two is wrong cannot be known, so neither is trusted."""
    set_sha256(backed, "0" * 64)
    refused(backed, CorruptBackup)


def test_another_tenants_snapshot_is_refused_even_with_its_own_sha256(backed: World) -> None:
    """Names and hashes can agree and still be somebody else's memories."""
    url = backed.settings.control_plane_url.get_secret_value()
    other = new_world(backed.settings.data_dir, url, backed.control_plane)
    other.write("theirs")
    theirs = other.back_up()
    mine = catalogue.newest(backed.control_plane, backed.tenant_id)
    shutil.copy(backed.object_path(theirs), backed.object_path(mine))
    set_sha256(backed, theirs.sha256)
    refused(backed, CorruptBackup)
