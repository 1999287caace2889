"""The checks of a diagnosis on real parts that are really broken, and what is proposed for each."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from shared import fence, registry, stuck
from shared.diagnosis import books, check, edge, played, sight, store, tenant
from shared.diagnosis.check import CHECKS, Check
from shared.diagnosis.finding import SUBJECTS, Finding, good
from shared.diagnosis.sight import Figures, Sight
from shared.engine.schema import SCHEMA_VERSION
from shared.fence import RestoreMutex
from shared.settings import Settings
from tests.core_fixtures import World, event
from tests.gateway_stack import Stack, new_key, stack  # noqa: F401
from tests.metering_fixtures import segment

pytest_plugins = ("tests.core_fixtures",)
NOWHERE = "http://127.0.0.1:9"
NO_GATEWAY = {"gateway_port": 9}
diagnosis = partial(check.diagnose, sample_seconds=0.4)


@pytest.fixture
def running(stack: Stack) -> Settings:  # noqa: F811
    """Of the real gateway of this session, as `engram diagnose` would have them."""
    port = urlsplit(stack.gateway.url).port
    return stack.settings.model_copy(update={"gateway_port": port, "jwks_url": stack.issuer.url})


@contextmanager
def seen(world: World, tenant_id: str | None = "") -> Iterator[Sight]:
    """The world's tenant named, unless it is said otherwise."""
    with Sight(world.settings, world.tenant_id if tenant_id == "" else tenant_id) as opened:
        yield opened


def database_finding(world: World, tenant_id: str | None = "") -> Finding:
    with seen(world, tenant_id) as opened:
        return next(f for f in tenant.databases(opened) if f.name == "database")


def content(path: Path) -> dict[str, tuple[int, str, int]]:
    """Every file below a directory, with what a check must not change. A -shm and an empty -wal hold no data: SQLite
    makes them for whoever opens a database, and leaves them when that is a reader."""
    return {
        str(p.relative_to(path)): (p.lstat().st_mtime_ns, stat.filemode(p.lstat().st_mode), p.lstat().st_size)
        for p in sorted(path.rglob("*"))
        if p.is_file() and not p.name.endswith("-shm") and not (p.name.endswith("-wal") and p.stat().st_size == 0)
    }


def test_a_whole_database_is_normal_and_looking_changed_nothing(world: World) -> None:
    """A diagnosis may run at any time, by itself, a hundred times."""
    world.write("one", "two")
    before = content(world.paths.root)
    assert database_finding(world).ok
    assert database_finding(world, None).ok is not None
    with seen(world) as opened:
        assert tenant.maintenance(opened).ok
    assert content(world.paths.root) == before


def overwrite(world: World) -> None:
    with open(os.path.realpath(world.paths.database), "r+b") as file:
        file.write(b"not a database. " * 256)


def tear(world: World) -> None:
    """A page in the middle: the file opens, and only reading it whole finds it."""
    world.write(*("x" * 3_000 for _ in range(40)))
    file = Path(os.path.realpath(world.paths.database))
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("r+b") as opened:
        opened.seek(4096 * 20)
        opened.write(b"\xff" * 4096 * 4)


@pytest.mark.parametrize("damage", [overwrite, tear])
def test_a_corrupt_database_leads_to_the_restore_of_its_newest_backup(world: World, damage: object) -> None:
    """The one destructive proposal there is; it names the backup, and only a person sends it."""
    world.write("kept")
    backup = world.back_up()
    damage(world)  # type: ignore[operator]
    seen_ = diagnosis(world.settings.model_copy(update=NO_GATEWAY), "tenant-db", world.tenant_id).findings
    found = check.conclude(world.settings, "tenant-db", world.tenant_id, without_gateway(seen_))
    assert found.proposal is not None
    assert (found.proposal.action, found.proposal.destructive) == ("restore", True)
    assert found.proposal.parameters["backup_id"] == str(backup.backup_id)
    assert found.proposal.command.startswith(f"engram restore {world.tenant_id} --backup {backup.backup_id}")


def without_gateway(findings: list[Finding]) -> list[Finding]:
    """There is none in these tests, and that would come first."""
    return [f for f in findings if f.symptom not in ("gateway_down", "not_seen")]


