"""Memories: create, get, update, delete, list. Functions over a fenced connection (`TenantDatabase`).

Times are ISO 8601 UTC with microseconds; ids are UUIDv7, so they sort by the millisecond. An update writes the state
it replaces into `versions` in the same transaction.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import msgspec

from shared.engine import full_text
from shared.errors import Permanent, UnknownMemory
from shared.ids import new_text_id

COLUMNS = "id, content, tags, metadata, memory_type, importance, created_at, updated_at, version"
NO_LIMIT = sys.maxsize
_BESIDE_TEXTS_BYTES = 384  # at most, of a memory as JSON: its other fields, and what stands around it
_ROWS = (32, 16, 8, 7, 6, 5, 4, 3, 2, 1)  # how many memories one statement inserts, the most first
_TOGETHER_BYTES = 16_384  # of several, at most: the connection keeps each statement, and a copy of what was last bound
_TEXTS = 5  # of the columns, the first of them, are texts of any length
_ROW = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERTS = {
    rows: f"INSERT INTO memories ({COLUMNS}) VALUES {', '.join([_ROW] * rows)} RETURNING id, seq" for rows in _ROWS
}
_INSERT_TAG = "INSERT INTO tags (tag, seq) VALUES (?, ?)"
_encode_json = msgspec.json.Encoder().encode


class Memory(msgspec.Struct, frozen=True):
    """A memory as clients see it; `tags` and `metadata` are passed through as the JSON they are stored as."""

    id: str
    content: str
    tags: msgspec.Raw
    metadata: msgspec.Raw
    memory_type: str
    importance: float
    created_at: str
    updated_at: str
    version: int


class NewMemory(msgspec.Struct, frozen=True):
    content: str
    memory_type: str = "note"
    tags: list[str] = msgspec.field(default_factory=list)
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    importance: float = 0.5


class Changes(msgspec.Struct, frozen=True):
    """Fields to change; UNSET leaves a field as it is."""

    content: str | msgspec.UnsetType = msgspec.UNSET
    memory_type: str | msgspec.UnsetType = msgspec.UNSET
    tags: list[str] | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    importance: float | msgspec.UnsetType = msgspec.UNSET


class Page(msgspec.Struct, frozen=True):
    """Newest first. `next_seq` continues the list, None at its end; a short page is not the end."""

    memories: list[Memory]
    next_seq: int | None


class Creation:
    """The job that creates one memory and returns it. Several are one statement (`shared.engine.batch`)."""

    __slots__ = ("_new",)

    def __init__(self, new: NewMemory) -> None:
        self._new = new

    def __call__(self, connection: sqlite3.Connection) -> Memory:
        return create(connection, self._new)

    @classmethod
    def together(cls, connection: sqlite3.Connection, jobs: Sequence[Creation]) -> list[Memory]:
        return create_all(connection, [job._new for job in jobs])


def create(connection: sqlite3.Connection, new: NewMemory) -> Memory:
    """Insert one memory. Inside `TenantDatabase.write()`."""
    return create_all(connection, [new])[0]


def create_all(connection: sqlite3.Connection, new: Sequence[NewMemory]) -> list[Memory]:
    """Insert memories, in their order. Inside `TenantDatabase.write()`, for the last of several statements may fail."""
    tags = [_unique(each.tags) for each in new]
    rows = [_new_row(each, its_tags) for each, its_tags in zip(new, tags, strict=True)]
    inserted: dict[str, int] = {}
    while (begun := len(inserted)) < len(rows):
        part = rows[begun : begun + _at_once(rows, begun)]
        inserted.update(connection.execute(_INSERTS[len(part)], list(chain.from_iterable(part))).fetchall())
    pairs = [(tag, inserted[row[0]]) for row, its_tags in zip(rows, tags, strict=True) for tag in its_tags]
    if pairs:
        connection.executemany(_INSERT_TAG, pairs)
    return [memory_from_row(row) for row in rows]


def _new_row(new: NewMemory, tags: list[str]) -> tuple[Any, ...]:
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    return (
        new_text_id(),
        new.content,
        _encode_json(tags).decode(),
        _encode_json(new.metadata).decode(),
        new.memory_type,
        float(new.importance) + 0.0,  # -0.0 is 0.0, as SQLite keeps it
        now,
        now,
        1,
    )


def _at_once(rows: Sequence[tuple[Any, ...]], begun: int) -> int:
    """How many of the rows from there on one statement inserts."""
    size = count = 0
    for row in rows[begun : begun + _ROWS[0]]:
        size += sum(len(text) if text.isascii() else 4 * len(text) for text in row[:_TEXTS])
        if size > _TOGETHER_BYTES:
            break
        count += 1
    return next((rows for rows in _ROWS if rows <= count), 1)


def get(connection: sqlite3.Connection, memory_id: str) -> Memory:
    """Raises `UnknownMemory`."""
    row = connection.execute(f"SELECT {COLUMNS} FROM memories WHERE id = ?", (memory_id,)).fetchone()
    if row is None:
        raise UnknownMemory(f"no memory {memory_id:.80}")
    return memory_from_row(row)


def update(connection: sqlite3.Connection, memory_id: str, changes: Changes) -> Memory:
    """Change the given fields, keep the earlier state in `versions`, count `version` up.

    Raises `UnknownMemory`. Inside `TenantDatabase.write()`.
    """
    kept = connection.execute(
        "INSERT INTO versions (seq, version, content, memory_type, tags, metadata, importance, updated_at)"
        " SELECT seq, version, content, memory_type, tags, metadata, importance, updated_at"
        " FROM memories WHERE id = ? RETURNING seq",
        (memory_id,),
    ).fetchall()
    if not kept:
        raise UnknownMemory(f"no memory {memory_id:.80}")
    seq = kept[0][0]
    assignments = ["updated_at = ?", "version = version + 1"]
    values: list[object] = [datetime.now(UTC).isoformat(timespec="microseconds")]
    for column in ("content", "memory_type", "importance"):
        value = getattr(changes, column)
        if value is not msgspec.UNSET:
            assignments.append(f"{column} = ?")
            values.append(value)
    if changes.metadata is not msgspec.UNSET:
        assignments.append("metadata = ?")
        values.append(_encode_json(changes.metadata).decode())
    if changes.tags is not msgspec.UNSET:
        tags = _unique(changes.tags)
        assignments.append("tags = ?")
        values.append(_encode_json(tags).decode())
        connection.execute("DELETE FROM tags WHERE seq = ?", (seq,))
        connection.executemany(_INSERT_TAG, [(tag, seq) for tag in tags])
    connection.execute(f"UPDATE memories SET {', '.join(assignments)} WHERE seq = ?", (*values, seq))
    return get(connection, memory_id)


def delete(connection: sqlite3.Connection, memory_id: str) -> None:
    """Remove a memory with its versions and tags. Raises `UnknownMemory`. Inside `TenantDatabase.write()`."""
    if connection.execute("DELETE FROM memories WHERE id = ?", (memory_id,)).rowcount == 0:
        raise UnknownMemory(f"no memory {memory_id:.80}")
    full_text.thin_out(connection)


def page(
    connection: sqlite3.Connection,
    *,
    limit: int,
    before_seq: int | None,
    tag: str | None,
    limit_bytes: int = NO_LIMIT,
) -> Page:
    """At most `limit` memories, newest first, older than `before_seq`, carrying `tag` if given; fewer, but one, when
    they would take more than `limit_bytes` as JSON.

    Keyset paging: rows created or deleted meanwhile neither repeat nor hide a row that was there throughout.
    """
    if limit < 1:
        raise Permanent("limit must be at least 1")
    before = before_seq if before_seq is not None else (1 << 63) - 1
    if tag is None:
        sql = f"SELECT {COLUMNS}, seq FROM memories WHERE seq < ? ORDER BY seq DESC LIMIT ?"
        parameters: Sequence[object] = (before, limit + 1)
    else:
        sql = (
            f"SELECT {COLUMNS}, seq FROM tags JOIN memories USING (seq)"
            " WHERE tags.tag = ? AND tags.seq < ? ORDER BY tags.seq DESC LIMIT ?"
        ).replace("tags, metadata", "memories.tags, metadata")
        parameters = (tag, before, limit + 1)
    with closing(connection.execute(sql, parameters)) as cursor:
        rows, cut = within(cursor, limit_bytes)
    more = cut or len(rows) > limit
    rows = rows[:limit]
    return Page([memory_from_row(r) for r in rows], rows[-1][9] if more else None)


def count(connection: sqlite3.Connection) -> int:
    rows: int = connection.execute("SELECT count(*) FROM memories").fetchone()[0]
    return rows


def count_by_type(connection: sqlite3.Connection) -> dict[str, int]:
    """How many memories there are of each type, the most frequent first. Reads the whole table."""
    rows = connection.execute("SELECT memory_type, count(*) FROM memories GROUP BY 1 ORDER BY 2 DESC, 1")
    return dict(rows.fetchall())


def memory_from_row(row: Sequence[Any]) -> Memory:
    """A row selected as `COLUMNS` as a `Memory`."""
    return Memory(
        row[0],
        row[1],
        msgspec.Raw(row[2].encode()),
        msgspec.Raw(row[3].encode()),
        row[4],
        row[5],
        row[6],
        row[7],
        row[8],
    )


def within(found: Iterable[Sequence[Any]], limit_bytes: int) -> tuple[list[Sequence[Any]], bool]:
    """The first of the rows (they begin with `COLUMNS`), at least one, that together take at most `limit_bytes` as
    JSON; and whether there were more. No more rows are read than that takes, and none is encoded while the longest
    that JSON can make of them would fit."""
    rows: list[Sequence[Any]] = []
    at_most = size = 0
    for row in found:
        at_most += _BESIDE_TEXTS_BYTES + 6 * (len(row[1]) + len(row[4])) + 4 * (len(row[2]) + len(row[3]))
        if at_most > limit_bytes:
            size = (size or sum(map(_json_bytes, rows))) + _json_bytes(row)
            if rows and size > limit_bytes:
                return rows, True
        rows.append(row)
    return rows, False


def _json_bytes(row: Sequence[Any]) -> int:
    escaped = len(_encode_json(row[1])) + len(_encode_json(row[4]))
    return _BESIDE_TEXTS_BYTES + escaped + len(row[2].encode()) + len(row[3].encode())  # those are JSON already


def _unique(tags: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(tags))
