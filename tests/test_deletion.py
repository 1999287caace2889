"""Deleting a tenant: everything of it is gone and shown to be, whatever dies in between, and nobody else's."""

from __future__ import annotations

import hashlib
import json
import signal
from datetime import UTC, datetime, timedelta

import pytest

from shared import backup, catalogue, deletion, expiry, keys, registry, sweep
from shared.deletion import Deleted
from shared.engine.database import TenantDatabase
from shared.errors import (
    DrainTimeout,
    KeyUnavailable,
    ObjectLocked,
    Permanent,
    Refused,
    TenantDatabaseUnavailable,
    TenantNotActive,
    UnknownBackup,
)
from shared.fence import RestoreMutex
from shared.objects import ObjectStore
from shared.workdir import workdir
from tests.core_fixtures import World, encrypted, new_world, sampled, start_child
from tests.restore_fixtures import begun, run

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def sealed(world: World) -> World:
    """A tenant with two encrypted backups and a live row after them."""
    world.change(**encrypted("zstd"))
    world.write("one")
    world.back_up()
    world.back_up("safety")
    world.write("two")
    return world


def delete(world: World, *, keep_backups: bool = False) -> Deleted:
    return deletion.delete(
        world.settings,
        world.control_plane,
        world.objects,
        world.tenant_id,
        reason="contract ended",
        requested_by="test",
        keep_backups=keep_backups,
    )


def check_gone(world: World, done: Deleted) -> None:
    """By plain means: no file, no object, no key, no backup to choose; the receipt is what is stored."""
    root = world.settings.data_dir
    assert not [p for p in root.rglob("*") if p.is_file() and world.tenant_id in str(p.relative_to(root))]
    assert [p.name for p in world.settings.tenants_dir.iterdir() if world.tenant_id in p.name] == []
    assert keys.list_of(world.control_plane, world.tenant_id) == []
    assert {b.status for b in catalogue.list_of(world.control_plane, world.tenant_id)} <= {"deleted"}
    assert registry.get(world.control_plane, world.tenant_id).state == "deleted"
    assert world.lease_holder() is None
    with world.control_plane.transaction() as connection:
        rows = connection.execute(
            "SELECT * FROM tenant_deletions WHERE tenant_id = %s ORDER BY started_at DESC", (world.tenant_id,)
        ).fetchall()
    assert hashlib.sha256(rows[0]["receipt"].encode()).hexdigest() == rows[0]["receipt_sha256"] == done.receipt_sha256
    assert rows[0]["erased"] and done.erased


def test_a_deleted_tenant_is_gone_and_the_receipt_says_what_was_removed(sealed: World) -> None:
    """Files, objects and keys by name, each looked for again; usage is billed and stays."""
    before = deletion.look(sealed.settings, sealed.control_plane, sealed.objects, sealed.tenant_id)
    assert len(before.objects) == 2 and len(before.keys) == 1
    (sealed.settings.data_dir / "objects" / f"tenants/{sealed.tenant_id}/db/stray").write_text("without a row")
    other = new_world(
        sealed.settings.data_dir, sealed.settings.control_plane_url.get_secret_value(), sealed.control_plane
    )
    other.write("theirs")
    theirs = other.back_up()
    opened = TenantDatabase(sealed.paths)
    with opened.write():
        pass
    done = delete(sealed)
    check_gone(sealed, done)
    removed = json.loads(done.receipt)["removed"]
    assert (
        before.files.keys() <= removed["files"].keys()
        and f"{sealed.tenant_id}/generations/000001/engram.db" in (removed["files"])
    )
    assert before.objects.items() <= removed["objects"].items() and removed["keys"] == before.keys
    with pytest.raises(TenantDatabaseUnavailable), opened.write():
        pass
    opened.close()
    assert other.rows() == ["theirs"] and catalogue.newest(other.control_plane, other.tenant_id) == theirs
    assert sweep.sweep_disk(sealed.settings) == []
    assert not sealed.paths.root.exists()


def test_a_deleted_tenants_id_is_free_again_only_when_nothing_is_left(sealed: World) -> None:
    """Else the new tenant would find the old one's backups."""
    kept = delete(sealed, keep_backups=True)
    assert not kept.erased and not sealed.paths.root.exists()
    assert len(sealed.objects.keys(f"tenants/{sealed.tenant_id}/")) == 2
    with pytest.raises(Permanent, match="not free"):
        registry.create(sealed.control_plane, sealed.settings, sealed.tenant_id)
    page = expiry.plan(sealed.control_plane, sealed.settings, after=sealed.tenant_id[:-1], limit=1)
    assert [p.delete for p in page.planned if p.tenant_id == sealed.tenant_id] == [()]  # within the days of grace
    check_gone(sealed, delete(sealed))
    again = registry.create(sealed.control_plane, sealed.settings, sealed.tenant_id)
    assert (again.state, again.generation, sealed.rows()) == ("active", 1, [])
    with pytest.raises(UnknownBackup):
        catalogue.newest(sealed.control_plane, sealed.tenant_id)


