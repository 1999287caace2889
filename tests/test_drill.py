"""Restore tests: what passes, what fails, what says nothing, and which tenant is next."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from shared import catalogue, drill, registry, smoke
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.drill import Drilled
from shared.engine import memories, schema
from shared.errors import ObjectStoreUnavailable, UnknownBackup
from shared.objects import ObjectStore
from tests.core_fixtures import World, new_world, settings_in, sha256_of

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def backed(world: World) -> World:
    world.write("one", "two")
    world.back_up()
    return world


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with what changes when it is written or replaced."""
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in sorted(root.rglob("*"))}


def run(world: World, objects: ObjectStore | None = None) -> Drilled:
    picked = drill.pick(world.control_plane, world.tenant_id)
    with drill.sandbox(world.settings) as directory:
        tested = drill.run(drill.fetch(objects or world.objects, picked, directory))
    return drill.record(world.control_plane, tested)


def status(world: World) -> str:
    return catalogue.list_of(world.control_plane, world.tenant_id)[0].status


def failed(tested: Drilled) -> list[str]:
    return [check.name for check in tested.checks if not check.passed]


def recorded(world: World) -> list[tuple[str, list[str]]]:
    with world.control_plane.transaction() as connection:
        rows = connection.execute(
            "SELECT outcome, checks, rto_ms, rpo_seconds FROM restore_tests WHERE tenant_id = %s ORDER BY finished_at",
            (world.tenant_id,),
        ).fetchall()
    assert all(row["rto_ms"] > 0 and row["rpo_seconds"] >= 0 for row in rows)
    return [(row["outcome"], [c["name"] for c in row["checks"] if not c["passed"]]) for row in rows]


def test_a_good_backup_passes_every_check_and_nothing_else_is_touched(backed: World) -> None:
    """The drill proves the backup, leaves no copy, and cannot reach a tenant's files."""
    before = tree(backed.settings.tenants_dir)
    tested = run(backed)
    assert (tested.outcome, failed(tested)) == ("pass", [])
    assert [c.name for c in tested.checks] == [
        *("sha256", "whole", "manifest", "schema", "sentinel", "full_text", "create_search_get")
    ]
    assert tree(backed.settings.tenants_dir) == before
    assert list(backed.settings.sandbox_dir.iterdir()) == []
    assert (recorded(backed), status(backed)) == ([("pass", [])], "available")


