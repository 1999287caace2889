"""Group commit: one transaction for many jobs, each of which succeeds or fails alone."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine import batch, database, full_text, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import Changes, Creation, Memory, NewMemory
from shared.errors import InMaintenance, TenantDatabaseUnavailable, UnknownMemory
from shared.tenant import TenantPaths


@pytest.fixture
def paths(tmp_path: Path) -> TenantPaths:
    paths = TenantPaths.of(tmp_path, "acme")
    database.create(paths)
    return paths


@pytest.fixture
def handle(paths: TenantPaths) -> Iterator[TenantDatabase]:
    handle = TenantDatabase(paths)
    yield handle
    handle.close()


def taking(jobs: Iterable[batch.Job]) -> Callable[[], batch.Job | None]:
    waiting = iter(jobs)
    return lambda: next(waiting, None)


def _create(text: str) -> batch.Job:
    return lambda connection: memories.create(connection, NewMemory(text, tags=["t"]))


def _contents(handle: TenantDatabase) -> list[str]:
    with handle.read() as connection:
        return [row[0] for row in connection.execute("SELECT content FROM memories ORDER BY seq")]


def _get(handle: TenantDatabase, memory_id: str) -> Memory:
    with handle.read() as connection:
        return memories.get(connection, memory_id)


def _inserts(statements: list[str]) -> list[str]:
    """SQLite traces one again for each row whose trigger ran."""
    return list(dict.fromkeys(each for each in statements if each.startswith("INSERT INTO memories (")))


def _half(connection: sqlite3.Connection) -> None:
    memories.create(connection, NewMemory("half of a job"))
    memories.update(connection, "nobody's", Changes(content="x"))


def test_all_jobs_are_one_transaction_in_their_order(handle: TenantDatabase, paths: TenantPaths) -> None:
    """Another connection sees nothing until all of them are there."""
    other = TenantDatabase(paths)
    seen: list[int] = []

    def look(connection: sqlite3.Connection) -> int:
        seen.append(len(_contents(other)))
        return memories.count(connection)

    outcomes = batch.commit(handle, taking([_create("a"), look, _create("b"), look]))
    assert [o.error for o in outcomes] == [None] * 4
    assert (outcomes[1].value, outcomes[3].value, seen) == (1, 2, [0, 0])
    assert outcomes[0].value.content == "a" and _contents(other) == ["a", "b"]
    other.close()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failing_job_takes_only_itself_away(handle: TenantDatabase, place: int) -> None:
    """What it did before it failed is undone, its neighbours are stored once, the order is kept."""
    jobs = [_create("a"), _create("b")]
    jobs.insert(place, _half)
    outcomes = batch.commit(handle, taking(jobs))
    assert isinstance(outcomes.pop(place).error, UnknownMemory)
    assert [o.value.content for o in outcomes] == ["a", "b"] == _contents(handle)


@pytest.mark.parametrize(
    "error", [ValueError("x"), sqlite3.IntegrityError("x"), sqlite3.OperationalError("no such column")]
)
def test_a_bug_in_one_job_is_that_jobs_own(handle: TenantDatabase, error: Exception) -> None:
    """Also SQLite's errors about the statement, and also when all of them fail, or the only one."""

    def broken(connection: sqlite3.Connection) -> None:
        raise error

    outcomes = batch.commit(handle, taking([broken, _create("a"), broken]))
    assert [o.error for o in outcomes] == [error, None, error]
    assert [o.error for o in batch.commit(handle, taking([broken]))] == [error]
    assert [o.error for o in batch.commit(handle, taking([broken] * 3))] == [error] * 3
    assert _contents(handle) == ["a"]


def test_a_full_database_fails_every_job_and_stores_none(handle: TenantDatabase) -> None:
    """Nobody is acknowledged; when there is room again the handle works on."""
    with handle.read() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(TenantDatabaseUnavailable) as failed:
        batch.commit(handle, taking([_create("small"), _create("x" * 60_000), _create("small")]))
    assert isinstance(failed.value.__cause__, sqlite3.OperationalError)
    assert _contents(handle) == []
    with handle.read() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    assert batch.commit(handle, taking([_create("a")]))[0].error is None


def test_a_maintenance_mark_refuses_all_before_any_runs(handle: TenantDatabase, paths: TenantPaths) -> None:
    paths.mark.touch()
    ran: list[int] = []
    with pytest.raises(InMaintenance):
        batch.commit(handle, taking([lambda connection: ran.append(1)]))
    assert ran == []


def test_jobs_may_join_while_the_transaction_runs_even_behind_one_that_fails(
    handle: TenantDatabase, paths: TenantPaths
) -> None:
    """They are taken one by one; nobody sees any of them before all are committed, and each has an outcome."""
    other = TenantDatabase(paths)
    seen_outside = []

    def look(connection: sqlite3.Connection) -> None:
        seen_outside.append(len(_contents(other)))

    def fail(connection: sqlite3.Connection) -> None:
        raise UnknownMemory("nobody's")

    outcomes = batch.commit(handle, taking((_create("a"), look, fail, _create("b"), look)))
    assert [o.error is None for o in outcomes] == [True, True, False, True, True]
    assert set(seen_outside) == {0} and _contents(other) == ["a", "b"]
    assert [o.error is None for o in batch.commit(handle, taking((fail, _create("c"))))] == [False, True]
    assert _contents(other) == ["a", "b", "c"]
    other.close()