def test_without_a_name_the_broken_one_of_many_is_found(world: World) -> None:
    """An alert names no tenant: metrics have none."""
    machine = world.settings.model_copy(update={"machine_id": f"m-{world.tenant_id}"})
    with world.control_plane.transaction() as connection:
        connection.execute(
            "UPDATE tenants SET machine_id = %s WHERE tenant_id = %s", (machine.machine_id, world.tenant_id)
        )
    overwrite(world)
    with Sight(machine) as opened:
        [found] = tenant.databases(opened)
    assert (found.ok, found.symptom, found.facts["tenant_id"]) == (False, "database_corrupt", world.tenant_id)


def test_a_missing_a_newer_and_an_unreadable_database_are_told_apart(world: World) -> None:
    """Each wants something else, and a restore over a newer schema would lose what the newer build wrote."""
    file = Path(os.path.realpath(world.paths.database))
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    assert database_finding(world).symptom == "schema_too_new"
    file.unlink()
    assert database_finding(world).symptom == "database_missing"
    file.mkdir()
    assert database_finding(world).symptom == "database_unreadable"


def test_a_wrong_mode_is_mended_rather_than_restored(world: World) -> None:
    """Somebody's chmod must not cost anybody what was written since the backup."""
    os.chmod(os.path.realpath(world.paths.database), 0o666)
    with seen(world) as opened:
        [found] = played.permission(opened)
    assert (found.ok, found.symptom) == (False, "permissions_wrong")


def test_a_dead_restore_is_swept_and_a_living_one_is_waited_for(world: World) -> None:
    """What tells them apart is the kernel's lock, looked up without taking it: a restore about to begin never fails."""
    mark = fence.Mark(world.tenant_id, "restore 1", 1, 1, 2, time.time())
    fence.Fence(world.paths, mark).raise_(1.0)
    with seen(world) as opened:
        assert tenant.maintenance(opened).symptom == "restore_left"
        mutex = RestoreMutex(world.paths)
        try:
            assert tenant.maintenance(opened).symptom == "in_maintenance"
        finally:
            mutex.release()


def test_a_lease_without_a_trace_on_this_disk_is_found_by_its_row(world: World) -> None:
    """A restore that could not reach PostgreSQL at its end leaves just that."""
    world.control_plane.row(
        "lease_acquire", tenant_id=world.tenant_id, holder="restore 2", reason="r", lease_seconds=60
    )
    with seen(world) as opened:
        assert tenant.maintenance(opened).symptom == "restore_left"


def test_without_postgres_that_is_the_finding_and_the_disk_is_still_looked_at(world: World) -> None:
    """The machine's own files need nobody to be asked."""
    down = NO_GATEWAY | {
        "control_plane_url": SecretStr("postgresql://127.0.0.1:9/x"),
        "control_plane_connect_timeout_seconds": 1.0,
    }
    overwrite(world)
    found = diagnosis(world.settings.model_copy(update=down), "tenant-db")
    by_name = {f.name: f for f in found.findings}
    assert by_name["control-plane"].symptom == "control_plane_down"
    assert by_name["database"].symptom == "database_corrupt"
    assert found.proposal is not None
    assert found.proposal.command == "engram status"


def test_the_spool_shows_what_waits_what_is_stuck_and_what_is_damaged(world: World) -> None:
    """Usage is money: late, stuck and damaged are three different things to do."""
    settings = world.settings
    segment(settings, [event(world.tenant_id)])
    old = settings.spool_dir / f"{int((time.time() - 3600) * 1e6)}-1-abcd.seg"
    next(settings.spool_dir.glob("*.seg")).rename(old)
    stuck.put(segment(settings, [event(world.tenant_id)]), RuntimeError("why"))
    (settings.spool_dir / "quarantine").mkdir()
    (settings.spool_dir / "quarantine" / "x.bad").write_bytes(b"@0 1\nx\n")
    with seen(world) as opened:
        found = {f.name: f.symptom for f in books.spool(opened)}
    assert found == {
        "spool-age": "usage_late",
        "spool-size": "",
        "stuck-segments": "segments_stuck",
        "quarantined-segments": "segments_quarantined",
    }