def test_an_empty_tenants_backup_passes(world: World) -> None:
    """No memories is a valid state, not a failure."""
    world.back_up()
    assert run(world).outcome == "pass"


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "missing"])
def test_a_damaged_object_fails_and_is_never_chosen_again(backed: World, damage: str) -> None:
    """A restore at three in the morning must not find it as the newest."""
    good = catalogue.newest(backed.control_plane, backed.tenant_id)
    bad = backed.back_up()
    file = backed.object_path(bad)
    match damage:
        case "flipped byte":
            data = bytearray(file.read_bytes())
            data[len(data) // 3] ^= 255
            file.write_bytes(data)
        case "cut":
            os.truncate(file, 100)
        case "missing":
            file.unlink()
    tested = run(backed)
    assert (tested.outcome, failed(tested)) == ("fail", ["sha256"])
    assert (recorded(backed), status(backed)) == ([("fail", ["sha256"])], "corrupt")
    assert catalogue.newest(backed.control_plane, backed.tenant_id) == good


def alter(world: World, *statements: str) -> Backup:
    """Change the stored object by SQL and make the catalogue agree with its bytes."""
    made = catalogue.newest(world.control_plane, world.tenant_id)
    file = world.object_path(made)
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        for statement in statements:
            connection.execute(statement)
    with world.control_plane.transaction() as control_plane:
        control_plane.execute("UPDATE backups SET sha256 = %s WHERE key = %s", (sha256_of(file), made.key))
    return made


@pytest.mark.parametrize(
    ("statement", "check"),
    [
        ("DELETE FROM memories WHERE content = 'two'", "manifest"),
        ("UPDATE meta SET value = 'globex' WHERE key = 'tenant_id'", "whole"),
        ("DROP TABLE versions", "whole"),
    ],
)
def test_a_whole_file_that_is_not_what_was_promised_fails_and_is_marked(
    backed: World, statement: str, check: str
) -> None:
    """The right bytes of the wrong thing: another tenant's, or with rows missing."""
    alter(backed, statement)
    tested = run(backed)
    assert tested.outcome == "fail"
    assert check in failed(tested)
    assert status(backed) == "corrupt"


@pytest.mark.parametrize(
    ("statement", "check"),
    [
        ("ALTER TABLE memories ADD COLUMN extra TEXT", "schema"),
        (f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}", "schema"),
        ("INSERT INTO memories_fts (memories_fts) VALUES ('delete-all')", "full_text"),
    ],
)
def test_a_backup_this_build_cannot_work_with_is_reported_and_kept(backed: World, statement: str, check: str) -> None:
    """The fault may be the build's: a rolled-back deploy must not condemn the newer build's backups."""
    alter(backed, statement)
    tested = run(backed)
    assert (tested.outcome, check in failed(tested)) == ("fail", True)
    assert status(backed) == "available"


def test_an_engine_that_does_not_work_keeps_the_backup(backed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in this build shows as a failed drill, not as a bad backup."""
    monkeypatch.setattr(memories, "delete", lambda *_: None)
    tested = run(backed)
    assert (tested.outcome, failed(tested)) == ("fail", ["create_search_get"])
    assert status(backed) == "available"


def test_a_store_that_cannot_be_reached_or_refuses_says_nothing_about_the_backup(backed: World) -> None:
    """Inconclusive: recorded, nothing marked, and the tenant stays next in line."""
    unreachable = settings_in(
        backed.settings.data_dir,
        "",
        object_store_url="s3://engram/x",
        s3_endpoint="http://127.0.0.1:1",
        s3_access_key_id="k",
        s3_secret_access_key="s",
        object_store_retries=0,
        object_store_retry_timeout_seconds=0.2,
    )
    tested = run(backed, ObjectStore(unreachable))
    assert (tested.outcome, failed(tested)) == ("inconclusive", ["sha256"])
    assert (recorded(backed), status(backed)) == ([("inconclusive", ["sha256"])], "available")


def test_a_store_that_fails_in_the_middle_of_a_download_is_inconclusive(
    backed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a download is not a wrong sha256."""

    def broken(*_: object, **__: object) -> int:
        raise ObjectStoreUnavailable("cut off")

    monkeypatch.setattr(backed.objects, "download", broken)
    assert run(backed).outcome == "inconclusive"
    assert status(backed) == "available"


def test_the_next_tenant_is_the_one_never_drilled_then_the_one_drilled_longest_ago(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    """Every backup gets its turn, whatever the order of names; what cannot be drilled is passed over."""
    url = new_database()
    with ControlPlane(settings_in(tmp_path, url)) as control_plane:
        control_plane.migrate()
        with pytest.raises(UnknownBackup):
            drill.pick(control_plane)
        worlds = {w.tenant_id: w for w in (new_world(tmp_path, url, control_plane) for _ in range(5))}
        first, second, third, bare, suspended = worlds
        for tenant_id in (first, second, third, suspended):
            worlds[tenant_id].back_up()
        registry.suspend(control_plane, suspended)
        order = []
        for _ in range(4):
            picked = drill.pick(control_plane)
            order.append(picked.tenant_id)
            run(worlds[picked.tenant_id])
        assert order == [first, second, third, first]
        assert bare not in order
        assert drill.pick(control_plane, suspended).reason == "asked for"
        with pytest.raises(UnknownBackup):
            drill.pick(control_plane, bare)


def test_an_inconclusive_test_does_not_use_up_a_tenants_turn(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Otherwise an outage on drill day leaves a tenant untested for a whole round."""
    url = new_database()
    with ControlPlane(settings_in(tmp_path, url)) as control_plane:
        control_plane.migrate()
        one, other = (new_world(tmp_path, url, control_plane) for _ in range(2))
        for world in (one, other):
            world.back_up()
        picked = drill.pick(control_plane)
        check = smoke.Check("sha256", False, "unreachable", 1.0)
        drill.record(control_plane, Drilled(picked, (check,), "inconclusive", 1.0, 1.0))
        assert drill.pick(control_plane).tenant_id == picked.tenant_id == one.tenant_id
