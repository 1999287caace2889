"""The control plane on a real PostgreSQL: migrations, named queries, failure."""

from __future__ import annotations

import os
import re
import socket
import string
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from shared import control_plane as module
from shared.control_plane import ControlPlane, queries
from shared.errors import ControlPlaneUnavailable, Permanent
from shared.usage_batch import Batch
from tests.core_fixtures import settings_in

pytest_plugins = ("tests.core_fixtures",)

EXAMPLES = {
    **dict.fromkeys(("whole", "force"), True),
    "backup_id": uuid4(),
    "restore_id": uuid4(),
    **{name: uuid4() for name in ("move_id", "first_backup_id", "final_backup_id")},
    "test_id": uuid4(),
    "key_id": uuid4(),
    "after": uuid4(),
    "wrapped": b"wrapped",
    "stored": Jsonb({}),
    "flow_run_id": "run",
    "from": datetime.now(UTC),
    "to": datetime.now(UTC),
    "at": datetime.now(UTC),
    "started_at": datetime.now(UTC),
    "now": datetime.now(UTC),
    "from_states": ["active"],
    "manifest": Jsonb({}),
    "checks": Jsonb([]),
    "event": Jsonb({}),
    **dict.fromkeys(("epoch", "limit", "generation", "schema_version", "size_bytes", "stored_bytes"), 1),
    **dict.fromkeys(("from_generation", "to_generation", "events", "inserted", "duplicates", "memories"), 1),
    **dict.fromkeys(("quarantined", "corrupt_bytes", "days"), 1),
    **dict.fromkeys(
        ("lease_seconds", "older_than_seconds", "locked_ms", "held_ms", "rto_ms", "rpo_seconds", "seconds"), 1.5
    ),
}
SUMS = {
    "tenant_id": ["acme"],
    "bucket": [datetime.now(UTC)],
    **{name: [1] for name in ("api_calls", "search_queries", "memories_created")},
}
OF_QUERY = {  # where a name is an array, or another type, in one query
    "usage_insert": {
        "request_id": [uuid4()],
        "tenant_id": ["acme"],
        "route": ["/r"],
        "ts": [datetime.now(UTC)],
        **{name: [1] for name in ("status", "api_calls", "search_queries", "memories_created")},
    },
    "usage_hourly_add": SUMS,
    "usage_daily_add": SUMS,
    **{
        name: {"tenant_id": ["acme"], "storage_bytes": [1], "measured_at": datetime.now(UTC)}
        for name in ("usage_hourly_storage", "usage_daily_storage")
    },
    "usage_by_bucket": {"granularity": "day"},
    "usage_books_of_day": {
        "day": datetime.now(UTC),
        "day_text": "2026-11-23",
        "audited_from": datetime.now(UTC),
    },
    "usage_known_ids": {"request_id": [uuid4()]},
    "usage_held_of_lives": {"pid": ["1"], "since": ["0"], "beside": ["a-segment"], "days": ["2026-01-01"]},
    "usage_held_discard": {"segment": ["a-segment"], "held": [Jsonb({})]},
    "usage_held_expire": {"before": datetime.now(UTC)},
    "usage_rollups_repair_hourly": {"day": datetime.now(UTC)},
    "usage_rollups_repair_daily": {"day": datetime.now(UTC)},
    "usage_correction_insert": {"details": Jsonb({})},
    "usage_segments_named": {"segments": ["a-segment"]},
    "usage_watermark_set": {"complete_until": datetime.now(UTC)},
    "usage_known": {"request_id": [uuid4()], "first": uuid4(), "last": uuid4()},
    "usage_days_dropped": {"days": [datetime.now(UTC).date()]},
    "usage_segments_expire": {"before": datetime.now(UTC)},
    "usage_segment_insert": {
        "segment": ["a-segment"],
        "by_day": [Jsonb({})],
        "held": [Jsonb({})],
        **{name: [1] for name in ("events", "inserted", "duplicates", "quarantined", "corrupt_bytes")},
    },
    "usage_quarantine_insert": {
        "request_id": [uuid4()],
        "tenant_id": ["acme"],
        "reason": ["why"],
        "event": [Jsonb({})],
    },
    "backup_insert": {"ts": datetime.now(UTC)},
    "retention_tenants": {"after": "acme"},
    "strays_of": {"keys": ["k"], "tenant_ids": ["acme"], "deleted_days": 1},
    "retention_lock_backups": {"tenant_ids": ["acme"]},
    "retention_rows": {"tenant_ids": ["acme"]},
    "backups_mark_deleting": {"backup_ids": [uuid4()], "reasons": ["why"]},
    "backups_deleting": {"after": uuid4()},
    "backup_hold": {"until": datetime.now(UTC)},
    "quota_usage": {"segments": ["a-segment"]},
    **{
        name: dict.fromkeys(("shard", "made", "skipped", "failed"), 0) | {"shards": 1}
        for name in ("fleet_run_begin", "fleet_run_finish", "fleet_run_newest")
    },
    "fleet_tenants": {"tenant_ids": ["acme"]},
    "action_put": {
        "action_id": uuid4(),
        **dict.fromkeys(("arguments", "before", "after", "undo"), Jsonb({})),
        **dict.fromkeys(("dry_run", "verified"), True),
        **dict.fromkeys(("begun_at", "finished_at", "expires_at"), datetime.now(UTC)),
        "ttl_seconds": 1.5,
    },
    "action_get": {"action_id": uuid4()},
    "tenant_standings": {"since": "7"},
    "actions_lock": {"lock": 1},
    "tenant_deletion_begin": {"inventory": Jsonb({}), "deletion_id": uuid4(), "keep_backups": False},
    "tenant_deletion_finish": {"deletion_id": uuid4(), "erased": True},
    "drill_points": {"tenant_ids": ["acme"]},
    "restore_source": {"source_at": datetime.now(UTC)},
    "copy_drill_insert": {"generation": 1, "txid": 1, "age_seconds": 1.5},
    "drill_insert": dict.fromkeys(("download_ms", "decrypt_ms", "verify_ms", "smoke_ms", "sentinel_age_seconds"), 1.5),
    "backups_of_flow_run": {"tenant_ids": ["acme"]},
    "backup_mark": {
        "tenant_ids": ["acme"],
        "backup_ids": [uuid4()],
        "fingerprints": ["seen"],
        "checked_at": [datetime.now(UTC)],
    },
}


