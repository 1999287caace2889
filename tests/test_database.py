"""One connection under the fence: opening, marks, locks, generations."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from shared import generation
from shared.engine import database, memories, schema
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import CorruptDatabase, InMaintenance, SchemaTooNew, TenantDatabaseUnavailable
from shared.tenant import TenantPaths
from tests.core_fixtures import add_memories, contents_of, start_child
from tests.database_fixtures import ENDLESS_WRITER, opened, read_all, write_one

pytest_plugins = ("tests.database_fixtures",)


def files_below(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*")}


def test_a_write_is_seen_by_the_next_reader_and_a_raising_one_by_nobody(paths: TenantPaths) -> None:
    """COMMIT on leaving, ROLLBACK on an exception."""
    with opened(paths) as one, opened(paths) as other:
        write_one(one, "kept")
        with pytest.raises(KeyError), one.write() as connection:
            memories.create(connection, NewMemory("dropped"))
            raise KeyError
        assert read_all(other) == read_all(one) == ["kept"]


def test_a_tenant_without_database_is_unavailable_and_stays_without(tmp_path: Path) -> None:
    """SQLite's default open would make an empty database, and the client would see no memories."""
    paths = TenantPaths.of(tmp_path, "acme")
    with pytest.raises(TenantDatabaseUnavailable):
        TenantDatabase(paths)
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("missing", ["current", "generations/000001/engram.db"])
def test_a_missing_file_is_unavailable_and_never_created(paths: TenantPaths, missing: str) -> None:
    """The same, when only a part is gone."""
    (paths.root / missing).unlink()
    before = files_below(paths.root)
    with opened(paths) as tenant:
        for use in (read_all, lambda t: write_one(t, "x")):
            with pytest.raises(TenantDatabaseUnavailable):
                use(tenant)
    assert files_below(paths.root) == before


def damage(name: str, file: Path) -> None:
    data = file.read_bytes()
    match name:
        case "empty":
            file.write_bytes(b"")
        case "not sqlite":
            file.write_bytes(b"not a database at all" * 500)
        case "zeroed page":
            file.write_bytes(data[:4096] + bytes(len(data) - 4096))
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "another tenant":
            with closing(sqlite3.connect(file)) as connection, connection:
                connection.execute("UPDATE meta SET value = 'globex' WHERE key = 'tenant_id'")
        case "newer":
            with closing(sqlite3.connect(file)) as connection:
                connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")


@pytest.mark.parametrize("name", ["empty", "not sqlite", "zeroed page", "cut", "another tenant", "newer"])
def test_a_bad_file_is_named_as_ours_and_not_repaired_in_silence(paths: TenantPaths, name: str) -> None:
    """Every broken database must reach the gateway as 503 or an alarm, never as an empty answer."""
    add_memories(paths, *(f"row {n} " + "x" * 500 for n in range(50)))
    file = paths.generation_dir(1) / "engram.db"
    damage(name, file)
    kept = file.read_bytes()
    with opened(paths) as tenant, pytest.raises((CorruptDatabase, TenantDatabaseUnavailable, SchemaTooNew)):
        read_all(tenant)
        write_one(tenant, "x")
    assert file.read_bytes() == kept


def test_a_mark_stops_writes_and_lets_reads_through(paths: TenantPaths) -> None:
    """Under a restore's mark clients still read."""
    with opened(paths) as tenant:
        write_one(tenant, "one")
        paths.mark.write_text("{}")
        with pytest.raises(InMaintenance):
            write_one(tenant, "two")
        assert read_all(tenant) == ["one"]
        paths.mark.unlink()
        write_one(tenant, "three")
        assert read_all(tenant) == ["three", "one"]