def test_creations_side_by_side_are_one_statement_and_one_segment_of_the_index(handle: TenantDatabase) -> None:
    """However they came: that is what makes a busy tenant's writes cheap. In their order, each with its own tags."""
    statements: list[str] = []
    with handle.read() as connection:
        connection.set_trace_callback(statements.append)
    made = batch.commit(handle, taking([Creation(NewMemory(f"m{n}", tags=[f"t{n}", "all"])) for n in range(13)]))
    inserts = _inserts(statements)
    assert len(inserts) == 2, "of eight and of five"
    with handle.read() as connection:
        connection.set_trace_callback(None)
        segments = connection.execute("SELECT count(DISTINCT segid) FROM memories_fts_idx").fetchone()[0]
        tagged = list(connection.execute("SELECT content, tag FROM tags JOIN memories USING (seq) ORDER BY seq, tag"))
    assert segments == 2
    assert tagged == [(f"m{n}", tag) for n in range(13) for tag in ("all", f"t{n}")]
    assert [o.value.content for o in made] == [f"m{n}" for n in range(13)] == _contents(handle)
    assert [o.value for o in made] == [_get(handle, o.value.id) for o in made]


def test_a_creation_that_fails_takes_only_itself_away_also_from_a_statement_for_several(handle: TenantDatabase) -> None:
    """It is the statement that fails, half-way. The others' acknowledgements say what is stored, in their order."""
    impossible = Creation(NewMemory(b"bytes in a column of text"))  # type: ignore[arg-type]
    jobs = [Creation(NewMemory("a")), impossible, Creation(NewMemory("b")), Creation(NewMemory("c"))]
    outcomes = batch.commit(handle, taking(jobs))
    assert [o.error is None for o in outcomes] == [True, False, True, True]
    assert isinstance(outcomes[1].error, sqlite3.IntegrityError)
    assert [o.value.content for o in outcomes if o.error is None] == ["a", "b", "c"] == _contents(handle)


@pytest.mark.parametrize(
    "long",
    [
        NewMemory("x" * 10_000),
        NewMemory("🌊" * 2_500),
        NewMemory("x", metadata={"a": "x" * 10_000}),
        NewMemory("x", tags=["🌊" * 1_250, "🌍" * 1_250]),
        NewMemory("x", memory_type="x" * 10_000),
    ],
    ids=["content", "not ASCII", "metadata", "tags", "type"],
)
def test_long_memories_are_inserted_one_by_one(handle: TenantDatabase, long: NewMemory) -> None:
    """A connection keeps a copy of what was last bound to each of its statements, for as long as it is open."""
    statements: list[str] = []
    with handle.read() as connection:
        connection.set_trace_callback(statements.append)
    batch.commit(handle, taking([Creation(NewMemory("y")), Creation(long), Creation(long), Creation(NewMemory("z"))]))
    assert [each.count(", 1)") for each in _inserts(statements)] == [2, 2]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["create", "plain", "update", "fail", "broken", "pause"]), max_size=40))
def test_any_mix_of_jobs_does_what_they_would_do_one_after_the_other(steps: list[str]) -> None:
    """Whoever joins when, whatever stands beside what, and also when one of them fails and all are tried again."""

    def update(connection: sqlite3.Connection) -> Memory | None:
        newest = connection.execute("SELECT id FROM memories ORDER BY seq DESC LIMIT 1").fetchone()
        return memories.update(connection, newest[0], Changes(content="updated")) if newest else None

    def fail(connection: sqlite3.Connection) -> None:
        memories.create(connection, NewMemory("half of a job"))
        raise UnknownMemory("nobody's")

    jobs: list[batch.Job | None] = []
    stored: list[tuple[str, str]] = []  # content, tag
    expected: list[str | None] = []  # the content each outcome has, None of one that fails
    for n, step in enumerate(steps):
        match step:
            case "create" | "plain":
                new = NewMemory(str(n), tags=[f"t{n}"])
                jobs.append(Creation(new) if step == "create" else partial(memories.create, new=new))
                stored.append((str(n), f"t{n}"))
                expected.append(str(n))
            case "update":
                jobs.append(update)
                if stored:
                    stored[-1] = ("updated", stored[-1][1])
                expected.append("updated" if stored else "")
            case "fail" | "broken":
                jobs.append(fail if step == "fail" else Creation(NewMemory(b"no text")))  # type: ignore[arg-type]
                expected.append(None)
            case _:
                jobs.append(None)  # nobody waits just now
    with tempfile.TemporaryDirectory() as directory:
        paths = TenantPaths.of(Path(directory), "acme")
        database.create(paths)
        with closing(TenantDatabase(paths)) as handle:
            waiting = deque(jobs)
            outcomes: list[batch.Outcome] = []
            while waiting:
                outcomes += batch.commit(handle, lambda: waiting.popleft() if waiting else None)
            found = [None if o.error is not None else o.value.content if o.value is not None else "" for o in outcomes]
            assert found == expected
            with handle.write() as connection:
                full_text.check(connection)
                tagged = connection.execute("SELECT content, tag FROM memories LEFT JOIN tags USING (seq) ORDER BY seq")
                assert tagged.fetchall() == stored


def test_who_comes_while_the_statements_run_joins_the_same_transaction(handle: TenantDatabase) -> None:
    """And nobody who has been taken is forgotten, whatever Python thinks of its truth."""

    class Empty:
        def __len__(self) -> int:
            return 0

        def __call__(self, connection: sqlite3.Connection) -> str:
            return "ran"

    come = [Creation(NewMemory("a")), Empty(), Creation(NewMemory("b")), None, Creation(NewMemory("c")), None, None]
    came = iter(come)
    outcomes = batch.commit(handle, lambda: next(came))
    assert [o.value if o.value == "ran" else o.value.content for o in outcomes] == ["a", "ran", "b", "c"]
    assert next(came, "all asked") == "all asked"