def test_a_restore_that_runs_or_a_held_backup_refuses_with_nothing_changed(sealed: World) -> None:
    """A restore's files must not vanish under it, and a legal hold is not the operator's to break."""
    mutex = RestoreMutex(sealed.paths)
    with pytest.raises(Refused, match="another restore"):
        delete(sealed)
    mutex.release()
    newest = catalogue.list_of(sealed.control_plane, sealed.tenant_id)[0]
    expiry.hold(sealed.control_plane, newest.backup_id, datetime.now(UTC) + timedelta(days=1), "court")
    with pytest.raises(Refused, match="court"):
        delete(sealed)
    elsewhere = World(
        sealed.settings.model_copy(update={"machine_id": "m9"}),
        sealed.control_plane,
        sealed.objects,
        sealed.tenant_id,
    )
    with pytest.raises(Refused, match="machine"):
        delete(elsewhere)
    assert registry.get(sealed.control_plane, sealed.tenant_id).state == "active"
    assert sealed.rows() == ["one", "two"] and sealed.lease_holder() is None


def test_a_process_inside_the_database_keeps_it_until_the_deletion_is_run_again(sealed: World) -> None:
    """Nothing is removed under somebody's transaction; requests are refused from the first try on."""
    opened = TenantDatabase(sealed.paths)
    sealed.change(restore_drain_timeout_seconds=0.3)
    with opened.read(), pytest.raises(DrainTimeout):
        delete(sealed)
    opened.close()
    assert registry.get(sealed.control_plane, sealed.tenant_id).state == "deleting"
    assert sealed.rows() == ["one", "two"] and not sealed.paths.mark.exists()
    with pytest.raises(TenantNotActive):
        begun(sealed)
    check_gone(sealed, delete(sealed))


def test_a_restore_and_a_backup_planned_before_come_to_nothing_after(sealed: World) -> None:
    """What was on its way when the tenant was deleted must not bring it back."""
    chosen = begun(sealed)
    taken = backup.take(sealed.settings, sealed.tenant_id, sealed.settings.data_dir)
    stored = backup.store(sealed.objects, taken, sealed.control_plane)
    done = delete(sealed)
    check_gone(sealed, done)
    with pytest.raises(UnknownBackup):
        backup.register(sealed.control_plane, stored)
    with pytest.raises(Permanent):
        run(sealed, chosen)
    assert not sealed.paths.current.exists() and not sealed.paths.restore_file.exists()
    check_gone(sealed, delete(sealed))


