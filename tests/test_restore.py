"""Restores on a real PostgreSQL: what they do, what they refuse, what they never touch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from shared import generation, lease, registry, repair, restore
from shared.engine.database import TenantDatabase
from shared.errors import (
    CorruptDatabase,
    DrainTimeout,
    InMaintenance,
    LeaseHeld,
    LeaseLost,
)
from tests.core_fixtures import LIVE, OLD, World, contents_of, start_child
from tests.restore_fixtures import (
    begun,
    check_unlocked,
    check_whole,
    expire_lease,
    perform,
    previous,
    run,
    state_of,
    swapped,
)

pytest_plugins = ("tests.core_fixtures",)


def test_a_restore_makes_the_backups_rows_live_and_keeps_the_old_ones(backed: World) -> None:
    """The main job: the rows of the backup, the previous database under `.bak`, everything unlocked, written down."""
    chosen = begun(backed)
    assert (chosen.live_memories, chosen.writes_lost, chosen.live_error) == (3, 1, None)
    released = run(backed, chosen)
    assert (backed.rows(), previous(backed)) == (OLD, LIVE)
    assert (released.outcome, released.generation, released.previous) == ("restored", 2, backed.paths.backup)
    assert released.locked_ms > 0
    assert state_of(backed, chosen) == "restored"
    assert registry.get(backed.control_plane, backed.tenant_id).generation == 2
    check_unlocked(backed)
    check_whole(backed)
    backed.write("after")
    assert backed.rows() == [*OLD, "after"]


def test_a_connection_open_before_a_restore_reads_and_writes_the_new_database_after_it(backed: World) -> None:
    """A row written into the old file after an acknowledgement would be lost."""
    with closing(TenantDatabase(backed.paths)) as idle:
        with idle.read() as connection:
            assert connection.execute("SELECT count(*) FROM memories").fetchone() == (3,)
        perform(backed)
        with idle.read() as connection:
            assert connection.execute("SELECT count(*) FROM memories").fetchone() == (2,)
        with idle.write() as connection:
            connection.execute("UPDATE memories SET content = 'changed' WHERE content = 'old 1'")
    assert (backed.rows(), previous(backed)) == (["changed", "old 2"], LIVE)


def test_restores_one_after_the_other_keep_only_the_last_two_generations(backed: World) -> None:
    """Disk is bounded: the active one and the one before."""
    for n in range(2, 5):
        backed.write(f"before restore {n}")
        before = backed.rows()
        assert perform(backed).generation == n
        assert (backed.rows(), previous(backed)) == (OLD, before)
        check_unlocked(backed)


def test_a_corrupt_live_database_is_replaced(backed: World) -> None:
    """The very reason to restore."""
    broken = b"broken" * 4000
    backed.paths.database.resolve().write_bytes(broken)
    chosen = begun(backed)
    assert chosen.live_error is not None
    run(backed, chosen)
    assert backed.rows() == OLD
    assert backed.paths.backup.read_bytes() == broken
    check_unlocked(backed)
    check_whole(backed)


@pytest.mark.parametrize("missing", ["the directory", "the link", "the file", "the lock"])
def test_a_tenant_whose_files_are_gone_is_restored(backed: World, missing: str) -> None:
    """A new machine has nothing but the object store."""
    paths = backed.paths
    match missing:
        case "the directory":
            shutil.rmtree(paths.root)
        case "the link":
            paths.current.unlink()
        case "the file":
            paths.database.resolve().unlink()
        case "the lock":
            paths.lock.unlink()
    perform(backed)
    assert backed.rows() == OLD
    assert previous(backed) == (LIVE if missing == "the lock" else None)
    assert not paths.mark.exists()
    check_whole(backed)
    backed.write("after")
    perform(backed)
    assert (backed.rows(), previous(backed)) == (OLD, [*OLD, "after"])


@pytest.fixture
def inside(backed: World) -> Iterator[subprocess.Popen[str]]:
    """Another process, stopped inside a transaction with an uncommitted row."""
    child = start_child(
        """
        import sys, time
        from pathlib import Path
        from shared.engine import memories
        from shared.engine.database import TenantDatabase
        from shared.tenant import TenantPaths
        tenant = TenantDatabase(TenantPaths.of(Path(sys.argv[1]), sys.argv[2]))
        with tenant.write() as connection:
            memories.create(connection, memories.NewMemory("from inside"))
            print("inside", flush=True)
            sys.stdin.readline()
        print("acknowledged", flush=True)
        """,
        backed.settings.tenants_dir,
        backed.tenant_id,
        stdin=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "inside\n"
    child.send_signal(signal.SIGSTOP)
    yield child
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_process_stopped_inside_a_transaction_keeps_the_restore_out(
    backed: World, inside: subprocess.Popen[str]
) -> None:
    """Its row, once acknowledged, must be in the live database: so the restore gives up and changes nothing."""
    chosen = begun(backed.change(restore_drain_timeout_seconds=0.3))
    before = os.readlink(backed.paths.current)
    with pytest.raises(DrainTimeout):
        run(backed, chosen)
    assert (os.readlink(backed.paths.current), state_of(backed, chosen)) == (before, "failed")
    assert not backed.paths.mark.exists()
    assert backed.lease_holder() is None
    assert [p.parent.name for p in backed.paths.generations.glob("*/engram.db")] == ["000001"]
    inside.send_signal(signal.SIGCONT)
    assert "acknowledged" in inside.communicate("go\n", timeout=20)[0]
    assert backed.rows() == [*LIVE, "from inside"]
    perform(backed)
    assert (backed.rows(), previous(backed)) == (OLD, [*LIVE, "from inside"])


def test_a_dead_runs_mark_stands_until_somebody_could_settle_it(
    backed: World, inside: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair that cannot drain must not open an unsettled tenant to writes."""
    monkeypatch.setattr(repair, "_DRAIN_TIMEOUT_SECONDS", 0.1)
    mark = restore.Mark(backed.tenant_id, "dead", 1, 1, 2, 0.0)
    backed.paths.mark.write_bytes(msgspec.json.encode(mark))
    with pytest.raises(DrainTimeout), restore.holding(backed.settings, backed.control_plane, backed.tenant_id):
        raise AssertionError
    with pytest.raises(InMaintenance):
        backed.write("x")
    inside.send_signal(signal.SIGKILL)
    inside.wait()
    with restore.holding(backed.settings, backed.control_plane, backed.tenant_id):
        pass
    check_unlocked(backed)
    assert backed.rows() == LIVE


