"""Memories, versions, tags, paging and search of one tenant database."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine import full_text, memories, schema, search
from shared.engine.memories import Changes, NewMemory
from shared.errors import BadSearchQuery, CorruptDatabase, Permanent, SchemaTooNew, UnknownMemory

WORDS = ("apple", "berry", "cloud", "delta", "ember")


@contextmanager
def fresh() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        schema.migrate(connection, "acme", new=True)
        yield connection


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with fresh() as made:
        yield made


def found(connection: sqlite3.Connection, query: str, **how: object) -> list[str]:
    return [hit.memory.content for hit in search.search(connection, query, **how)]  # type: ignore[arg-type]


def test_a_created_memory_is_read_back_as_it_was_answered(connection: sqlite3.Connection) -> None:
    """The 201 body is the promise; GET must keep it."""
    made = memories.create(
        connection, NewMemory("naïve ☕\x00end", "fact", ["b", "a", "b"], {"k": [1, None, "ü"]}, importance=1)
    )
    assert memories.get(connection, made.id) == made
    assert msgspec.json.decode(made.tags) == ["b", "a"]
    assert msgspec.json.decode(made.metadata) == {"k": [1, None, "ü"]}
    assert (made.version, made.updated_at) == (1, made.created_at)


def test_an_update_changes_the_named_fields_and_keeps_every_earlier_state(connection: sqlite3.Connection) -> None:
    """An edit is history, not loss."""
    made = memories.create(connection, NewMemory("one", tags=["x"], metadata={"a": 1}))
    memories.update(connection, made.id, Changes(content="two"))
    last = memories.update(connection, made.id, Changes(tags=["y"], importance=0.9))
    assert (last.content, last.version, last.importance) == ("two", 3, 0.9)
    assert (bytes(last.tags), bytes(last.metadata)) == (b'["y"]', b'{"a":1}')
    assert last.created_at == made.created_at
    kept = connection.execute("SELECT version, content, tags FROM versions ORDER BY version").fetchall()
    assert kept == [(1, "one", '["x"]'), (2, "two", '["x"]')]


def test_a_deleted_memory_leaves_no_tag_version_or_search_row(connection: sqlite3.Connection) -> None:
    """What a client deletes must not be found by any path."""
    made = memories.create(connection, NewMemory("gone", tags=["x"]))
    memories.update(connection, made.id, Changes(content="gone twice"))
    memories.delete(connection, made.id)
    with pytest.raises(UnknownMemory):
        memories.get(connection, made.id)
    assert found(connection, "gone") == []
    for table in ("tags", "versions", "memories"):
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_an_unknown_id_is_unknown_memory_for_every_verb(connection: sqlite3.Connection) -> None:
    """404 must not depend on the verb."""
    for verb in (
        lambda: memories.get(connection, "nope"),
        lambda: memories.delete(connection, "nope"),
        lambda: memories.update(connection, "nope", Changes(content="x")),
    ):
        with pytest.raises(UnknownMemory):
            verb()


@settings(max_examples=40)
@given(st.integers(0, 25), st.integers(1, 7), st.lists(st.tuples(st.booleans(), st.integers(0, 24)), max_size=8))
def test_paging_shows_every_lasting_memory_once_newest_first(
    count: int, limit: int, between: list[tuple[bool, int]]
) -> None:
    """Rows created or deleted between two pages neither repeat nor hide a row that was there throughout."""
    with fresh() as connection:
        made = [memories.create(connection, NewMemory(str(n), tags=["t"])).id for n in range(count)]
        lasting, seen, cursor, steps = set(made), [], None, iter(between)
        while True:
            page = memories.page(connection, limit=limit, before_seq=cursor, tag="t" if limit % 2 else None)
            seen += [m.id for m in page.memories]
            assert len(page.memories) <= limit
            if (cursor := page.next_seq) is None:
                break
            for insert, index in [next(steps, (True, 0))]:
                if insert:
                    memories.create(connection, NewMemory("late", tags=["t"]))
                elif index < count and made[index] in lasting:
                    memories.delete(connection, made[index])
                    lasting.discard(made[index])
        assert len(seen) == len(set(seen))
        assert [m for m in reversed(made) if m in lasting] == [m for m in seen if m in lasting]


def test_a_tag_lists_only_its_own_memories_newest_first(connection: sqlite3.Connection) -> None:
    """A filter that leaks neighbours is worse than none."""
    for n in range(6):
        memories.create(connection, NewMemory(str(n), tags=["even"] if n % 2 == 0 else ["odd", "other"]))
    page = memories.page(connection, limit=10, before_seq=None, tag="even")
    assert ([m.content for m in page.memories], page.next_seq) == (["4", "2", "0"], None)
    assert memories.page(connection, limit=10, before_seq=None, tag="eve").memories == []


long_texts = st.tuples(st.sampled_from("x\u0001é😀"), st.integers(0, 400)).map(
    lambda drawn: "apple " + drawn[0] * drawn[1]
)


@settings(max_examples=40)
@given(st.lists(long_texts, max_size=8), st.integers(1, 5_000))
def test_an_answer_has_as_many_memories_as_fit_and_always_one(contents: list[str], limit_bytes: int) -> None:
    """Never more bytes than asked for, unless by a single memory; and the short pages together are the whole list."""
    encode = msgspec.json.encode
    with fresh() as connection:
        for content in contents:
            memories.create(connection, NewMemory(content, memory_type=content[6:20] or "t", metadata={"n": content}))
        hits = search.search(connection, "apple", limit=100, limit_bytes=limit_bytes)
        assert len(hits) >= min(1, len(contents))
        assert len(hits) <= 1 or len(encode({"results": hits, "count": len(hits)})) <= limit_bytes
        every = search.search(connection, "apple", limit=100)
        assert hits == every[: len(hits)]
        seen, cursor = [], None
        while True:
            page = memories.page(connection, limit=100, before_seq=cursor, tag=None, limit_bytes=limit_bytes)
            following = {"memories": page.memories, "next_cursor": "x" * 22}
            assert len(page.memories) <= 1 or len(encode(following)) <= limit_bytes
            seen += [memory.content for memory in page.memories]
            if (cursor := page.next_seq) is None:
                break
        assert seen == contents[::-1]
        assert not connection.in_transaction


def test_no_more_rows_are_read_than_fit() -> None:
    """Two hundred of the longest memories are 80 MB, and were all in memory before any was left out."""
    row = ("id", "x" * 10_000, "[]", "{}", "note", 0.5, "then", "then", 1)
    read = []

    def rows() -> Iterator[tuple[object, ...]]:
        for n in range(200):
            read.append(n)
            yield row

    found, cut = memories.within(rows(), 100_000)
    assert cut and len(found) == 9 and len(read) == 10


def test_a_page_of_nothing_is_refused(connection: sqlite3.Connection) -> None:
    """limit 0 would page for ever."""
    with pytest.raises(Permanent):
        memories.page(connection, limit=0, before_seq=None, tag=None)


texts = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("create"), texts, st.integers(0, 9)),
        st.tuples(st.just("update"), texts, st.integers(0, 9)),
        st.tuples(st.just("delete"), st.just(""), st.integers(0, 9)),
        st.tuples(st.just("rolled back"), texts, st.integers(0, 9)),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(steps)
def test_search_agrees_with_a_plain_model_after_any_sequence(sequence: list[tuple[str, str, int]]) -> None:
    """The full-text index is kept by triggers; whatever happens it must say what the memories say."""
    with fresh() as connection:
        model: dict[str, str] = {}
        for verb, text, index in sequence:
            chosen = sorted(model)[index % len(model)] if model else None
            connection.execute("BEGIN")
            if verb == "create" or chosen is None:
                model[memories.create(connection, NewMemory(text)).id] = text
            elif verb == "update":
                memories.update(connection, chosen, Changes(content=text))
                model[chosen] = text
            elif verb == "delete":
                memories.delete(connection, chosen)
                del model[chosen]
            else:
                memories.update(connection, chosen, Changes(content=f"{text} phantom"))
                connection.execute("ROLLBACK")
                continue
            connection.execute("COMMIT")
        for word in (*WORDS, "phantom"):
            hits = {hit.memory.id for hit in search.search(connection, word, limit=100)}
            assert hits == {i for i, content in model.items() if word in content.split()}
        full_text.check(connection)
        assert memories.count(connection) == len(model)


def test_search_ranks_filters_and_limits(connection: sqlite3.Connection) -> None:
    """A better match comes first, and every filter must hold."""
    memories.create(connection, NewMemory("apple " + "filler " * 30, "note", ["a"]))
    memories.create(connection, NewMemory("apple apple", "fact", ["a", "b"]))
    memories.create(connection, NewMemory("Äpfel", "note"))
    hits = search.search(connection, "apple")
    assert [h.memory.memory_type for h in hits] == ["fact", "note"]
    assert hits[0].score > hits[1].score
    assert len(search.search(connection, "apple", limit=1)) == 1
    assert found(connection, "apple", tags=["a", "b"]) == ["apple apple"]
    assert found(connection, "apple", tags=["a", "c"]) == []
    assert found(connection, "apple", memory_type="fact") == ["apple apple"]
    assert found(connection, "apfel") == ["Äpfel"]


def test_memories_of_one_score_come_in_the_order_they_were_made(connection: sqlite3.Connection) -> None:
    """The same question gets the same answer, wherever the limit cuts."""
    made = [memories.create(connection, NewMemory("apple pie")).id for _ in range(50)]
    assert [hit.memory.id for hit in search.search(connection, "apple", limit=50)] == made
    assert [hit.memory.id for hit in search.search(connection, "apple", limit=20)] == made[:20]


HOSTILE = [
    *("", " ", "\t\n", "\x00", "a\x00b", '"', "'", "a'b", '"a', "*", "AND", "a AND", "OR b", "NOT", "a NOT", "NOT a"),
    *("(", ")", "((a)", "a)", "NEAR(", "a NEAR/", "^", "+", "a +", ":", "content:", "nosuch: a", "rank:a", "{a b}: c"),
    *("- a", "a;b", "a--", "a/*", "a,b", "a.b", "a@b", "%", "$", "\\", "\x01", "\ud800", "a \udfff"),
    *("(" * 5000, "(" * 300 + "a" + ")" * 300, "a" + " NOT (a" * 400, "x'; DROP TABLE memories; --", "*nosuch"),
]


@pytest.mark.parametrize("query", HOSTILE, ids=lambda q: ascii(q[:12]))
def test_a_query_fts5_cannot_read_is_the_callers_mistake(connection: sqlite3.Connection, query: str) -> None:
    """A bad query is 400, never 500 and never a retry."""
    memories.create(connection, NewMemory("a b c"))
    with pytest.raises(BadSearchQuery):
        search.search(connection, query)
    assert found(connection, "a") == ["a b c"]


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(
                ["a", "b", '"', "(", ")", "*", "^", "+", "-", ":", "{", "}", "AND", "OR", "NOT", "NEAR", ","]
            )
        ).map(" ".join),
        st.text(alphabet='ab"()*^+-:{} ANDORTE', max_size=30),
    )
)
def test_any_text_is_either_a_search_or_a_bad_query(query: str) -> None:
    """No string may reach the gateway as an error it does not know."""
    with fresh() as connection:
        memories.create(connection, NewMemory("a b c"))
        try:
            hits = search.search(connection, query)
        except BadSearchQuery:
            return
        assert all(hit.memory.content == "a b c" for hit in hits)


def test_the_longest_query_is_searched_and_one_longer_refused(connection: sqlite3.Connection) -> None:
    """FTS5 parses in quadratic time: one request of a megabyte would hold a thread for minutes."""
    memories.create(connection, NewMemory("a"))
    longest = "a " * (search.MAX_QUERY_CHARACTERS // 2)
    assert found(connection, longest) == ["a"]
    with pytest.raises(BadSearchQuery):
        search.search(connection, longest + "a")


def test_a_newer_schema_is_refused_and_untouched(connection: sqlite3.Connection) -> None:
    """An older build must not write into what it does not understand."""
    connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    with pytest.raises(SchemaTooNew):
        schema.migrate(connection, "acme")
    assert schema.schema_version(connection) == schema.SCHEMA_VERSION + 1


def test_another_tenants_file_is_refused(connection: sqlite3.Connection) -> None:
    """Whose database it is stands inside the file, not in its name."""
    with pytest.raises(CorruptDatabase, match="acme"):
        schema.migrate(connection, "globex")


def test_an_empty_file_is_not_taken_for_a_new_database() -> None:
    """A live database cut to nothing must be an alarm, not a fresh start with no memories."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        with pytest.raises(CorruptDatabase):
            schema.migrate(connection, "acme")
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)


def test_a_database_of_another_product_is_refused() -> None:
    """A version number alone proves nothing."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE notes (x)")
        connection.execute("PRAGMA user_version = 1")
        with pytest.raises(CorruptDatabase):
            schema.migrate(connection, "acme")


def test_a_migration_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a migration is one transaction."""
    broken = re.sub(r"\Z", "CREATE TABLE meta (twice);\n", schema.MIGRATIONS[0])
    monkeypatch.setattr(schema, "MIGRATIONS", (broken,))
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        with pytest.raises(sqlite3.OperationalError):
            schema.migrate(connection, "acme", new=True)
        assert schema.schema_version(connection) == 0
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
