"""Backups of a whole machine: what is done, what is skipped, what a crash leaves, what one bad tenant costs."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from shared import backup, boot, catalogue, fingerprint, fleet, fleet_run, generation, keys, snapshot
from shared.engine.connection import connect
from shared.errors import CorruptBackup, NoSpace, ObjectStoreUnavailable, Permanent
from shared.fleet_run import Done
from shared.objects import ObjectStore
from shared.staging import Staging
from tests.core_fixtures import contents_of, settings_in, wait_until
from tests.fleet_fixtures import Machine, made, skipped

pytest_plugins = ("tests.core_fixtures", "tests.fleet_fixtures")


@pytest.fixture(autouse=True)
def quick_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds become a fifth: ctime cannot be set back, so tests have to wait."""
    assert fingerprint._SETTLED_SECONDS >= 2
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 0.2)


def unchanged(machine: Machine) -> set[str]:
    """Bring a machine to where a night without traffic starts: everything backed up and seen settled."""
    machine.back_up()
    time.sleep(0.25)
    assert machine.back_up()
    return set(machine.tenants)


def test_a_run_backs_up_every_tenant_and_each_copy_holds_what_was_written(machine: Machine) -> None:
    """One run, many tenants, each with its own row and object."""
    done = machine.back_up()
    assert made(done) == set(machine.tenants)
    for tenant_id in machine.tenants:
        last = catalogue.newest(machine.control_plane, tenant_id)
        file = machine.settings.data_dir / "objects" / last.key
        assert contents_of(file) == [f"first of {tenant_id}"] and last.kind == "scheduled"


def test_a_database_nobody_wrote_to_is_not_even_opened(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of idle tenants cost a stat each; their backup is said to be true as of now."""
    before = unchanged(machine)
    objects, at = machine.count(), time.time()
    monkeypatch.setattr(backup, "take", lambda *_: pytest.fail("a snapshot was taken"))
    done = machine.back_up()
    assert skipped(done) == before and machine.count() == objects
    for result in done:
        row = machine.control_plane.row("backup_get", backup_id=result.backup_id)
        assert row is not None and row["sha256"] == result.sha256
        assert current_at(machine, result) >= at - 1


def current_at(machine: Machine, done: Done) -> float:
    with machine.control_plane.transaction() as connection:
        row = connection.execute("SELECT current_at FROM backups WHERE backup_id = %s", (done.backup_id,)).fetchone()
    assert row is not None
    return float(row["current_at"].timestamp())


@pytest.mark.parametrize("change", ["written", "checkpointed", "restored", "touched"])
def test_whatever_touches_the_files_makes_a_tenant_changed(
    machine: Machine, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stat errs to one side. What turns out equal is not uploaded again, and is known as unchanged afterwards."""
    tenant_id = machine.tenants[0]
    file = machine.paths(tenant_id).database.resolve()
    reader = connect(file, readonly=True)  # as a gateway does: writes stay in the -wal
    reader.execute("SELECT count(*) FROM memories").fetchone()
    machine.write(tenant_id)
    unchanged(machine)
    objects = machine.count()
    if change == "written":
        machine.write(tenant_id)
    elif change == "checkpointed":
        with closing(connect(file)) as writer:
            assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[1] == 0
    elif change == "restored":
        copy = machine.paths(tenant_id).restore_file
        with closing(connect(file, readonly=True)) as source:
            snapshot.copy(source, copy)
        generation.activate(machine.paths(tenant_id), generation.prepare(machine.paths(tenant_id), copy, previous=1))
    else:
        os.chmod(file, 0o640)  # moves ctime alone
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 60)
    assert fingerprint.look(machine.paths(tenant_id)).fingerprint is None, "what is young proves nothing"
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 0.0)
    done = {d.tenant_id: d for d in machine.back_up()}
    assert done[tenant_id].skipped == (change != "written")
    assert machine.count() == objects + (change == "written")
    reader.close()


