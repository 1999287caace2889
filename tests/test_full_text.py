"""The full-text index is merged a little at a time, and stays the same index."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing

import pytest

from shared.engine import full_text, memories
from shared.engine.database import TenantDatabase
from shared.engine.full_text import TRANSACTIONS, Merging
from shared.engine.memories import Changes, NewMemory
from shared.tenant import TenantPaths
from tests.database_fixtures import frames, opened, paths, write_one  # noqa: F401

SEGMENTS_OF_A_LEVEL = 16  # FTS5's crisismerge
WORDS = [f"word{n:03}" for n in range(400)]
CREATES = 2_500


def text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=40))


def unsynced(tenant: TenantDatabase) -> None:
    with tenant.read() as connection:
        connection.execute("PRAGMA synchronous = OFF")  # thousands of transactions, none of which has to last


def segments(connection: sqlite3.Connection) -> int:
    (found,) = connection.execute("SELECT count(DISTINCT segid) FROM memories_fts_idx").fetchone()
    return int(found)


def check(connection: sqlite3.Connection) -> None:
    """Raises unless the index is whole and says what the memories say."""
    connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('integrity-check', 1)")


def pages_of_each_create(paths: TenantPaths, tenant: TenantDatabase) -> list[int]:  # noqa: F811
    chance, pages = random.Random(1), []
    for _ in range(CREATES):
        tenant.checkpoint()  # the next transaction begins the `-wal` anew
        with tenant.write() as connection:
            memories.create(connection, NewMemory(text(chance)))
        pages.append(frames(paths)[0])
    return pages


def test_no_transaction_merges_for_all_others(paths: TenantPaths, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """By FTS5's own settings some transaction writes hundreds of pages, and whoever is in it or behind it waits."""
    with opened(paths) as tenant:
        unsynced(tenant)
        ours = pages_of_each_create(paths, tenant)
        monkeypatch.setattr(Merging, "step", lambda *_: None)
        with tenant.write() as connection:
            connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('automerge', 4)")
        sqlites = pages_of_each_create(paths, tenant)
    assert max(ours) <= 60 < 100 < max(sqlites)
    assert sum(ours) < 1.2 * sum(sqlites), "not by doing more"


def test_what_is_found_is_what_is_there(paths: TenantPaths) -> None:  # noqa: F811
    """Whatever is created, changed, deleted and rolled back meanwhile; a search has few segments to look through."""
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
                    memories.create(connection, NewMemory("never"))
                    full_text.Merging().step(connection)
                    raise ZeroDivisionError
        with tenant.write() as connection:
            check(connection)
            assert segments(connection) <= 2 * SEGMENTS_OF_A_LEVEL
        with tenant.read() as connection:
            for word in chance.sample(WORDS, 40):
                found = connection.execute(
                    "SELECT id FROM memories_fts JOIN memories ON seq = memories_fts.rowid WHERE memories_fts MATCH ?",
                    (word,),
                )
                assert {row[0] for row in found} == {id_ for id_, content in kept.items() if word in content.split()}


def test_an_index_is_merged_by_connections_that_write_once(paths: TenantPaths) -> None:  # noqa: F811
    """A machine with more tenants than places opens a database for a transaction and closes it: each of those counting
    from nothing would never come to its turn."""
    chance = random.Random(3)
    with opened(paths) as other, other.read():  # so that closing does not checkpoint
        for _ in range(30 * TRANSACTIONS):
            with closing(TenantDatabase(paths)) as tenant:
                unsynced(tenant)
                with tenant.write() as connection:
                    memories.create(connection, NewMemory(text(chance)))
        with other.write() as connection:
            assert connection.execute("SELECT v FROM memories_fts_config WHERE k = 'automerge'").fetchone() == (0,)
            check(connection)
            assert segments(connection) < 2 * SEGMENTS_OF_A_LEVEL


def test_a_file_that_only_others_write_has_a_bound_too(paths: TenantPaths, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """An older build that finds the setting turned off goes on without these merges."""
    chance = random.Random(4)
    with opened(paths) as tenant:
        unsynced(tenant)
        for _ in range(TRANSACTIONS):
            write_one(tenant, text(chance))
        monkeypatch.setattr(Merging, "step", lambda *_: None)
        for _ in range(1_500):
            with tenant.write() as connection:
                memories.create(connection, NewMemory(text(chance)))
        with tenant.write() as connection:
            check(connection)
            assert segments(connection) <= 3 * SEGMENTS_OF_A_LEVEL, "of 1,508 transactions"