def test_a_snapshot_taken_before_is_not_stored_after_and_makes_no_key(
    sealed: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Else there is an object of an erased tenant, and a key that keeps its id from being free."""
    taken = backup.take(sealed.settings, sealed.tenant_id, tmp_path_factory.mktemp("elsewhere"))
    check_gone(sealed, delete(sealed))
    with pytest.raises(KeyUnavailable, match="deleted"):
        backup.store(sealed.objects, taken, sealed.control_plane)
    plain = sealed.settings.model_copy(update={"backup_compression": "none", "backup_encryption": "none"})
    with pytest.raises(TenantNotActive, match="deleted"):
        backup.store(ObjectStore(plain), taken, sealed.control_plane)
    assert sealed.objects.keys(f"tenants/{sealed.tenant_id}/") == []
    registry.create(sealed.control_plane, sealed.settings, sealed.tenant_id)


def test_what_killed_runs_and_uploads_left_is_removed_and_in_the_receipt(sealed: World) -> None:
    """A whole plain copy in a work directory is the tenant's data as much as its database."""
    left = sealed.settings.data_dir / "tmp" / "backup-0123" / f"{sealed.tenant_id}.sqlite"
    drilled = sealed.settings.sandbox_dir / "drill-0123" / "tenants" / sealed.tenant_id / "engram.db"
    staged = sealed.settings.data_dir / "objects" / f"tenants/{sealed.tenant_id}/db/x_v1.sqlite.zst.age#77"
    for file in (left, drilled, staged):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("content")
    done = delete(sealed)
    check_gone(sealed, done)
    assert not staged.exists()
    removed = json.loads(done.receipt)["removed"]
    assert {str(f.relative_to(sealed.settings.data_dir)) for f in (left, drilled)} <= removed["files"].keys()
    assert removed["objects"][f"tenants/{sealed.tenant_id}/db/{staged.name}"] == len("content")


def test_no_proof_is_written_while_a_run_has_a_copy_in_hand(sealed: World) -> None:
    """It may be about to store it; the deletion says who and is finished by the next."""
    settings = sealed.settings.model_copy(update={"restore_drain_timeout_seconds": 0.2})
    with workdir(settings.data_dir / "tmp", "backup") as directory:
        (directory / f"{sealed.tenant_id}.sqlite").write_text("content")
        with pytest.raises(Permanent, match=r"tmp/backup-.* run it again"):
            delete(World(settings, sealed.control_plane, sealed.objects, sealed.tenant_id))
        assert registry.get(sealed.control_plane, sealed.tenant_id).state == "deleting"
    check_gone(sealed, delete(sealed))


def test_the_keys_of_kept_backups_go_with_the_last_of_them(sealed: World) -> None:
    """Wrapped keys of nothing would be kept for ever, and the id would never be free."""
    delete(sealed, keep_backups=True)
    assert sealed.tenant_id not in keys.erase_left(sealed.control_plane)
    first, last = catalogue.list_of(sealed.control_plane, sealed.tenant_id)
    for one, erased in ((first, False), (last, True)):
        sealed.control_plane.execute("backup_deleted_by_key", key=one.key)
        assert (sealed.tenant_id in keys.erase_left(sealed.control_plane)) == erased
    assert keys.list_of(sealed.control_plane, sealed.tenant_id) == []


def test_an_object_that_the_store_keeps_leaves_the_tenant_deleting_with_its_keys_gone(
    sealed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No proof is written for what is still there, but nobody can read it any more."""

    def locked(key: str) -> None:
        raise ObjectLocked(f"{key}: kept until 2031")

    with monkeypatch.context() as patch:
        patch.setattr(sealed.objects, "delete", locked)
        with pytest.raises(Permanent, match="kept until 2031"):
            delete(sealed)
    assert registry.get(sealed.control_plane, sealed.tenant_id).state == "deleting"
    assert keys.list_of(sealed.control_plane, sealed.tenant_id) == []
    with pytest.raises(UnknownBackup):
        catalogue.newest(sealed.control_plane, sealed.tenant_id)
    check_gone(sealed, delete(sealed))


STEPS = {
    "before the state": ("shared.deletion._begin", 1, False),
    "after the state": ("shared.deletion._begin", 1, True),
    "fence up": ("shared.fence.Fence.raise_", 1, True),
    "renamed": ("os.rename", 1, True),
    "one file removed": ("os.unlink", 1, True),
    "five files removed": ("os.unlink", 5, True),
    "files removed": ("shared.deletion._remove_files", 1, True),
    "keys erased": ("shared.keys.erase", 1, True),
    "rows marked, no object gone": ("shared.objects.ObjectStore.delete", 1, False),
    "one object gone": ("shared.objects.ObjectStore.delete", 1, True),
    "objects gone": ("shared.deletion._remove_backups", 1, True),
    "before the receipt": ("json.dumps", 1, False),
    "all done": ("shared.deletion._finish", 1, True),
}
_CHILD = """
import functools, os, pkgutil, signal, sys
from pathlib import Path
from shared import deletion
from shared.control_plane import ControlPlane
from shared.objects import ObjectStore
from tests.core_fixtures import settings_in
directory, url, tenant_id, target, nth, after = sys.argv[1:]
owner, _, name = target.rpartition(".")
owner = pkgutil.resolve_name(owner)
real, calls = getattr(owner, name), []
settings = settings_in(Path(directory), url)
control_plane, objects = ControlPlane(settings), ObjectStore(settings)
deletion.check(settings, control_plane, tenant_id, keep_backups=False)
@functools.wraps(real)
def dying(*a, **k):
    calls.append(1)
    result = real(*a, **k) if after == "True" or len(calls) < int(nth) else None
    if len(calls) == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, dying)
deletion.delete(settings, control_plane, objects, tenant_id, reason="r", requested_by="t")
"""


@pytest.mark.parametrize("step", sampled(STEPS, "fence up", "renamed", "five files removed", "one object gone"))
def test_a_deletion_killed_anywhere_is_finished_by_the_next(world: World, step: str) -> None:
    """Half a tenant is never served, and the receipt of the second run lists what the first removed."""
    world.write("one")
    made = [world.back_up(), world.back_up()]
    target, nth, after = STEPS[step]
    url = world.settings.control_plane_url.get_secret_value()
    child = start_child(_CHILD, world.settings.data_dir, url, world.tenant_id, target, nth, after)
    assert child.wait(60) == -signal.SIGKILL
    assert child.stdout is not None
    child.stdout.close()
    state = registry.get(world.control_plane, world.tenant_id).state
    assert state == {"before the state": "active", "all done": "deleted"}.get(step, "deleting")
    sweep.sweep_disk(world.settings)
    sweep.sweep_records(world.settings, world.control_plane)
    done = delete(world)
    check_gone(world, done)
    if step != "all done":
        removed = json.loads(done.receipt)["removed"]
        assert {b.key for b in made} <= removed["objects"].keys()
        assert f"{world.tenant_id}/generations/000001/engram.db" in removed["files"]


def test_retention_takes_no_backup_back_for_a_tenant_whose_deletion_was_killed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the last good backup of everybody else."""
    world.write("one")
    world.back_up()
    with monkeypatch.context() as patch:
        patch.setattr(deletion, "_finish", lambda *_: pytest.fail("not reached"))
        patch.setattr(ObjectStore, "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            delete(world)
    outcomes = {r.outcome for r in expiry.remove(world.control_plane, world.objects, world.settings)
                if r.tenant_id == world.tenant_id}  # fmt: skip
    assert outcomes == {"deleted"}
    check_gone(world, delete(world))