def test_an_unchanged_tenant_is_stored_anew_once_its_key_was_rotated(machine: Machine) -> None:
    """Whoever rotates a key wants the newest backup under the new one tonight, not when the tenant writes next."""
    update = {"backup_encryption": "age", "backup_master_key": keys.new_master()[0]}
    url = machine.settings.control_plane_url.get_secret_value()
    settings = settings_in(machine.settings.data_dir, url, machine_id=machine.settings.machine_id, **update)
    sealed = Machine(settings, machine.control_plane, ObjectStore(settings), machine.tenants)
    unchanged(sealed)
    rotated = sealed.tenants[0]
    new = keys.rotate(sealed.control_plane, settings, rotated)
    assert made(sealed.back_up()) == {rotated}
    assert catalogue.newest(sealed.control_plane, rotated).key_id == new.key_id
    assert made(sealed.back_up()) == set()


def test_a_mark_from_before_a_reboot_proves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss can keep a commit and lose the mtime that told of it."""
    unchanged(machine)
    monkeypatch.setattr(boot, "boot_id", lambda: "another-boot")
    taken: list[str] = []
    take = backup.take
    monkeypatch.setattr(backup, "take", lambda s, t, d: (taken.append(t), take(s, t, d))[1])
    machine.back_up()
    assert sorted(taken) == sorted(machine.tenants)


@pytest.mark.parametrize("status", ["corrupt", "deleted"])
def test_an_unchanged_tenant_whose_backup_went_bad_is_backed_up(machine: Machine, status: str) -> None:
    """Skipping is only right while the backup it leans on is there."""
    unchanged(machine)
    victim = machine.tenants[0]
    last = catalogue.newest(machine.control_plane, victim)
    set_status(machine, last, status)
    assert made(machine.back_up()) == {victim}


def set_status(machine: Machine, last: catalogue.Backup, status: str) -> None:
    with machine.control_plane.transaction() as connection:
        connection.execute("UPDATE backups SET status = %s WHERE backup_id = %s", (status, last.backup_id))


def test_a_backup_that_goes_bad_while_the_run_looks_is_replaced_not_skipped(machine: Machine) -> None:
    """The statement that confirms asks again: between the list and the mark, a verify run may have found it corrupt."""
    unchanged(machine)
    run = machine.run()
    fleet_run.begin(machine.control_plane, run)
    chosen = fleet_run.choose(machine.control_plane, run)
    victim = machine.tenants[0]
    set_status(machine, catalogue.newest(machine.control_plane, victim), "corrupt")
    directory = machine.settings.data_dir / "tmp"
    directory.mkdir(exist_ok=True)
    work = fleet.Fleet(machine.settings, machine.control_plane, machine.objects, run)
    assert made(list(work.back_up(chosen, directory))) == {victim}
    assert catalogue.newest(machine.control_plane, victim).status == "available"


def test_an_old_backup_is_made_anew_although_nothing_changed(machine: Machine) -> None:
    """Bits rot: every few days a fresh object, whatever the stat says. So it is with `force`."""
    unchanged(machine)
    assert made(machine.back_up(backup_force_days=0)) == set(machine.tenants)
    assert made(machine.back_up(machine.run(force=True))) == set(machine.tenants)


def test_a_tenant_that_fails_costs_the_others_nothing(machine: Machine) -> None:
    """A corrupt database, one that is missing, and an error nobody thought of: each with its own cause."""
    corrupt, missing, odd, good = machine.tenants
    machine.paths(corrupt).database.resolve().write_bytes(b"x" * 8192)
    machine.paths(missing).current.unlink()
    machine.paths(odd).current.unlink()
    machine.paths(odd).current.symlink_to("generations/not-a-number")
    done = {d.tenant_id: d for d in machine.back_up()}
    assert made(list(done.values())) == {good}
    assert "not a database" in str(done[corrupt].error)
    assert "no active database" in str(done[missing].error)
    assert "ValueError" in str(done[odd].error)
    row = machine.control_plane.row("fleet_run_newest", machine_id=machine.settings.machine_id, shard=0, shards=1)
    assert row is not None and row["unfinished"]


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection costs a second, a refusal nothing."""
    tries: list[str] = []
    put_file = ObjectStore.put_file
    flaky, refused = machine.tenants[:2]

    def put(store: ObjectStore, key: str, path: Path, sha256: str, **more: object) -> int:
        tries.append(next(t for t in machine.tenants if t in key))
        if tries.count(flaky) < 3 and tries[-1] == flaky:
            raise ObjectStoreUnavailable("fault: away")
        if tries[-1] == refused:
            raise CorruptBackup("fault: not what was sent")
        return put_file(store, key, path, sha256, **more)

    monkeypatch.setattr(ObjectStore, "put_file", put)
    done = machine.back_up(retry_seconds=(0.01, 0.01, 0.01))
    assert {d.tenant_id for d in done if d.error} == {refused}
    assert (tries.count(flaky), tries.count(refused)) == (3, 1)


