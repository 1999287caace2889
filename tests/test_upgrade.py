"""From the first release to this build with data, and no way back.

`tests/first_release/` is what the first build that ran whole left behind (commit 1672b69: control plane schema 0001,
tenant schema 1), made by running it: two tenants, one suspended; two backups; a restore, a restore test; usage of two
days with an event set aside, and a segment that was not drained. `control_plane.json` has every row, table by table.
"""

from __future__ import annotations

import json
import re
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from shared import control_plane as module
from shared import plan as planning
from shared import reconcile, registry, snapshot, usage_report
from shared.control_plane import ControlPlane
from shared.engine import memories, schema
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.engine.search import search
from shared.errors import Permanent, SchemaTooNew
from shared.objects import ObjectStore
from shared.usage import Counters
from tests.core_fixtures import ROOT, World, contents_of, settings_in
from tests.environment_fixtures import engram
from tests.metering_fixtures import drain
from tests.restore_fixtures import perform

pytest_plugins = ("tests.core_fixtures",)

FIRST = Path(__file__).parent / "first_release"
ROWS: dict[str, list[dict[str, Any]]] = json.loads((FIRST / "control_plane.json").read_text())
KEPT = ["a thing worth keeping", "the café opens at nine"]  # in the old backup
LIVE = [*KEPT, "written after the restore"]
NEXT = (
    "CREATE TABLE added (seq INTEGER PRIMARY KEY, x TEXT) STRICT;\nINSERT INTO added SELECT seq, content FROM memories;"
)


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    """The first release's control plane with its rows, not migrated."""
    made = new_database()
    with psycopg.connect(made) as connection:
        connection.execute(
            "CREATE TABLE schema_migrations (name text PRIMARY KEY, sha256 text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        connection.execute((FIRST / "0001_control_plane.sql").read_bytes())
        for table, rows in ROWS.items():
            insert = sql.SQL(
                "INSERT INTO {0} OVERRIDING SYSTEM VALUE SELECT * FROM jsonb_populate_recordset(NULL::{0}, %s)"
            )
            connection.execute(insert.format(sql.Identifier(table)), (Jsonb(rows),))
    return made


@pytest.fixture
def old(url: str, tmp_path: Path) -> Iterator[World]:
    """The machine of the first release, as this build finds it. Its events stay billable, however long ago."""
    with tarfile.open(FIRST / "data.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    settings = settings_in(tmp_path, url, machine_id="first", usage_retention_days=36_500)
    with ControlPlane(settings) as control_plane:
        yield World(settings, control_plane, ObjectStore(settings), "acme")


@pytest.fixture
def upgraded(old: World) -> World:
    old.control_plane.migrate()
    return old


@pytest.fixture
def first_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build that knows only the first release's migrations."""
    directory = tmp_path / "build" / "sql" / "schema"
    directory.mkdir(parents=True)
    (directory / "0001_control_plane.sql").write_bytes((FIRST / "0001_control_plane.sql").read_bytes())
    monkeypatch.setattr(module.resources, "files", lambda _: tmp_path / "build")


@pytest.fixture
def next_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build whose tenant schema is one further; `undo()` is going back to this one."""
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, NEXT))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    return monkeypatch


def searched(world: World, query: str) -> list[str]:
    with closing(TenantDatabase(world.paths)) as tenant, tenant.read() as connection:
        return [hit.memory.content for hit in search(connection, query, limit=10)]


def one_line(error: BaseException | str) -> str:
    text = str(error)
    assert text and len(text.splitlines()) == 1
    return text


# --- the control plane ---


def test_the_frozen_schema_is_the_one_this_build_starts_from(old: World) -> None:
    """An edited first migration would refuse every control plane there is."""
    applied = old.control_plane.migrate()
    assert applied and "0001_control_plane.sql" not in applied
    assert old.control_plane.migrate() == []


def test_every_row_of_the_first_release_is_kept_as_it_was(upgraded: World) -> None:
    """Tenants, catalogue, restores, drills and usage, column by column. The epoch of a lease never goes back."""
    with psycopg.connect(upgraded.settings.control_plane_url.get_secret_value()) as connection:
        for table, rows in ROWS.items():
            name = sql.Identifier(table)
            found = [r[0] for r in connection.execute(sql.SQL("SELECT to_jsonb(x) FROM {} x").format(name))]
            for row in rows:
                assert any(row.items() <= now.items() for now in found), (table, row)
            assert len(found) == len(rows) or table in ("schema_migrations", "usage_quarantine"), table
    states = {t.tenant_id: t.state for t in registry.list_all(upgraded.control_plane)}
    assert states == {"acme": "active", "quiet": "suspended"}


def test_usage_from_before_and_after_is_one_bill_and_the_books_agree(upgraded: World) -> None:
    """Segments that the first release wrote and did not drain are billed by this one, once."""
    days = sorted(datetime.fromisoformat(row["bucket"]) for row in ROWS["usage_daily"])
    window = (days[0], datetime.now(UTC))

    def bill() -> Counters:
        found = usage_report.read(upgraded.control_plane, upgraded.settings, "acme", *window, "day")
        return found.totals

    before = bill()
    assert before == Counters(12, 6, 6)
    [drained] = drain(upgraded.control_plane, upgraded.settings)
    assert (drained.events, drained.inserted) == (4, 4)
    assert bill() == Counters(16, 10, 6)
    books = reconcile.reconcile(upgraded.control_plane, upgraded.settings, days[0].date(), days[-1].date())
    assert books.agree, books.where()


def test_an_older_build_refuses_a_newer_control_plane_with_one_line(
    upgraded: World, first_build: None, tmp_path: Path
) -> None:
    """It would write rows without what the newer one counts on. Nothing is changed by trying."""
    with pytest.raises(Permanent, match=r"migrations this build does not know: 0002_plans\.sql") as refused:
        upgraded.control_plane.migrate()
    one_line(refused.value)
    url = upgraded.settings.control_plane_url.get_secret_value()
    done = engram("migrate", ENGRAM_CONTROL_PLANE_URL=url, ENGRAM_DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "0002_plans.sql" in one_line(done.stderr.strip())


def test_every_query_of_the_first_release_still_works(upgraded: World) -> None:
    """Processes are replaced one by one, after the migration, and an older one that restarts meanwhile must come back:
    what it reads is there, and what it writes lacks nothing."""
    url = upgraded.settings.control_plane_url.get_secret_value()
    parts = re.split(r"^-- name: (\w+)\n", (FIRST / "queries.sql").read_text(), flags=re.MULTILINE)[1:]
    with psycopg.connect(url) as connection:
        for name, statement in zip(parts[::2], parts[1::2], strict=True):
            numbers: dict[str, int] = {}
            text = re.sub(r"%\((\w+)\)\w", lambda m: f"${numbers.setdefault(m[1], len(numbers) + 1)}", statement)  # noqa: B023
            assert connection.execute(f"EXPLAIN (GENERIC_PLAN) {text.replace('%%', '%')}".encode()).fetchall(), name
        older = [table for table in ROWS if table != "schema_migrations"]
        columns = connection.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_name = ANY (%s)"
            " AND is_nullable = 'NO' AND column_default IS NULL AND is_identity = 'NO'",
            (older,),
        ).fetchall()
    demanded = [f"{table}.{column}" for table, column in columns if not all(column in row for row in ROWS[table])]
    assert demanded == []


def test_migrations_only_add() -> None:
    """Or an older process beside a newer control plane would fail. A table made anew under its name is an addition."""
    taken = re.compile(r"\b(DROP (TABLE|COLUMN|VIEW|FUNCTION)|RENAME|SET NOT NULL|ALTER COLUMN \w+ (SET DATA )?TYPE)\b")
    found = {
        file.name
        for file in (ROOT / "shared" / "sql" / "schema").iterdir()
        if taken.search(re.sub("--.*", "", file.read_text()))
    }
    assert found == {"0003_usage_partitions.sql"}


def test_this_build_says_what_to_do_about_an_older_control_plane(old: World, tmp_path: Path) -> None:
    """Whoever forgot to migrate is told so in one line, by any command that finds something missing."""
    url = old.settings.control_plane_url.get_secret_value()
    variables = {"ENGRAM_CONTROL_PLANE_URL": url, "ENGRAM_DATA_DIR": str(tmp_path), "ENGRAM_MACHINE_ID": "first"}
    done = engram("keys", "list", "acme", **variables)
    assert done.returncode == 1 and "run `engram migrate`" in one_line(done.stderr.strip())
    assert engram("migrate", **variables).returncode == 0
    assert engram("keys", "list", "acme", **variables).returncode == 0


# --- tenants ---


def test_a_tenant_of_the_first_release_is_read_searched_written_and_backed_up(upgraded: World) -> None:
    """What it holds is what clients had, and everything a client does works on it."""
    assert upgraded.rows() == LIVE
    assert searched(upgraded, "cafe") == ["the café opens at nine"]
    upgraded.write("by this build")
    assert searched(upgraded, "build") == ["by this build"]
    made = upgraded.back_up()
    assert made.schema_version == schema.SCHEMA_VERSION and made.manifest["memories"] == len(LIVE) + 1


def test_a_backup_of_the_first_release_is_restored_and_what_was_live_is_kept_beside_it(upgraded: World) -> None:
    """The catalogue's oldest row is still a promise."""
    [old_backup] = [row for row in ROWS["backups"] if row["tenant_id"] == "acme"]
    chosen = planning.plan(upgraded.settings, upgraded.control_plane, "acme", backup_id=old_backup["backup_id"])
    assert chosen.backup is not None and chosen.backup.sha256 == old_backup["sha256"]
    perform(upgraded, chosen.backup)
    assert upgraded.rows() == KEPT
    assert contents_of(upgraded.paths.backup) == LIVE
    upgraded.write("after it")
    assert searched(upgraded, "keeping OR after") and upgraded.rows() == [*KEPT, "after it"]


def test_a_tenant_is_brought_to_the_next_schema_by_its_first_use_with_its_data(
    upgraded: World, next_build: pytest.MonkeyPatch
) -> None:
    """There is one tenant schema so far: this is how the next one will meet the files of the first."""
    assert searched(upgraded, "keeping") == ["a thing worth keeping"]
    upgraded.write("by the next build")
    with closing(sqlite3.connect(upgraded.paths.database)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA_VERSION,)
        assert [x for (x,) in connection.execute("SELECT x FROM added ORDER BY seq")] == LIVE
    [old_backup] = [row for row in ROWS["backups"] if row["tenant_id"] == "acme"]
    chosen = planning.plan(upgraded.settings, upgraded.control_plane, "acme", backup_id=old_backup["backup_id"])
    perform(upgraded, chosen.backup)
    with closing(sqlite3.connect(upgraded.paths.database)) as connection:
        assert [x for (x,) in connection.execute("SELECT x FROM added ORDER BY seq")] == KEPT


def test_an_older_build_refuses_a_newer_tenant_and_its_backups_and_changes_nothing(
    upgraded: World, next_build: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line that names both versions, from every door, and the newer build goes on where it was."""
    upgraded.write("by the next build")
    newer = upgraded.back_up()
    next_build.undo()
    before = upgraded.paths.database.read_bytes()

    def write() -> None:
        upgraded.write("by the older build")

    def take() -> None:
        snapshot.take(upgraded.settings, "acme", tmp_path / "taken.sqlite")

    def restore() -> None:
        perform(upgraded, newer)

    for door in (lambda: searched(upgraded, "keeping"), write, take, restore):
        with pytest.raises(SchemaTooNew) as refused:
            door()
        said = one_line(refused.value)
        assert str(schema.SCHEMA_VERSION + 1) in said and str(schema.SCHEMA_VERSION) in said, said
    assert upgraded.paths.database.read_bytes() == before and upgraded.lease_holder() is None
    next_build.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, NEXT))
    next_build.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    assert upgraded.rows() == [*LIVE, "by the next build"]


def test_a_new_tenant_and_one_of_the_first_release_have_the_same_schema(upgraded: World) -> None:
    """Two histories must not be two products."""
    registry.create(upgraded.control_plane, upgraded.settings, "new")
    new = World(upgraded.settings, upgraded.control_plane, upgraded.objects, "new")
    with closing(TenantDatabase(new.paths)) as tenant, tenant.write() as connection:
        memories.create(connection, NewMemory("first of it"))

    def shape(world: World) -> list[tuple[str, str]]:
        with closing(sqlite3.connect(world.paths.database)) as connection:
            return connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()

    assert shape(new) == shape(upgraded)