def test_a_tenant_whose_newest_backup_is_corrupt_or_too_old_is_backed_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has a good one again, the corrupt row that is kept for whoever looks into it is no reason any more. A
    tenant that is asked for by name is looked at, however many others are worse."""
    backup = world.back_up()
    with seen(world) as opened:
        assert store.corrupt(opened).ok
        assert store.ages(opened).ok
        world.control_plane.execute("backup_found_corrupt", backup_id=backup.backup_id, reason="test")
        found = store.corrupt(opened)
        assert (found.symptom, found.facts["tenants"]) == ("backups_corrupt", [world.tenant_id])
        world.back_up()
        assert store.corrupt(opened).ok
    stale = world.settings.model_copy(update={"backup_stale_hours": 1e-9})
    registry.create(world.control_plane, world.settings, f"{world.tenant_id}-never")
    world.back_up()
    monkeypatch.setattr(store, "_LISTED", 1)
    with Sight(stale, world.tenant_id) as opened:
        found = store.ages(opened)
    assert (found.symptom, found.facts["tenants"]) == ("backups_stale", [world.tenant_id])


@pytest.mark.parametrize(
    ("url", "symptom"),
    [("file:///nowhere/at/all", "store_down"), ("s3://bucket/prefix", "store_down")],
)
def test_an_object_store_that_is_away_is_said_within_seconds(world: World, url: str, symptom: str) -> None:
    """A backup has the patience of minutes; whoever waits for a diagnosis has not."""
    away = {
        "object_store_url": url,
        "s3_endpoint": NOWHERE,
        "s3_access_key_id": "x",
        "s3_secret_access_key": SecretStr("x"),
    }
    with Sight(world.settings.model_copy(update=away)) as opened:
        assert store.reachable(opened).symptom == symptom


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_check_can_look_at_a_running_gateway(running: Settings, subject: str) -> None:
    """A check that never sees anything is no check: with everything up none may say "not seen"."""
    found = diagnosis(running, subject)  # type: ignore[arg-type]
    assert [f for f in found.findings if f.ok is None] == []
    assert len(found.findings) >= len(CHECKS[subject]) - 1, "all but Prometheus, which is not configured"  # type: ignore[index]


def test_tokens_of_a_key_nobody_has_lead_to_a_refresh_of_the_keys(running: Settings, stack: Stack) -> None:  # noqa: F811
    """Seen in the gateway's counters while it happens, without Prometheus."""
    stop = threading.Event()
    headers = {"Authorization": f"Bearer {stack.issuer.token(stack.tenant(), key=new_key('ES256'))}"}

    def knock() -> None:
        with httpx.Client(base_url=stack.gateway.url, headers=headers) as client:
            while not stop.wait(0.02):
                client.get("/v1/memories")

    knocking = threading.Thread(target=knock)
    knocking.start()
    try:
        found = check.diagnose(running, "auth", sample_seconds=1.5)
    finally:
        stop.set()
        knocking.join()
    assert {f.name: f.symptom for f in found.findings}["auth-failures"] == "keys_unknown"
    assert found.proposal is not None
    assert found.proposal.action == "refresh-jwks"


def test_an_issuer_that_is_down_comes_before_its_unknown_keys(running: Settings) -> None:
    """A refresh would only fail."""
    found = diagnosis(running.model_copy(update={"jwks_url": f"{NOWHERE}/jwks.json"}), "auth")
    assert found.proposal is not None
    assert found.proposal.action == "jwks-status"
    assert not found.healthy


def test_a_gateway_that_is_down_is_a_finding_and_what_it_would_have_said_is_not_seen(tmp_path: Path) -> None:
    """Nothing of it may look green, and nothing may crash."""
    found = diagnosis(Settings(data_dir=tmp_path, gateway_port=9), "latency")
    assert {f.name: f.ok for f in found.findings}["gateway"] is False
    assert {f.ok for f in found.findings if f.name in ("latency", "errors", "workers")} == {None}
    assert found.proposal is not None
    assert found.proposal.command == "engram status"


