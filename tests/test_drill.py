"""Restore tests: what passes, what fails, what says nothing, and which tenant is next."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared import catalogue, drill, keys, registry, smoke
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.drill import Drilled, Picked
from shared.engine import memories, schema
from shared.errors import ObjectStoreUnavailable, UnknownBackup
from shared.objects import ObjectStore
from tests.core_fixtures import World, encrypted, new_world, settings_in, sha256_of

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
    (picked,) = drill.select(world.control_plane, world.settings, tenant_id=world.tenant_id)
    with drill.sandbox(world.settings) as directory:
        tested = _drill(world, objects or world.objects, picked, directory)
    return drill.record(world.control_plane, tested)


def _drill(world: World, objects: ObjectStore, picked: Picked, directory: Path) -> Drilled:
    return drill.run(world.control_plane, objects, drill.fetch(objects, picked, directory, world.control_plane))


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
        *("sha256", "flipped_byte", "whole", "manifest", "schema", "sentinel", "full_text", "create_search_get")
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
    assert (tested.outcome, failed(tested)) == ("fail", ["sha256", "second_look"])
    assert (recorded(backed), status(backed)) == ([("fail", ["sha256", "second_look"])], "corrupt")
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


def test_a_store_in_which_nothing_is_found_condemns_no_backup(backed: World) -> None:
    """A mistyped prefix, or a mount that is gone, on drill day: restores must not take older backups for it."""
    backed.back_up()
    backed.back_up()
    elsewhere = backed.settings.data_dir / "objects-elsewhere"
    elsewhere.mkdir()
    tested = run(backed, ObjectStore(backed.settings.model_copy(update={"object_store_url": elsewhere.as_uri()})))
    assert (tested.outcome, failed(tested)) == ("inconclusive", ["sha256"])
    assert "right object store" in tested.checks[-1].seen
    assert status(backed) == "available"


def test_a_byte_lost_on_the_way_condemns_no_backup(backed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look reads it whole: it was the way, and the tenant stays next in line."""
    whole, looks = backed.objects.chunks, iter([True])

    def chunks(key: str) -> Iterator[bytes]:
        for chunk in whole(key):
            yield chunk[:-1] if next(looks, False) else chunk

    monkeypatch.setattr(backed.objects, "chunks", chunks)
    tested = run(backed)
    assert (tested.outcome, failed(tested)) == ("inconclusive", ["sha256"])
    assert (recorded(backed), status(backed)) == ([("inconclusive", ["sha256"])], "available")


def test_an_object_that_another_key_opens_condemns_no_backup(world: World) -> None:
    """It is byte for byte what was stored: whoever put the wrong key there is at fault, not the backup."""
    sealed = world.change(**encrypted())
    sealed.write("one")
    made = sealed.back_up()
    other = keys.rotate(sealed.control_plane, sealed.settings, sealed.tenant_id)
    with sealed.control_plane.transaction() as connection:
        connection.execute("UPDATE backups SET key_id = %s WHERE backup_id = %s", (other.key_id, made.backup_id))
    assert run(sealed).outcome == "inconclusive"
    assert status(sealed) == "available"


