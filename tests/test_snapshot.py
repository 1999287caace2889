"""Snapshots: consistent under a writer, checked before anybody trusts them, harmless to the source."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared import snapshot
from shared.engine import database, schema
from shared.errors import CorruptDatabase, NoSpace, SchemaTooNew, TenantDatabaseUnavailable, UnsafeTenantId
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.core_fixtures import add_memories, contents_of, settings_in, sha256_of, start_child, wait_until
from tests.database_fixtures import ENDLESS_WRITER
from tests.disk_fixtures import file_system


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = settings_in(tmp_path, "")
    database.create(TenantPaths.of(made.tenants_dir, "acme"))
    return made


@pytest.fixture
def paths(settings: Settings) -> TenantPaths:
    return TenantPaths.of(settings.tenants_dir, "acme")


def test_a_snapshot_under_a_writer_is_a_prefix_that_holds_every_row_acknowledged_before(
    settings: Settings, paths: TenantPaths, tmp_path: Path
) -> None:
    """A backup must hold all that was promised when it began, and no hole."""
    child = start_child(ENDLESS_WRITER, settings.tenants_dir)
    assert child.stdout is not None
    acknowledged: list[int] = []
    reader = threading.Thread(target=lambda: acknowledged.extend(int(line) for line in child.stdout or ()))
    try:
        assert child.stdout.readline().strip() == "0"
        reader.start()
        sizes = []
        for n in range(5):
            while len(acknowledged) < (n + 1) * 15:
                assert child.poll() is None
            before = len(acknowledged) + 1
            taken = snapshot.take(settings, "acme", tmp_path / f"{n}.sqlite")
            rows = [int(row) for row in contents_of(taken.path)]
            assert rows == list(range(len(rows)))
            assert len(rows) >= before
            assert taken.manifest.memories == len(rows)
            sizes.append(len(rows))
        assert sizes == sorted(sizes)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        reader.join()
    assert len(contents_of(paths.database)) >= len(acknowledged) + 1


NAMED_WRITER = """
    import sys
    from pathlib import Path
    from shared.engine import memories
    from shared.engine.database import TenantDatabase
    from shared.tenant import TenantPaths
    tenant, n = TenantDatabase(TenantPaths.of(Path(sys.argv[1]), "acme")), 0
    while not Path(sys.argv[3]).exists():
        with tenant.write() as connection:
            memories.create(connection, memories.NewMemory(f"{sys.argv[2]} {n} " + "x" * 2000))
        print(n, flush=True)
        n += 1
"""


def test_a_snapshot_holds_a_prefix_of_every_one_of_several_writers(
    settings: Settings, paths: TenantPaths, tmp_path: Path
) -> None:
    """Gateway workers, a tool and a restore's check write at once; none of them may lose a row in the middle."""
    names, stop = ("a", "b", "c"), tmp_path / "stop"
    children = {name: start_child(NAMED_WRITER, settings.tenants_dir, name, stop) for name in names}
    acknowledged: dict[str, int] = dict.fromkeys(names, 0)

    def read(name: str) -> None:
        for line in children[name].stdout or ():
            acknowledged[name] = int(line) + 1

    readers = [threading.Thread(target=read, args=(name,)) for name in names]
    try:
        for reader in readers:
            reader.start()
        last = dict.fromkeys(names, 0)
        for n in range(4):
            wait_until(lambda: all(acknowledged[name] >= last[name] + 5 for name in names))
            before = dict(acknowledged)
            taken = snapshot.take(settings, "acme", tmp_path / f"{n}.sqlite")
            rows = [row.split()[:2] for row in contents_of(taken.path)]
            for name in names:
                mine = [int(number) for writer, number in rows if writer == name]
                assert mine == list(range(len(mine)))
                assert len(mine) >= before[name]
                last[name] = len(mine)
    finally:
        stop.touch()
        for child in children.values():
            assert child.wait(30) == 0
        for reader in readers:
            reader.join()
    assert len(contents_of(paths.database)) == sum(acknowledged.values())


