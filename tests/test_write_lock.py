"""One writer at a time, its checkpoint included: the SQLite of Debian 12 can lose committed rows otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import generation
from shared.engine import database, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.engine.write_lock import WriteLock
from shared.errors import TenantDatabaseUnavailable
from shared.tenant import TenantPaths
from tests.database_fixtures import frames

HOLD = """
import sys, time
from pathlib import Path
from shared.engine.write_lock import WriteLock
lock = WriteLock(Path(sys.argv[1]))
lock.acquire(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def paths(tmp_path: Path) -> TenantPaths:
    paths = TenantPaths.of(tmp_path / "tenants", "acme")
    database.create(paths)
    return paths


@pytest.fixture
def handle(paths: TenantPaths) -> Iterator[TenantDatabase]:
    handle = TenantDatabase(paths, busy_timeout_seconds=0.05)
    yield handle
    handle.close()


def write(handle: TenantDatabase) -> None:
    with handle.write() as connection:
        memories.create(connection, NewMemory("a memory"))


def test_the_lock_is_given_back_after_the_commits_checkpoint(
    paths: TenantPaths, handle: TenantDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back between the two, this checkpoint could begin beside another one's end and a commit."""
    seen: list[tuple[int, int]] = []
    release = WriteLock.release

    def noted(lock: WriteLock) -> None:
        seen.append(frames(paths))
        release(lock)

    with handle.read() as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 1")
    monkeypatch.setattr(WriteLock, "release", noted)
    write(handle)
    (total, copied) = seen[0]
    assert total == copied > 0


def test_no_transaction_begins_while_another_process_has_the_lock(paths: TenantPaths, handle: TenantDatabase) -> None:
    """Also none whose BEGIN SQLite would allow: the other's checkpoint runs outside of its transaction."""
    other = WriteLock(paths.database.resolve().parent)
    other.acquire(0)
    with pytest.raises(TenantDatabaseUnavailable, match="another process writes"):
        write(handle)
    with handle.read() as connection:
        assert memories.count(connection) == 0
    other.release()
    write(handle)
    other.close()


def test_a_killed_writer_leaves_no_lock(paths: TenantPaths, handle: TenantDatabase) -> None:
    """The kernel gives it back; nobody has to find out that its owner is dead."""
    command = [sys.executable, "-c", HOLD, str(paths.database.resolve().parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TenantDatabaseUnavailable, match="another process writes"):
            write(handle)
        holder.send_signal(signal.SIGKILL)
    write(handle)


def test_a_failed_transaction_gives_the_lock_back(handle: TenantDatabase) -> None:
    """Whoever comes next, in any process, would wait for ever."""
    with pytest.raises(ZeroDivisionError), handle.write():
        raise ZeroDivisionError
    write(handle)


def test_a_new_generation_has_a_lock_of_its_own(paths: TenantPaths, handle: TenantDatabase) -> None:
    """A writer that still has the old one open holds nobody up, and is sent to the new one by the fence."""
    write(handle)
    stale = WriteLock(paths.database.resolve().parent)
    stale.acquire(0)
    copy = paths.root / "restore.sqlite"
    copy.write_bytes(paths.database.read_bytes())
    generation.activate(paths, generation.prepare(paths, copy, previous=1))
    write(handle)
    assert handle.generation == 2
    stale.close()