def test_a_store_that_fails_in_the_middle_of_a_download_is_inconclusive(
    backed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a download is not a wrong sha256."""

    def broken(*_: object, **__: object) -> int:
        raise ObjectStoreUnavailable("cut off")

    monkeypatch.setattr(backed.objects, "chunks", broken)
    assert run(backed).outcome == "inconclusive"
    assert status(backed) == "available"


def test_the_next_tenant_is_the_one_never_drilled_then_the_one_drilled_longest_ago(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    """Everybody gets a turn, a suspended tenant too, whatever its name; what cannot be drilled is passed over."""
    url = new_database()
    settings = settings_in(tmp_path, url)
    with ControlPlane(settings) as control_plane:
        control_plane.migrate()
        with pytest.raises(UnknownBackup):
            drill.select(control_plane, settings)
        worlds = {w.tenant_id: w for w in (new_world(tmp_path, url, control_plane) for _ in range(5))}
        first, second, third, bare, suspended = worlds
        for tenant_id in (first, second, third, suspended):
            worlds[tenant_id].back_up()
        registry.suspend(control_plane, suspended)
        order = []
        for _ in range(5):
            (picked,) = drill.select(control_plane, settings, count=1)
            order.append(picked.tenant_id)
            run(worlds[picked.tenant_id])
        assert order == [first, second, third, suspended, first]
        assert bare not in order
        assert drill.select(control_plane, settings, tenant_id=suspended)[0].reason == "asked for"
        with pytest.raises(UnknownBackup):
            drill.select(control_plane, settings, tenant_id=bare)


def test_an_inconclusive_test_does_not_use_up_a_tenants_turn(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Otherwise an outage on drill day leaves a tenant untested for a whole round."""
    url = new_database()
    settings = settings_in(tmp_path, url)
    with ControlPlane(settings) as control_plane:
        control_plane.migrate()
        one, other = (new_world(tmp_path, url, control_plane) for _ in range(2))
        for world in (one, other):
            world.back_up()
        (picked,) = drill.select(control_plane, settings, count=1)
        check = smoke.Check("sha256", False, "unreachable", 1.0)
        silent = Drilled(picked, (check,), "inconclusive", datetime.now(UTC), 1.0, 0.0, 0.0, 0.0, 1.0, None)
        drill.record(control_plane, drill.record(control_plane, silent))  # twice is once
        (again,) = drill.select(control_plane, settings, count=1)
        assert again.tenant_id == picked.tenant_id == one.tenant_id
        two = drill.select(control_plane, settings)
        assert {p.tenant_id for p in two} == {one.tenant_id, other.tenant_id}
        seen = drill.trend(control_plane)
        assert [d["outcome"] for d in seen.drills] == ["inconclusive"]
        assert (seen.never, seen.never_total) == ([one.tenant_id, other.tenant_id], 2)
        assert drill.never(control_plane) == seen.never
        row = control_plane.row("fleet_ages")
        assert row is not None and row["drill_age_seconds"] > 0 and row["drill_last_age_seconds"] is None
        run(one)
        row = control_plane.row("fleet_ages")
        assert row is not None and row["drill_age_seconds"] > row["drill_last_age_seconds"] >= 0  # the other's age
        assert drill.trend(control_plane).never == [other.tenant_id]


def test_an_older_recovery_point_is_drilled_by_its_id_and_its_rpo_is_its_own_age(backed: World) -> None:
    """Any point must work, not only the newest."""
    old = catalogue.newest(backed.control_plane, backed.tenant_id)
    backed.write("three")
    backed.back_up()
    (picked,) = drill.select(
        backed.control_plane, backed.settings, tenant_id=backed.tenant_id, backup_id=str(old.backup_id)
    )
    with drill.sandbox(backed.settings) as directory:
        tested = _drill(backed, backed.objects, picked, directory)
        assert list(directory.iterdir()) == []
    assert (tested.outcome, tested.picked.backup.backup_id) == ("pass", old.backup_id)
    assert tested.rpo_seconds == pytest.approx((tested.started_at - old.ts).total_seconds(), abs=0.01)
    assert tested.sentinel_age_seconds is not None and tested.sentinel_age_seconds >= tested.rpo_seconds
    parts = (tested.download_ms, tested.decrypt_ms, tested.verify_ms, tested.smoke_ms)
    assert tested.rto_ms == pytest.approx(sum(parts), abs=0.01) and min(tested.verify_ms, tested.smoke_ms) > 0


def test_a_gate_that_lets_a_changed_byte_through_fails_the_drill(
    backed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate is tested too: a restore that compares no sha256 must not stay unseen."""
    (picked,) = drill.select(backed.control_plane, backed.settings, tenant_id=backed.tenant_id)
    with drill.sandbox(backed.settings) as directory:
        fetched = drill.fetch(backed.objects, picked, directory, backed.control_plane)
        assert fetched.checks[-1].passed and "refused" in fetched.checks[-1].seen
        monkeypatch.setattr(smoke.pack, "receive", lambda _c, destination, *_, **__: destination.touch())
        assert fetched.file is not None
        assert not smoke.check_flipped_byte(fetched.file, picked.backup.sha256).passed


def test_an_encrypted_backup_is_decrypted_and_its_time_is_told(world: World) -> None:
    """RTO is split: a slow key is not a slow store."""
    sealed = world.change(**encrypted("zstd"))
    sealed.write("one")
    sealed.back_up()
    tested = run(sealed)
    assert (tested.outcome, failed(tested)) == ("pass", [])
    assert "decryption" in [c.name for c in tested.checks]
    keys.erase(sealed.control_plane, sealed.tenant_id)
    assert run(sealed).outcome == "inconclusive"


def test_a_backup_that_retention_took_after_it_was_picked_says_nothing(backed: World) -> None:
    """Its object is gone because it was given up: a failed drill would wake somebody for nothing."""
    (picked,) = drill.select(backed.control_plane, backed.settings, tenant_id=backed.tenant_id)
    with backed.control_plane.transaction() as connection:
        connection.execute("UPDATE backups SET status = 'deleting', status_before = 'available'")
    backed.objects.delete(picked.backup.key)
    with drill.sandbox(backed.settings) as directory:
        tested = _drill(backed, backed.objects, picked, directory)
    assert (tested.outcome, failed(tested)) == ("inconclusive", ["sha256"])