def test_what_a_dead_run_prepared_is_not_kept_for_one_that_was_active(backed: World) -> None:
    """Nobody ever was in it: it takes the space of a database, and the place of one that an operator may want back."""
    perform(backed)
    copy = backed.paths.root / "restore.sqlite"
    copy.write_bytes(backed.paths.database.read_bytes())
    assert generation.prepare(backed.paths, copy, previous=backed.paths.generation()) == 3
    perform(backed)
    assert backed.paths.generation() == 4
    check_unlocked(backed)


def test_a_second_restore_at_once_is_refused_and_harmless(backed: World) -> None:
    """On this machine by the mutex, from another one by the lease."""
    with swapped(backed) as (chosen, first):
        with pytest.raises(LeaseHeld):
            perform(backed)
        restore.release(chosen, first.lease, restore.verify(first))
    assert backed.rows() == OLD
    lease.acquire(backed.control_plane, backed.tenant_id, holder="another machine", reason="x", seconds=30)
    backed.write("kept")
    with pytest.raises(LeaseHeld, match="another machine"):
        perform(backed)
    assert backed.rows() == [*OLD, "kept"]
    assert backed.lease_holder() == "another machine"
    expire_lease(backed)
    perform(backed)
    check_unlocked(backed)


def test_a_lease_lost_before_the_swap_leaves_the_old_database(backed: World) -> None:
    """A run that slept too long must notice before it moves anything, and must not free its successor's lease."""
    chosen = begun(backed)
    with pytest.raises(LeaseLost), restore.holding(backed.settings, backed.control_plane, backed.tenant_id) as hold:
        staged = restore.download(backed.objects, hold, chosen)
        taken = restore.lock(staged, holder="slow", reason="test")
        expire_lease(backed)
        lease.acquire(backed.control_plane, backed.tenant_id, holder="successor", reason="x", seconds=30)
        restore.swap(staged, taken)
    assert backed.rows() == LIVE
    assert not backed.paths.mark.exists()
    assert backed.lease_holder() == "successor"