def test_a_prometheus_that_does_not_answer_is_said_and_the_counters_are_read_instead(running: Settings) -> None:
    """Monitoring may be what is broken."""
    found = diagnosis(running.model_copy(update={"prometheus_url": NOWHERE}), "latency")
    by_name = {f.name: f for f in found.findings}
    assert by_name["prometheus"].ok is None
    assert by_name["errors"].ok is not None
    assert re.search(r"last \d+\.\d s", str(by_name["errors"].seen))


def test_a_bug_in_one_check_costs_that_check_alone(tmp_path: Path) -> None:
    """The others' findings are what is needed then."""

    def broken(_: Sight) -> Finding:
        raise ZeroDivisionError("a bug")

    with Sight(Settings(data_dir=tmp_path)) as opened:
        [found] = check.run(Check("broken", broken), opened)
        assert check.run(Check("fine", lambda _: good("fine", 1, "1")), opened) == [good("fine", 1, "1")]
    assert (found.ok, found.symptom, found.name) == (None, "not_seen", "broken")
    assert "a bug" in str(found.seen)


def figures(requests: dict[str, float], **reasons: float) -> Figures:
    """Rates of a window: requests of clients by status, 401 by reason; and a worker that was not ready yet."""
    counted = {frozenset({("status", s), ("route", "/v1/search")}): rps for s, rps in requests.items()}
    rates = {
        "engram_requests_total": counted | {frozenset({("status", "503"), ("route", "/ready")}): 50.0},
        "engram_auth_failures_total": {frozenset({("reason", r)}): rps for r, rps in reasons.items()},
    }
    return Figures("last 10 min", lambda metric: rates.get(metric, {}), {})


class Rates(Sight):
    """A sight whose figures are given."""

    def __init__(self, settings: Settings, given: Figures) -> None:
        super().__init__(settings)
        self._figures = given  # instead of those it would sample


@pytest.mark.parametrize(
    ("requests", "reasons", "symptom"),
    [
        ({"200": 100.0, "401": 1.0}, {"expired": 1.0}, ""),
        ({"200": 100.0, "401": 30.0}, {"expired": 10.0, "audience": 12.0, "unknown_kid": 8.0}, "tokens_refused"),
        ({"200": 100.0, "401": 30.0}, {"missing": 30.0}, "tokens_missing"),
        ({"200": 100.0, "401": 30.0}, {"signature": 30.0}, "keys_unknown"),
        ({"401": 0.01}, {"expired": 0.01}, ""),
        ({}, {}, ""),
    ],
)
def test_the_reason_that_fails_most_says_what_is_wrong(
    tmp_path: Path, requests: dict[str, float], reasons: dict[str, float], symptom: str
) -> None:
    """One expired token in a hundred is a client's matter, and so is one on an idle night."""
    given = figures(requests, **reasons)
    assert edge.auth_failures(Rates(Settings(data_dir=tmp_path), given)).symptom == symptom


@pytest.mark.parametrize(("failed", "symptom"), [(0.0, ""), (0.9, ""), (1.2, "errors")])
def test_more_than_one_error_in_a_hundred_is_not_normal(tmp_path: Path, failed: float, symptom: str) -> None:
    """The same border as the alert's."""
    given = figures({"200": 100.0 - failed, "503": failed})
    assert edge.errors(Rates(Settings(data_dir=tmp_path), given)).symptom == symptom


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ([], None),
        ([(0.1, 0.0), (float("inf"), 0.0)], None),
        ([(0.1, 100.0), (float("inf"), 100.0)], 0.095),
        ([(0.1, 90.0), (0.2, 100.0), (float("inf"), 100.0)], 0.15),
        ([(0.1, 90.0), (float("inf"), 100.0)], 0.1),
    ],
)
def test_a_quantile_is_what_prometheus_would_say(buckets: list[tuple[float, float]], expected: float | None) -> None:
    """The alert and the diagnosis must not disagree about a p95: histogram_quantile interpolates within a bucket."""
    found = sight.quantile(0.95, buckets)
    assert found == (None if expected is None else pytest.approx(expected))
