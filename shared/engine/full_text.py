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

A deleted memory makes the index larger: its words are written once more, as deleted, and both go when a merge has read
all of the index there is. Merges of equals, as above, seldom do. So a delete begins one (`thin_out`) when what was
written after the oldest segment, in which nothing is marked as deleted, has come to half of it; the writers carry that
merge on like any other. Measured, what is left of all a database keeps (`shared.storage`), and CPU µs of a delete:

| memories, words of each        | 1,000, 40 | 5,000, 10 | 20, 6,000 |
|--------------------------------|-----------|-----------|-----------|
| half deleted, without          | 1.04      | 1.06      | 0.92      |
| so                             | 0.79      | 0.82      | 0.65      |
| all deleted, without           | 0.61      | 0.24      | 0.61      |
| so                             | 0.04      | 0.02      | 0.02      |
| each replaced 3 times, without | 2.03      | 1.58      | 1.47      |
| so                             | 1.22      | 1.37      | 0.99      |
| a delete (µs), without         | 81        | 61        | 2,485     |
| so                             | 123       | 108       | 3,700     |

https://sqlite.org/fts5.html#the_automerge_configuration_option, …#the_merge_command
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from typing import NamedTuple

PAGES = 8
SPARE_PAGES = 8  # of what nobody finds any more, whatever the index's size
SPARE_SHARE = 2
_STRUCTURE = 10  # the id under which FTS5 keeps it
STEP_SECONDS = 0.0005  # of CPU, spent writing between two merges: some four transactions of one short memory


def check(connection: sqlite3.Connection) -> None:
    """That the index is whole and says what the memories say. SQLite wants a connection that can write.

    Raises `sqlite3.DatabaseError`, which a fenced connection turns into `CorruptDatabase`.
    """
    connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('integrity-check', 1)")


class Level(NamedTuple):
    """Of an index; `merging` says that a merge of its segments into the next level is under way."""

    merging: bool
    pages: list[int]  # of each segment, the oldest first


def thin_out(connection: sqlite3.Connection) -> None:
    """After a memory was deleted, in the same transaction: see that the index does not keep what was for long."""
    (structure,) = connection.execute("SELECT block FROM memories_fts_data WHERE id = ?", (_STRUCTURE,)).fetchone()
    found = levels(structure)
    if sum(sum(level.pages) for level in found) <= SPARE_PAGES:
        return
    if connection.execute("SELECT 1 FROM memories LIMIT 1").fetchone() is None:
        connection.execute("INSERT INTO memories_fts (memories_fts) VALUES ('delete-all')")
        return
    *younger, last = found
    whole = bool(younger) and younger[-1].merging and len(last.pages) == 1  # nothing is older than what it makes
    added = sum(sum(level.pages) for level in younger) + sum(last.pages[1:])
    if not whole and added > max(SPARE_PAGES, last.pages[0] // SPARE_SHARE):
        connection.execute("INSERT INTO memories_fts (memories_fts, rank) VALUES ('merge', ?)", (-PAGES,))


def levels(structure: bytes) -> list[Level]:
    """The levels of an index that have segments, the youngest first, from FTS5's record of them.

    4 bytes; then as varints: how many levels, how many segments, a counter; for each level how many segments are being
    merged and how many it has, and for each of these its id and its first and last page.
    https://sqlite.org/src/file?name=ext/fts5/fts5_index.c ("Structure record")
    """
    numbers = _varints(structure[4:])
    count, _, _ = next(numbers), next(numbers), next(numbers)
    found = []
    for _ in range(count):
        merging, segments = next(numbers), next(numbers)
        pages = []
        for _ in range(segments):
            _, first, last = next(numbers), next(numbers), next(numbers)
            pages.append(last - first + 1)
        if pages:
            found.append(Level(merging > 0, pages))
    return found


def _varints(data: bytes) -> Iterator[int]:
    """SQLite's: seven bits a byte, the high ones first; none of these here comes near the nine bytes that differ."""
    number = 0
    for byte in data:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            yield number
            number = 0


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