def test_a_database_that_does_not_verify_is_put_back(backed: World) -> None:
    """The disk ate it between the check and the swap: the old one comes back, nothing is lost."""
    with swapped(backed) as (chosen, done):
        backed.paths.database.resolve().write_bytes(b"eaten" * 1000)
        with pytest.raises(CorruptDatabase):
            restore.verify(done)
        released = restore.release(chosen, done.lease, restore.verify(restore.put_back(done)))
    assert (released.outcome, released.generation, state_of(backed, chosen)) == ("put_back", 1, "put_back")
    assert (backed.rows(), previous(backed)) == (LIVE, None)
    check_unlocked(backed)
    assert perform(backed).generation == 3


def test_leaving_the_block_by_an_exception_puts_a_bad_database_back(backed: World) -> None:
    """Nobody has to remember to call `put_back`."""
    with pytest.raises(KeyboardInterrupt), swapped(backed):
        backed.paths.database.resolve().write_bytes(b"eaten" * 1000)
        raise KeyboardInterrupt
    assert backed.rows() == LIVE
    check_unlocked(backed)


def test_when_neither_database_verifies_the_tenant_stays_locked(backed: World) -> None:
    """Writes into a broken database make it worse; an operator decides."""
    with pytest.raises(CorruptDatabase), swapped(backed) as (_, done):
        for number in (done.from_generation, done.to_generation):
            (backed.paths.generation_dir(number) / "engram.db").write_bytes(b"eaten" * 1000)
        raise KeyboardInterrupt
    assert backed.paths.mark.exists()
    with pytest.raises((InMaintenance, CorruptDatabase)):
        backed.write("x")
    assert len(list(backed.paths.generations.glob("*/engram.db"))) == 2


def test_writes_acknowledged_during_a_restore_are_in_the_old_or_in_the_new_database(backed: World) -> None:
    """A client that was told 201 finds its memory in one of the two, never in neither or both."""
    child = start_child(
        """
        import sys
        from pathlib import Path
        from shared.engine import memories
        from shared.engine.database import TenantDatabase
        from shared.errors import InMaintenance
        from shared.tenant import TenantPaths
        tenant, n = TenantDatabase(TenantPaths.of(Path(sys.argv[1]), sys.argv[2])), 0
        while True:
            try:
                with tenant.write() as connection:
                    memories.create(connection, memories.NewMemory(f"w{n}"))
            except InMaintenance:
                continue
            print(f"w{n}", flush=True)
            n += 1
        """,
        backed.settings.tenants_dir,
        backed.tenant_id,
    )
    assert child.stdout is not None
    seen = [child.stdout.readline().strip() for _ in range(5)]
    perform(backed)
    while not contents_of(backed.paths.database)[len(OLD) :]:  # before it was seen to go on, it may be far ahead of us
        seen += [child.stdout.readline().strip() for _ in range(40)]
    child.send_signal(signal.SIGKILL)
    seen += child.stdout.read().split()
    child.wait()
    old, new = previous(backed), contents_of(backed.paths.database)
    assert old is not None
    assert old[: len(LIVE)] == LIVE
    assert new[: len(OLD)] == OLD
    written = old[len(LIVE) :] + new[len(OLD) :]
    assert written == [f"w{n}" for n in range(len(written))]
    assert seen == written[: len(seen)]
    assert new[len(OLD) :]
