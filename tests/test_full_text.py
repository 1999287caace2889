"""The full-text index is merged a little at a time, and stays the same index."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from shared.engine import database, full_text, memories
from shared.engine.database import TenantDatabase
from shared.engine.full_text import Merging
from shared.engine.memories import Changes, NewMemory
from shared.tenant import TenantPaths
from tests.database_fixtures import frames, opened, paths, write_one  # noqa: F401

SEGMENTS_OF_A_LEVEL = 16  # FTS5's crisismerge
FEW = [f"word{n:03}" for n in range(400)]
MANY = [f"word{n:05}" for n in range(20_000)]
Step = Callable[[Merging, sqlite3.Connection], None]


def text(chance: random.Random, words: list[str] = FEW, count: int = 40) -> str:
    return " ".join(chance.choices(words, k=count))


def unsynced(tenant: TenantDatabase) -> None:
    with tenant.read() as connection:
        connection.execute("PRAGMA synchronous = OFF")  # thousands of transactions, none of which has to last


def segments(connection: sqlite3.Connection) -> int:
    (found,) = connection.execute("SELECT count(DISTINCT segid) FROM memories_fts_idx").fetchone()
    return int(found)


def never(_: Merging, connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('automerge', 0)")


def pages_of_each_transaction(root: Path, together: int, words: int, transactions: int) -> list[int]:
    """In a new database; and what is in its index afterwards is right."""
    chance, pages = random.Random(1), []
    paths = TenantPaths.of(root, "acme")  # noqa: F811
    database.create(paths)
    with closing(TenantDatabase(paths, autocheckpoint_pages=1_000_000)) as tenant:
        unsynced(tenant)
        for _ in range(transactions):
            tenant.checkpoint()  # the next transaction begins the `-wal` anew
            texts = [text(chance, MANY, words) for _ in range(together)]
            with tenant.write() as connection:
                for each in texts:  # not by one statement, which would make one segment of them
                    memories.create(connection, NewMemory(each))
            pages.append(frames(paths)[0])
        with tenant.write() as connection:
            full_text.check(connection)
            assert segments(connection) <= 2 * SEGMENTS_OF_A_LEVEL
    return pages


@pytest.mark.parametrize(("together", "words", "transactions"), [(32, 60, 400), (1, 3_000, 300)])
def test_no_transaction_merges_for_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, words: int, transactions: int
) -> None:
    """By FTS5's own settings, and without any merging but its last resort, some transaction writes hundreds of pages,
    and whoever is in it or behind it waits. Many memories together and long ones alike."""
    how: dict[str, Step] = {"ours": Merging.step, "SQLite's": lambda *_: None, "none": never}
    pages: dict[str, list[int]] = {}
    for name, step in how.items():
        monkeypatch.setattr(Merging, "step", step)
        pages[name] = pages_of_each_transaction(tmp_path / name[:4], together, words, transactions)
    assert max(pages["ours"]) <= 200
    assert max(pages["SQLite's"]) > 300 and max(pages["none"]) > 300
    assert sum(pages["ours"]) < 2 * sum(pages["SQLite's"]), "not by doing far more"


def test_what_is_found_is_what_is_there(paths: TenantPaths) -> None:  # noqa: F811
    """Whatever is created, changed, deleted and rolled back meanwhile."""
    chance, kept = random.Random(2), {}
    with opened(paths) as tenant:
        unsynced(tenant)
        for n in range(1_500):
            with tenant.write() as connection:
                if kept and n % 5 == 0:
                    changed = chance.choice(list(kept))
                    kept[changed] = text(chance)
                    memories.update(connection, changed, Changes(content=kept[changed]))
                elif kept and n % 7 == 0:
                    deleted = chance.choice(list(kept))
                    memories.delete(connection, deleted)
                    del kept[deleted]
                else:
                    made = memories.create(connection, NewMemory(text(chance)))
                    kept[made.id] = made.content
            if n % 50 == 0:
                with pytest.raises(ZeroDivisionError), tenant.write() as connection:
                    memories.create(connection, NewMemory(text(chance, MANY, 3_000)))
                    Merging().step(connection)
                    raise ZeroDivisionError
        with tenant.write() as connection:
            full_text.check(connection)
        with tenant.read() as connection:
            for word in chance.sample(FEW, 40):
                found = connection.execute(
                    "SELECT id FROM memories_fts JOIN memories ON seq = memories_fts.rowid WHERE memories_fts MATCH ?",
                    (word,),
                )
                assert {row[0] for row in found} == {id_ for id_, content in kept.items() if word in content.split()}


def test_a_transaction_that_wrote_nothing_writes_nothing(paths: TenantPaths) -> None:  # noqa: F811
    """However much there is to merge: some only look whether they could write."""
    with opened(paths) as tenant:
        unsynced(tenant)
        for n in range(100):
            write_one(tenant, f"{n}")
            before = frames(paths)
            with tenant.write():
                pass
            assert frames(paths) == before


def test_an_index_is_merged_by_connections_that_write_once(paths: TenantPaths) -> None:  # noqa: F811
    """A machine with more tenants than places opens a database for a transaction and closes it: each of those counting
    from nothing would never come to its turn."""
    chance = random.Random(3)
    with opened(paths) as other, other.read():  # so that closing does not checkpoint
        for _ in range(150):
            with closing(TenantDatabase(paths)) as tenant:
                unsynced(tenant)
                write_one(tenant, text(chance))
        with other.write() as connection:
            assert automerge(connection) == 0
            full_text.check(connection)
            assert segments(connection) < 2 * SEGMENTS_OF_A_LEVEL


def automerge(connection: sqlite3.Connection) -> int | None:
    """As it is set in the file; None: as SQLite has it."""
    row = connection.execute("SELECT v FROM memories_fts_config WHERE k = 'automerge'").fetchone()
    return row and int(row[0])


def test_a_file_that_only_others_write_has_a_bound_too(paths: TenantPaths, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """An older build that finds the setting turned off goes on without these merges."""
    chance = random.Random(4)
    with opened(paths) as tenant:
        unsynced(tenant)
        for _ in range(50):
            write_one(tenant, text(chance))
        monkeypatch.setattr(Merging, "step", lambda *_: None)
        for _ in range(1_500):
            write_one(tenant, text(chance))
        with tenant.write() as connection:
            full_text.check(connection)
            assert automerge(connection) == 0
            assert segments(connection) <= 3 * SEGMENTS_OF_A_LEVEL, "of 1,550 transactions"


def used_pages(connection: sqlite3.Connection) -> int:
    pages, free = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    return int(pages) - int(free)


def levels(connection: sqlite3.Connection) -> list[full_text.Level]:
    (structure,) = connection.execute("SELECT block FROM memories_fts_data WHERE id = 10").fetchone()
    return full_text.levels(structure)


def test_what_is_deleted_leaves_the_index_too(paths: TenantPaths) -> None:  # noqa: F811
    """A tenant that deletes to get below a quota gets there: the index, most of what short memories take, follows."""
    chance = random.Random(5)
    with opened(paths) as tenant:
        unsynced(tenant)
        with tenant.read() as connection:
            empty = used_pages(connection)
        made = []
        for _ in range(800):
            with tenant.write() as connection:
                made.append(memories.create(connection, NewMemory(text(chance, MANY))).id)
        with tenant.read() as connection:
            full = used_pages(connection)
        chance.shuffle(made)
        kept = []
        for n, memory_id in enumerate(made, 1):
            with tenant.write() as connection:
                memories.delete(connection, memory_id)
            if n % 200 == 0:
                with tenant.write() as connection:
                    full_text.check(connection)
                    assert segments(connection) == sum(len(level.pages) for level in levels(connection))
                with tenant.read() as connection:
                    kept.append((used_pages(connection) - empty) / (full - empty))
        assert kept[1] < 0.95 and kept[2] < 0.65 and kept[3] < 0.1, kept
        write_one(tenant, "found again")
        with tenant.write() as connection:
            full_text.check(connection)
            found = connection.execute("SELECT count(*) FROM memories_fts WHERE memories_fts MATCH 'found'").fetchone()
            assert found == (1,)


def test_the_record_of_an_index_says_how_many_pages_it_has(paths: TenantPaths) -> None:  # noqa: F811
    chance = random.Random(6)
    with opened(paths) as tenant:
        unsynced(tenant)
        for n in range(120):
            with tenant.write() as connection:
                made = memories.create(connection, NewMemory(text(chance, MANY, 400)))
            if n % 3 == 0:
                with tenant.write() as connection:
                    memories.delete(connection, made.id)
            with tenant.read() as connection:
                found = levels(connection)
                # Of a segment's id, whether it is a page of an index within it, its height and its number.
                leaves = connection.execute(
                    "SELECT count(*) FROM memories_fts_data WHERE id >> 37 > 0 AND id >> 36 & 1 = 0"
                )
                assert sum(sum(level.pages) for level in found) == leaves.fetchone()[0]
                assert sum(len(level.pages) for level in found) == segments(connection)
