"""Full-text search: SQLite FTS5, ranked by bm25, the caller's query in FTS5's own syntax.

A query that FTS5 cannot parse is the caller's mistake, not a failure: `BadSearchQuery` carries SQLite's
message (it names a token of the query, so it goes to the caller and not into logs).

The score is computed once for each match, SQLite's sorter keeps the best `limit`, and only those are read. With
`ORDER BY rank`, which FTS5's documentation suggests, FTS5 sorts all matches with their positions in a statement of its
own and computes the scores of the best a second time: 510 µs a search instead of 370 (5,000 memories, 500 mixed
queries, the same answers). Building the answer's JSON in SQL was measured too: no difference.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

import msgspec

from shared.engine.memories import COLUMNS, NO_LIMIT, Memory, memory_from_row, within
from shared.errors import BadSearchQuery

MAX_QUERY_CHARACTERS = 4_096  # FTS5 parses in quadratic time: 50,000 terms took 10 s


class Hit(msgspec.Struct, frozen=True):
    """`score` is −bm25: larger is better, 0 is no evidence."""

    memory: Memory
    score: float


_SELECT = (
    "SELECT "
    + ", ".join(f"m.{c}" for c in COLUMNS.split(", "))
    + ", -best.cost FROM (SELECT memories_fts.rowid AS seq, bm25(memories_fts) AS cost FROM memories_fts"
)
_MATCH = " WHERE memories_fts MATCH ?"
_OF_TYPE = " CROSS JOIN memories t ON t.seq = memories_fts.rowid WHERE memories_fts MATCH ? AND t.memory_type = ?"
_WITH_TAG = " AND EXISTS (SELECT 1 FROM tags WHERE tag = ? AND seq = memories_fts.rowid)"
_BEST = " ORDER BY cost, seq LIMIT ?) best CROSS JOIN memories m ON m.seq = best.seq ORDER BY best.cost, best.seq"


def search(
    connection: sqlite3.Connection,
    query: str,
    *,
    limit: int = 10,
    tags: list[str] | None = None,
    memory_type: str | None = None,
    limit_bytes: int = NO_LIMIT,
) -> list[Hit]:
    """Best `limit` memories that match `query`, carry all of `tags` and have `memory_type`; fewer, but one, when they
    would take more than `limit_bytes` as JSON.

    Raises `BadSearchQuery`. Inside `TenantDatabase.read()`.
    """
    if len(query) > MAX_QUERY_CHARACTERS:
        raise BadSearchQuery(f"the query is longer than {MAX_QUERY_CHARACTERS} characters")
    if not query.strip() or "\x00" in query:
        raise BadSearchQuery("the query is empty" if "\x00" not in query else "the query contains a NUL")
    matching, parameters = _MATCH, [query]
    if memory_type is not None:
        matching = _OF_TYPE
        parameters.append(memory_type)
    for tag in dict.fromkeys(tags or ()):
        matching += _WITH_TAG
        parameters.append(tag)
    try:
        with closing(connection.execute(_SELECT + matching + _BEST, (*parameters, limit))) as cursor:
            rows, _ = within(cursor, limit_bytes)
    except UnicodeEncodeError as e:
        raise BadSearchQuery("the query is not valid Unicode") from e
    except sqlite3.OperationalError as e:
        # The statement is ours and fixed: a plain SQLITE_ERROR can only come from parsing the MATCH operand.
        if getattr(e, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            raise BadSearchQuery(str(e)) from e
        raise
    return [Hit(memory_from_row(row), row[9]) for row in rows]