def test_an_exclusive_lock_keeps_everybody_out_until_it_is_gone(paths: TenantPaths) -> None:
    """While a swap is under way nobody may be inside."""
    with opened(paths) as tenant:
        fd = os.open(paths.lock, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        for use in (read_all, lambda t: write_one(t, "x")):
            with pytest.raises(InMaintenance):
                use(tenant)
        os.close(fd)
        write_one(tenant, "after")
        assert read_all(tenant) == ["after"]


def test_a_use_that_fails_gives_its_lock_back(paths: TenantPaths) -> None:
    """A lock leaked by one bad request would keep every later restore out."""
    fd = os.open(paths.lock, os.O_RDWR)
    with opened(paths) as tenant:
        write_one(tenant, "one")
        for break_it, mend in (
            (lambda: paths.mark.write_text("{}"), paths.mark.unlink),
            (paths.current.unlink, lambda: paths.current.symlink_to("generations/000001")),
        ):
            break_it()
            with pytest.raises((InMaintenance, TenantDatabaseUnavailable)):
                write_one(tenant, "x")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
            mend()
        assert read_all(tenant) == ["one"]
    os.close(fd)


def test_a_connection_follows_the_generation(paths: TenantPaths, tmp_path: Path) -> None:
    """After a restore an idle connection must not go on with the old file."""
    with opened(paths) as tenant:
        write_one(tenant, "old")
        other = TenantPaths.of(tmp_path / "elsewhere", "acme")
        database.create(other)
        add_memories(other, "new")
        generation.activate(paths, generation.prepare(paths, other.generation_dir(1) / "engram.db", previous=1))
        assert read_all(tenant) == ["new"]
        assert tenant.generation == 2
        write_one(tenant, "newer")
        assert contents_of(paths.database) == ["new", "newer"]
        assert contents_of(paths.backup) == ["old"]


def test_a_generation_number_is_never_given_twice(paths: TenantPaths, tmp_path: Path) -> None:
    """A process with the abandoned generation open would take the new one of that number for its own."""
    numbers = []
    for n in range(3):
        file = tmp_path / f"{n}.sqlite"
        file.write_bytes(b"x")
        numbers.append(generation.prepare(paths, file, previous=1))
        generation.collect(paths)
    assert numbers == [2, 3, 4]
    assert [p for p in paths.generations.rglob("engram.db") if p.parent.name != "000001"] == []


def test_collecting_without_an_active_generation_removes_nothing(paths: TenantPaths) -> None:
    """A lost link must not cost the databases it pointed to."""
    paths.current.unlink()
    before = files_below(paths.root)
    assert generation.collect(paths) == []
    assert files_below(paths.root) == before


def test_two_threads_creating_the_same_row_do_not_lose_one(paths: TenantPaths) -> None:
    """Each has its own connection and lock; BEGIN IMMEDIATE makes them queue."""

    def work(name: str) -> None:
        with closing(TenantDatabase(paths)) as tenant:
            for n in range(20):
                write_one(tenant, f"{name}{n}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(contents_of(paths.database)) == sorted(f"{name}{n}" for name in "ab" for n in range(20))


def test_acknowledged_writes_of_a_killed_process_are_there(paths: TenantPaths) -> None:
    """What write() returned for is durable, whatever happens to the process next."""
    child = start_child(ENDLESS_WRITER, paths.root.parent)
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(30)]
    child.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in child.stdout.read().split()]
    child.wait()
    rows = [int(row) for row in contents_of(paths.database)]
    assert rows == list(range(len(rows)))
    assert len(rows) >= len(acknowledged)


def test_a_readonly_connection_migrates_and_cannot_write(paths: TenantPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands for the one that writes in everything but writing, and leaves what it finds beside the file."""
    with opened(paths) as writer:
        write_one(writer, "one")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE added (x TEXT) STRICT;"))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    with closing(TenantDatabase(paths, readonly=True)) as tenant:
        assert read_all(tenant) == ["one"]
        with tenant.read() as connection:
            assert connection.execute("SELECT count(*) FROM added").fetchone() == (0,)
        with pytest.raises(ValueError), tenant.write():
            pass
        with pytest.raises(TenantDatabaseUnavailable, match="readonly"), tenant.read() as connection:
            connection.execute("DELETE FROM memories")
    assert (paths.generation_dir(1) / "engram.db-wal").exists()


def test_while_a_file_is_held_open_closing_a_writer_does_not_checkpoint(paths: TenantPaths) -> None:
    """The eviction of a tenant counts on it; and what was held is checked before it is first used."""
    wal = paths.generation_dir(1) / "engram.db-wal"
    with closing(TenantDatabase(paths, readonly=True)) as held:
        held.hold()
        with opened(paths) as writer:
            write_one(writer, "one")
            assert writer.wal_bytes() == wal.stat().st_size > 0
        assert wal.stat().st_size > 0
        with pytest.raises(InMaintenance):
            held.look_up(memories.count)  # it would have to open it
        assert read_all(held) == ["one"]
        assert held.look_up(memories.count) == 1
    with opened(paths) as writer:
        assert read_all(writer) == ["one"]
    assert not wal.exists()