def example(query: str, name: str) -> object:
    return OF_QUERY.get(query, {}).get(name, EXAMPLES.get(name, "text"))


@pytest.mark.parametrize("name", sorted(queries()))
def test_every_named_query_is_understood_by_postgresql(core_control_plane: ControlPlane, name: str) -> None:
    """A column renamed in the schema fails here, not at three in the morning."""
    sql = queries()[name]
    parameters = {found: example(name, found) for found in re.findall(r"%\((\w+)\)[sb]", sql)}
    with core_control_plane.transaction() as connection:
        if re.search("^COPY ", sql, re.MULTILINE):  # has no plan: run with no rows
            module.copy(connection, name, Batch.of([]).copy_rows())
        else:
            assert connection.execute(f"EXPLAIN {sql}", parameters).fetchall()  # type: ignore[arg-type]


def test_every_query_in_the_file_is_loaded_under_its_own_name() -> None:
    """A name with a typo in its marker line would vanish into the query above it."""
    text = (resources.files("shared") / "sql" / "queries.sql").read_text()
    names = re.findall(r"^-- name: (\w+)$", text, re.MULTILINE)
    assert sorted(names) == sorted(queries())
    assert all(set(name) <= set(string.ascii_lowercase + "_") for name in names)


def test_loading_two_queries_of_one_name_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loader itself refuses."""
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "queries.sql").write_text("-- name: a\nSELECT 1;\n-- name: a\nSELECT 2;\n")
    monkeypatch.setattr(module.resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="a"):
        queries.__wrapped__()


@pytest.fixture
def empty(new_database: Callable[[], str], tmp_path: Path) -> ControlPlane:
    return ControlPlane(settings_in(tmp_path, new_database()))


def test_migrating_twice_applies_once(empty: ControlPlane) -> None:
    """Every start may migrate."""
    with empty:
        first = empty.migrate()
        assert first == sorted(first)
        assert first
        assert empty.migrate() == []


def test_migrating_at_once_from_many_processes_applies_each_file_once(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    """Several machines deploy at the same moment."""
    url, applied, failed = new_database(), [], []

    def run() -> None:
        try:
            with ControlPlane(settings_in(tmp_path, url)) as control_plane:
                applied.extend(control_plane.migrate())
        except Exception as e:  # noqa: BLE001
            failed.append(e)

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert applied == sorted(set(applied))


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE schema_migrations SET sha256 = 'other'", "changed"),
        ("INSERT INTO schema_migrations (name, sha256) VALUES ('9999_future.sql', 'x')", "9999_future.sql"),
    ],
)
def test_a_changed_or_unknown_migration_is_refused(empty: ControlPlane, statement: str, says: str) -> None:
    """An edited history or a newer build's database must stop an older build."""
    with empty:
        empty.migrate()
        with empty.transaction() as connection:
            connection.execute(statement)  # type: ignore[arg-type]
        with pytest.raises(Permanent, match=says):
            empty.migrate()


