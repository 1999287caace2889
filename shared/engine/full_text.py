"""The full-text index is merged a little at a time, within the transactions that add to it.

FTS5 writes a new segment of its index for each statement that inserts memories (the trigger's savepoint makes it,
however many statements are in a transaction) and merges segments when there are many. By its own settings it does so
within whatever statement or COMMIT finds it due ("automerge": every 64 pages, up to 64 for each level of the index;
"crisismerge": 16 segments of a level, all of them): one writer in some two thousand waits for all of it, and everybody
behind it.

So who writes turns automerge off in the file and merges itself, `PAGES` pages at once and for as long as there is
something to merge, but never for longer than writing has taken since it last did. That is in proportion whatever is
written, many memories together or long ones. SQLite's crisismerge stays as it is: it bounds the segments of a file that
others write.

CPU ms of the longest transaction, and of all in the mean (about as many segments either way, 7 to 14 in the mean):

| memories in a statement   | by SQLite   | so          |
|---------------------------|-------------|-------------|
| 1 short                   | 14.2; 0.090 | 1.5; 0.083  |
| 4 short                   | 14.6; 0.165 | 1.3; 0.172  |
| 32 of 60 words            | 15.3; 1.12  | 2.2; 1.27   |
| 1 of 12,000 words         | 16.2; 4.79  | 8.1; 4.77   |

Fewer pages at once, for a third of that time, would make the longest ones shorter still, and was twice the segments,
which every search looks through, until SQLite merged sixteen long ones at once (93 ms).

https://sqlite.org/fts5.html#the_automerge_configuration_option, …#the_merge_command
"""

from __future__ import annotations

import random
import sqlite3
import time

PAGES = 8
STEP_SECONDS = 0.0005  # of CPU, spent writing between two merges: some four transactions of one short memory


def check(connection: sqlite3.Connection) -> None:
    """That the index is whole and says what the memories say. SQLite wants a connection that can write.

    Raises `sqlite3.DatabaseError`, which a fenced connection turns into `CorruptDatabase`.
    """
    connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('integrity-check', 1)")


class Merging:
    """Of one writing connection, in one thread at a time."""

    __slots__ = ("_began", "_changes", "_written_seconds")

    def __init__(self) -> None:
        # Many connections are closed after a transaction or two, and those are to merge as often as others.
        self._written_seconds = random.random() * STEP_SECONDS
        self._began = 0.0
        self._changes = 0

    def begin(self, connection: sqlite3.Connection) -> None:
        """As the first thing in a transaction."""
        self._changes = connection.total_changes
        self._began = time.thread_time()  # not what a neighbour on the core or the disk takes

    def step(self, connection: sqlite3.Connection) -> None:
        """As the last thing in it: merge if that is due. Raises `sqlite3.DatabaseError`."""
        if connection.total_changes == self._changes:
            return  # nothing was written, and nothing shall be
        now = time.thread_time()
        self._written_seconds += now - self._began
        if self._written_seconds < STEP_SECONDS:
            return
        automerge = connection.execute("SELECT v FROM memories_fts_config WHERE k = 'automerge'").fetchone()
        if automerge != (0,):
            connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('automerge', 0)")
        until = now + self._written_seconds
        self._written_seconds = 0.0
        while time.thread_time() < until:
            before = connection.total_changes
            connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('merge', ?)", (PAGES,))
            if connection.total_changes - before < 2:  # how SQLite says that there was nothing to do
                return
