"""How long a `-wal` is, read from its bytes, against SQLite's own index of it; and the checkpoint that is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shared.engine.connection import connect
from shared.engine.database import TenantDatabase
from shared.engine.wal import Wal
from shared.engine.write_lock import WriteLock
from shared.errors import InMaintenance
from shared.tenant import TenantPaths
from tests.database_fixtures import frames, paths, read_all, write_one  # noqa: F401

NEVER_PAGES = 1_000_000


@pytest.fixture
def writer(paths: TenantPaths) -> Iterator[TenantDatabase]:  # noqa: F811
    with closing(TenantDatabase(paths, autocheckpoint_pages=NEVER_PAGES)) as opened, opened.read():
        yield opened


def test_it_holds_as_many_pages_as_sqlite_says(paths: TenantPaths, writer: TenantDatabase) -> None:  # noqa: F811
    """After every transaction, also when the file was begun anew and still has an older, longer one's frames in it."""
    with closing(Wal(paths.database.resolve())) as wal:
        assert not wal.holds(1)
        for n in range(12):
            write_one(writer, str(n))
            if n == 7:
                writer.checkpoint()
                write_one(writer, "in a file begun anew")
            (pages, _) = frames(paths)
            assert [wal.holds(count) for count in (pages - 1, pages, pages + 1)] == [True, True, False]
        assert Path(f"{paths.database.resolve()}-wal").stat().st_size > 32 + (pages + 1) * (24 + 4_096)


def test_pages_that_a_checkpoint_has_seen_count_no_more(
    paths: TenantPaths,  # noqa: F811
    writer: TenantDatabase,
) -> None:
    """Also while somebody who reads keeps the file from being begun anew: else each transaction would be followed by a
    checkpoint, for as long as that takes."""
    write_one(writer, "one")
    assert writer.checkpoint_due(1)
    with closing(connect(paths.database, readonly=True)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM memories").fetchone()
        write_one(writer, "two")
        seen, _ = frames(paths)
        writer.checkpoint()
        assert not writer.checkpoint_due(1)
        write_one(writer, "three")
        pages, copied = frames(paths)
        assert pages > seen > copied, "the reader keeps what came after it in the file"
        assert writer.checkpoint_due(pages - seen) and not writer.checkpoint_due(pages - seen + 1)
    writer.checkpoint()
    write_one(writer, "four")
    pages, _ = frames(paths)
    assert pages < seen and writer.checkpoint_due(pages) and not writer.checkpoint_due(pages + 1)


def test_a_checkpoint_copies_everything_before_another_may_write(
    paths: TenantPaths,  # noqa: F811
    writer: TenantDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has the turn of a writer: beside a commit SQLite up to 3.51.2 can lose rows."""
    write_one(writer, "one")
    seen: list[tuple[int, int]] = []
    release = WriteLock.release

    def noted(lock: WriteLock) -> None:
        seen.append(frames(paths))
        release(lock)

    monkeypatch.setattr(WriteLock, "release", noted)
    writer.checkpoint()
    [(pages, copied)] = seen
    assert pages == copied > 0
    assert read_all(writer) == ["one"]


def test_nothing_is_copied_while_the_tenant_is_under_maintenance(
    paths: TenantPaths,  # noqa: F811
    writer: TenantDatabase,
) -> None:
    """The file is about to be replaced; whoever does that reckons with no change to it."""
    write_one(writer, "one")
    paths.mark.touch()
    with pytest.raises(InMaintenance):
        writer.checkpoint()
    assert frames(paths)[1] == 0
    with closing(TenantDatabase(paths, readonly=True)) as reader, pytest.raises(ValueError):
        reader.checkpoint()