def test_a_migration_that_fails_leaves_nothing_behind(
    empty: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All files are one transaction: a half-migrated control plane does not exist."""
    (tmp_path / "sql" / "schema").mkdir(parents=True)
    (tmp_path / "sql" / "schema" / "0001_a.sql").write_text("CREATE TABLE a (x int); CREATE TABLE b (x int);")
    (tmp_path / "sql" / "schema" / "0002_b.sql").write_text("CREATE TABLE b (x int);")
    monkeypatch.setattr(module.resources, "files", lambda _: tmp_path)
    with empty:
        with pytest.raises(psycopg.errors.DuplicateTable):
            empty.migrate()
        with empty.transaction() as connection:
            tables = connection.execute("SELECT 1 FROM pg_tables WHERE schemaname = 'public'").fetchall()
        assert tables == []


def test_a_transaction_rolls_back_on_an_exception(empty: ControlPlane) -> None:
    """Half of a drain must not stay."""
    with empty:
        empty.migrate()
        with pytest.raises(KeyError), empty.transaction() as connection:
            module.rows(connection, "tenant_insert", tenant_id="t", plan_id="p", schema_version=1, machine_id="m")
            raise KeyError
        assert empty.rows("tenant_list") == []


def test_a_server_that_is_down_is_unavailable(tmp_path: Path) -> None:
    """Transient by name: flows retry, the gateway answers 503."""
    settings = settings_in(tmp_path, "postgresql://u:hunter2@127.0.0.1:1/d", control_plane_connect_timeout_seconds=0.3)
    with ControlPlane(settings) as control_plane:
        for call in (control_plane.ping, control_plane.migrate, lambda: control_plane.rows("tenant_list")):
            with pytest.raises(ControlPlaneUnavailable) as caught:
                call()
            assert "hunter2" not in str(caught.value)


def test_a_connection_that_dies_is_unavailable_and_the_next_call_works(empty: ControlPlane) -> None:
    """A failover of PostgreSQL costs one try, not the process."""
    with empty:
        empty.ping()
        with pytest.raises(ControlPlaneUnavailable), empty.transaction() as connection:
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        empty.ping()


@pytest.mark.skipif(sys.platform != "linux", reason="names of socket options")
def test_a_host_that_vanished_without_a_word_is_given_up_within_a_minute(empty: ControlPlane) -> None:
    """A failover sends no reset: the drain would wait two hours for an answer while the new server stands ready."""
    with empty, empty.transaction() as connection, socket.socket(fileno=os.dup(connection.fileno())) as wire:
        idle, every, times, unanswered_ms = (
            wire.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert idle + every * times <= 60
    assert 0 < unanswered_ms <= 60_000


def test_a_statement_that_runs_too_long_is_cut(new_database: Callable[[], str], tmp_path: Path) -> None:
    """One stuck query must not hold the pool for ever."""
    settings = settings_in(tmp_path, new_database(), control_plane_statement_timeout_seconds=1)
    with ControlPlane(settings) as control_plane:
        with pytest.raises(ControlPlaneUnavailable), control_plane.transaction() as connection:
            connection.execute("SELECT pg_sleep(30)")
        control_plane.ping()


def test_statements_sent_together_are_one_transaction(
    new_database: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round trip they must be cut, fail and be undone as they are one by one."""
    said = {"make": "CREATE TABLE seen (n int PRIMARY KEY)", "put": "INSERT INTO seen VALUES (%(n)s)"}
    said |= {"all": "SELECT n FROM seen ORDER BY n", "sleep": "SELECT pg_sleep(%(seconds)s)"}
    monkeypatch.setattr(module, "queries", lambda: said)
    settings = settings_in(tmp_path, new_database(), control_plane_statement_timeout_seconds=1)
    with ControlPlane(settings) as control_plane:
        assert control_plane.rows("make") == []
        made = control_plane.together(("put", {"n": 1}), ("put", {"n": 2}), ("all", {}))
        assert made == [[], [], [{"n": 1}, {"n": 2}]]
        with pytest.raises(psycopg.errors.UniqueViolation):
            control_plane.together(("put", {"n": 3}), ("put", {"n": 1}), ("all", {}))
        with pytest.raises(ControlPlaneUnavailable, match="statement timeout"):
            control_plane.together(("put", {"n": 4}), ("sleep", {"seconds": 60}))
        assert control_plane.rows("all") == [{"n": 1}, {"n": 2}]


def test_a_wrong_statement_stays_psycopgs_error(empty: ControlPlane) -> None:
    """A bug must not look like a server that is away: it would be retried for ever."""
    with empty, pytest.raises(psycopg.errors.UndefinedTable):
        empty.rows("tenant_list")