def test_a_store_that_is_away_ends_the_run_early_and_lists_everybody(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 tenants times a minute of retries is a night lost; none of them may look backed up."""
    monkeypatch.setattr(fleet, "_GIVE_UP_AFTER", 1)

    def away(*_: object, **__: object) -> int:
        raise ObjectStoreUnavailable("fault: away")

    monkeypatch.setattr(ObjectStore, "put_file", away)
    done = machine.back_up(backup_parallel=1)
    assert {d.tenant_id for d in done} == set(machine.tenants) and all("away" in str(d.error) for d in done)
    assert any("not tried" in str(d.error) for d in done)


def test_staging_never_exceeds_its_budget_and_serves_in_order(tmp_path: Path) -> None:
    """A large tenant waits for room, and small ones behind it do not starve it."""
    staging, order = Staging(tmp_path, 100), []
    with ThreadPoolExecutor(4) as threads, staging.hold(60):

        def ask(name: str, size: int) -> None:
            with staging.hold(size):
                order.append(name)

        large = threads.submit(ask, "large", 90)
        wait_until(lambda: len(staging._waiting) == 1)
        small = threads.submit(ask, "small", 10)
        wait_until(lambda: len(staging._waiting) == 2)
        assert order == [] and not large.done() and not small.done()
    assert order == ["large", "small"] and 90 <= staging.peak_bytes <= 100
    with pytest.raises(Permanent, match="ENGRAM_BACKUP_STAGING_BYTES"), staging.hold(101):
        pass
    with pytest.raises(NoSpace, match="are free"), Staging(tmp_path, 1 << 62).hold(1 << 61):
        pass
    with staging.hold(100):
        pass


def test_a_tenant_that_does_not_fit_is_refused_with_its_cause_and_the_rest_is_done(machine: Machine) -> None:
    """Bounded temporary disk, told by name of the setting."""
    large = machine.tenants[0]
    machine.write(large, "x" * 200_000)
    limit = fingerprint.look(machine.paths(large)).size_bytes - 1
    done = {d.tenant_id: d for d in machine.back_up(backup_staging_bytes=limit)}
    assert "ENGRAM_BACKUP_STAGING_BYTES" in str(done[large].error)
    assert made(list(done.values())) == set(machine.tenants) - {large}


def test_a_writer_during_the_run_makes_its_tenant_changed_next_time(machine: Machine) -> None:
    """The stat is taken before the snapshot, so what is written after it can never hide behind the mark."""
    tenant_id, stop = machine.tenants[0], threading.Event()

    def write() -> None:
        while not stop.wait(0.005):
            machine.write(tenant_id)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        machine.back_up()
    finally:
        stop.set()
        writer.join()
    machine.back_up()
    last = catalogue.newest(machine.control_plane, tenant_id)
    assert last.manifest["memories"] == len(contents_of(machine.paths(tenant_id).database))