def test_writers_go_on_while_a_snapshot_is_copied(
    settings: Settings, paths: TenantPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write inside the copy's read transaction is committed before the copy ends, and is not in it."""
    add_memories(paths, "before")
    real = snapshot.copy

    def copied(source: sqlite3.Connection, destination: Path, *, durable: bool = True) -> None:
        add_memories(paths, "meanwhile")  # a writer that were kept waiting would time out here
        with closing(sqlite3.connect(paths.database.resolve())) as other:
            other.execute("PRAGMA wal_checkpoint(PASSIVE)")
        real(source, destination, durable=durable)

    monkeypatch.setattr(snapshot, "copy", copied)
    taken = snapshot.take(settings, "acme", tmp_path / "s.sqlite")
    assert contents_of(taken.path) == ["before"]
    assert contents_of(paths.database) == ["before", "meanwhile"]


IMPATIENT_WRITER = """
    import os, sys
    from pathlib import Path
    from shared.engine import memories
    from shared.engine.database import TenantDatabase
    from shared.errors import EngramError
    from shared.tenant import TenantPaths
    tenants, stop = map(Path, sys.argv[1:])
    tenant = TenantDatabase(TenantPaths.of(tenants, "acme"), busy_timeout_seconds=0, lock_wait_seconds=0)
    while not stop.exists():
        try:
            with tenant.write() as connection:
                memories.create(connection, memories.NewMemory("small"))
            print("written", flush=True)
        except EngramError as e:
            print(f"{type(e).__name__}: {e}", flush=True)
"""


def test_a_writer_that_waits_for_no_lock_is_never_refused_while_a_large_snapshot_is_made(
    settings: Settings, paths: TenantPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lock that keeps a writer out is held at any step, so none can be held for 50 ms: said without a clock, which
    a busy machine would make lie. The writer waits for neither SQLite's locks nor the fence, and must come through
    while the source is open, after it was copied and while the copy is checked.
    """
    for _ in range(20):
        add_memories(paths, *["x" * 1_000_000] * 2)
    stop, said = tmp_path / "stop", list[str]()
    child = start_child(IMPATIENT_WRITER, settings.tenants_dir, stop)
    reader = threading.Thread(target=lambda: said.extend(line.strip() for line in child.stdout or ()))
    copy, check, during = snapshot.copy, snapshot._check, dict[str, int]()

    def some_more(step: str) -> None:
        before = len(said)
        wait_until(lambda: len(said) >= before + 3)
        during[step] = len(said) - before

    def copied(source: sqlite3.Connection, destination: Path, *, durable: bool = True) -> None:
        some_more("open")
        copy(source, destination, durable=durable)
        some_more("copied")

    def checked(path: Path, tenant_id: str) -> tuple[snapshot.Manifest, str, int]:
        some_more("before the check")
        return check(path, tenant_id)

    monkeypatch.setattr(snapshot, "copy", copied)
    monkeypatch.setattr(snapshot, "_check", checked)
    reader.start()
    try:
        wait_until(lambda: len(said) > 3)
        taken = snapshot.take(settings, "acme", tmp_path / "s.sqlite")
    finally:
        stop.touch()
        assert child.wait(30) == 0
        reader.join()
    assert taken.size_bytes > 40_000_000 and min(during.values()) >= 3 and len(during) == 3
    assert set(said) == {"written"}


def test_a_large_database_is_hashed_beside_its_check(settings: Settings, paths: TenantPaths, tmp_path: Path) -> None:
    """The other path of the same claim: what is checked is what is hashed."""
    add_memories(paths, *(secrets.token_hex(50_000) for _ in range(120)))
    taken = snapshot.take(settings, "acme", tmp_path / "s.sqlite")
    assert taken.size_bytes == taken.path.stat().st_size > 8 << 20
    assert taken.sha256 == hashlib.sha256(taken.path.read_bytes()).hexdigest()
    page = bytearray(paths.database.resolve().read_bytes())
    page[len(page) // 2 : len(page) // 2 + 8192] = b"\xff" * 8192
    paths.database.resolve().write_bytes(page)
    with pytest.raises(CorruptDatabase):
        snapshot.take(settings, "acme", tmp_path / "t.sqlite")


def test_a_snapshot_for_which_there_is_no_room_is_no_space(
    settings: Settings, paths: TenantPaths, tmp_path: Path
) -> None:
    """The tenant's database is well; this machine is full."""
    add_memories(paths, "x" * 900_000)
    with file_system(tmp_path / "disk", "size=400k") as disk, pytest.raises(NoSpace):
        snapshot.take(settings, "acme", disk / "s.sqlite")


def test_a_snapshot_opens_with_plain_sqlite_and_says_what_it_holds(
    settings: Settings, paths: TenantPaths, tmp_path: Path
) -> None:
    """The object alone, without this product, is a usable backup."""
    before = datetime.now(UTC)
    add_memories(paths, "one", "two")
    taken = snapshot.take(settings, "acme", tmp_path / "s.sqlite")
    assert not (tmp_path / "s.sqlite-wal").exists()
    assert (taken.sha256, taken.size_bytes) == (sha256_of(taken.path), taken.path.stat().st_size)
    assert taken.tenant_id == "acme"
    assert before < taken.ts < datetime.now(UTC)
    assert (taken.manifest.memories, taken.manifest.tags, taken.manifest.versions) == (2, 2, 0)
    with closing(sqlite3.connect(taken.path)) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        newest = plain.execute("SELECT id, created_at FROM memories ORDER BY seq DESC").fetchone()
        assert newest == (taken.manifest.sentinel_id, taken.manifest.sentinel_at)


def test_an_empty_database_has_a_snapshot_without_sentinel(settings: Settings, tmp_path: Path) -> None:
    """A tenant of a minute ago is backed up too."""
    manifest = snapshot.take(settings, "acme", tmp_path / "s.sqlite").manifest
    assert (manifest.memories, manifest.sentinel_id, manifest.sentinel_at) == (0, None, None)


def test_taking_a_snapshot_leaves_the_source_as_it_was(settings: Settings, paths: TenantPaths, tmp_path: Path) -> None:
    """A backup that writes to what it backs up is a second fault."""
    with closing(database.TenantDatabase(paths)) as tenant:
        with tenant.write() as connection:
            connection.execute("INSERT INTO meta VALUES ('k', 'v')")  # stays in the -wal: this connection is open
        file = paths.database.resolve()

        def state() -> list[tuple[int, int, int]]:
            return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in (os.stat(file), os.stat(f"{file}-wal"))]

        before = state()
        snapshot.take(settings, "acme", tmp_path / "s.sqlite")
        assert state() == before
        with tenant.write() as connection:
            connection.execute("INSERT INTO meta VALUES ('k2', 'v')")
    with closing(sqlite3.connect(tmp_path / "s.sqlite")) as copy:
        assert copy.execute("SELECT value FROM meta WHERE key = 'k'").fetchone() == ("v",)


def test_a_restore_is_not_kept_waiting_by_a_snapshot(
    settings: Settings, paths: TenantPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fence is held to open the source, not to copy a gigabyte."""
    real, seen = snapshot.copy, []

    def copied(source: sqlite3.Connection, destination: Path, *, durable: bool = True) -> None:
        fd = os.open(paths.lock, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        seen.append(destination)
        real(source, destination, durable=durable)

    monkeypatch.setattr(snapshot, "copy", copied)
    snapshot.take(settings, "acme", tmp_path / "s.sqlite")
    assert seen


def break_page(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5 * 4096 : 7 * 4096] = b"\xff" * 8192
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        break_page,
        lambda file: file.write_bytes(file.read_bytes()[:20_000]),
        lambda file: file.write_bytes(b"x" * 20_000),
        lambda file: file.write_bytes(b""),
    ],
    ids=["overwritten page", "cut", "not sqlite", "empty"],
)
def test_a_corrupt_source_never_becomes_a_backup(
    settings: Settings, paths: TenantPaths, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """It would replace the last good one as the newest."""
    add_memories(paths, *(f"{n} " + "x" * 300 for n in range(200)))
    damage(paths.database.resolve())
    with pytest.raises(CorruptDatabase):
        snapshot.take(settings, "acme", tmp_path / "s.sqlite")


def test_another_tenants_file_in_the_directory_is_not_backed_up(
    settings: Settings, paths: TenantPaths, tmp_path: Path
) -> None:
    """Restoring it later would hand one tenant another's memories."""
    with closing(sqlite3.connect(paths.database.resolve())) as connection, connection:
        connection.execute("UPDATE meta SET value = 'globex' WHERE key = 'tenant_id'")
    with pytest.raises(CorruptDatabase, match="globex"):
        snapshot.take(settings, "acme", tmp_path / "s.sqlite")


def test_a_newer_schema_is_named_as_such(settings: Settings, paths: TenantPaths, tmp_path: Path) -> None:
    """Too new is a deploy problem, not damage."""
    with closing(sqlite3.connect(paths.database.resolve())) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    with pytest.raises(SchemaTooNew):
        snapshot.take(settings, "acme", tmp_path / "s.sqlite")


@pytest.mark.parametrize("missing", ["lock", "current", "generations/000001/engram.db"])
def test_a_tenant_without_a_part_of_its_database_is_unavailable(
    settings: Settings, paths: TenantPaths, tmp_path: Path, missing: str
) -> None:
    """One broken tenant must not end a backup of all with an unknown error."""
    (paths.root / missing).unlink()
    with pytest.raises(TenantDatabaseUnavailable):
        snapshot.take(settings, "acme", tmp_path / "s.sqlite")


def test_an_unsafe_id_reaches_no_file(settings: Settings, tmp_path: Path) -> None:
    """The check is in the way of every path."""
    with pytest.raises(UnsafeTenantId):
        snapshot.take(settings, "../acme", tmp_path / "s.sqlite")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DROP TABLE versions", "missing"),
        ("INSERT INTO tags VALUES ('x', 99)", "foreign_key_check"),
        ("PRAGMA application_id = 1", "not an Engram"),
        ("DELETE FROM meta", "not an Engram"),
    ],
)
def test_inspect_finds_what_integrity_check_does_not(
    settings: Settings, paths: TenantPaths, tmp_path: Path, statement: str, says: str
) -> None:
    """A sound SQLite file is not yet a tenant's database."""
    taken = snapshot.take(settings, "acme", tmp_path / "s.sqlite")
    with closing(sqlite3.connect(taken.path, isolation_level=None)) as connection:
        connection.execute(statement)
    before = sha256_of(taken.path)
    with pytest.raises(CorruptDatabase, match=says):
        snapshot.inspect(taken.path, "acme")
    assert sha256_of(taken.path) == before
