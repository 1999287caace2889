"""Deletion of backups: whatever dies, lies or is away, a row never promises an object that is gone."""

from __future__ import annotations

import hashlib
import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from psycopg import sql

from shared import catalogue, expiry
from shared.control_plane import Connection, ControlPlane
from shared.errors import ObjectLocked, ObjectStoreUnavailable, UnknownBackup
from shared.expiry import Removed
from shared.ids import new_id
from shared.objects import ObjectStore
from shared.tenant import object_key
from tests.core_fixtures import World, new_world, settings_in

pytest_plugins = ("tests.core_fixtures", "tests.s3_fixtures")

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def own(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    """A tenant alone in its control plane: retention is about all of them."""
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)


def at(world: World, **settings: object) -> World:
    """The same tenant with its objects on S3."""
    url = world.settings.control_plane_url.get_secret_value()
    there = settings_in(world.settings.data_dir, url, object_store_url=f"s3://engram/{world.tenant_id}", **settings)
    return World(there, world.control_plane, ObjectStore(there), world.tenant_id)


def run_sql(world: World, statement: str, *parameters: object) -> list[dict[str, Any]]:
    with world.control_plane.transaction() as connection:
        cursor = connection.execute(sql.SQL(statement), parameters)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def add(world: World, age: timedelta, *, kind: str = "scheduled", status: str = "available") -> UUID:
    """A small object and its row, as old as that."""
    backup_id, ts = new_id(), NOW - age
    key, data = object_key(world.tenant_id, ts, 1), f"{world.tenant_id} {ts}".encode()
    file = world.settings.data_dir / "object"
    file.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    world.objects.put_file(key, file, sha256)
    file.unlink()  # the local store may have linked it
    run_sql(
        world,
        "INSERT INTO backups (backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key, kind,"
        " status, verified_at, created_at) VALUES (%s, %s, %s, 1, %s, %s, %s, %s, %s, %s, now(), %s)",
        *(backup_id, world.tenant_id, ts, len(data), len(data), sha256, key, kind, status, ts),
    )
    return backup_id


def few(world: World) -> tuple[UUID, list[UUID]]:
    """A plan that keeps one; the newest, and three that go."""
    run_sql(
        world,
        "UPDATE plans SET backups_last = 1, backups_daily = 0, backups_weekly = 0, backups_monthly = 0,"
        " backups_yearly = 0",
    )
    kept, *gone = (add(world, n * DAY) for n in range(2, 6))
    return kept, gone


def restoring(world: World, backup_id: UUID) -> None:
    run_sql(
        world,
        "INSERT INTO restores (restore_id, tenant_id, backup_id, kind, state)"
        " VALUES (gen_random_uuid(), %s, %s, 'restore', 'running')",
        *(world.tenant_id, backup_id),
    )


def run(world: World, objects: ObjectStore | None = None, control_plane: ControlPlane | None = None) -> list[Removed]:
    """plan → mark → remove, as the flow does."""
    control_plane = control_plane or world.control_plane
    after: str | None = ""
    while after is not None:
        page = expiry.plan(control_plane, world.settings, after=after, limit=2)
        expiry.mark(control_plane, world.settings, page.planned)
        after = page.after
    return expiry.remove(control_plane, objects or world.objects, world.settings)


def statuses(world: World) -> dict[UUID, str]:
    return {r["backup_id"]: r["status"] for r in run_sql(world, "SELECT backup_id, status FROM backups")}


def check_truth(world: World) -> None:
    """What is choosable is there whole; what is called deleted is gone; the tenant has a good one."""
    rows = run_sql(world, "SELECT key, sha256, status FROM backups")
    for row in rows:
        if row["status"] == "available":
            assert world.objects.sha256(row["key"])[0] == row["sha256"]
        if row["status"] == "deleted":
            assert not world.objects.exists(row["key"])
    assert any(row["status"] == "available" for row in rows)


# --- the plan, and the rows ---


def test_what_has_no_place_goes_with_its_object_and_the_row_stays(own: World) -> None:
    """The row is the record of what was kept, until when and why it went."""
    kept, gone = few(own)
    planned = expiry.plan(own.control_plane, own.settings)
    [of_tenant] = planned.planned
    assert {v.backup_id for v in of_tenant.delete} == set(gone)
    assert statuses(own) == dict.fromkeys([kept, *gone], "available")  # a plan changes nothing
    assert {(r.backup_id, r.outcome) for r in run(own)} == {(b, "deleted") for b in gone}
    assert statuses(own) == {kept: "available", **dict.fromkeys(gone, "deleted")}
    check_truth(own)
    [why] = run_sql(own, "SELECT DISTINCT status_reason AS why FROM backups WHERE status = 'deleted'")
    assert "no place" in why["why"]
    assert run(own) == []


def test_many_tenants_are_planned_in_pages(own: World) -> None:
    """Each with its own plan; one without backups is one line, one of an unknown plan keeps all and says so."""
    few(own)
    run_sql(own, "INSERT INTO plans (plan_id) VALUES ('archive')")
    for n, plan_id in enumerate(("archive", "standard", "unknown")):
        run_sql(
            own,
            "INSERT INTO tenants (tenant_id, plan_id, state, schema_version, machine_id)"
            " VALUES (%s, %s, 'active', 1, 'm')",
            *(f"z{n}", plan_id),
        )
        for days in (2, 3, 4):
            run_sql(
                own,
                "INSERT INTO backups (backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key,"
                " kind, status, verified_at, created_at) SELECT gen_random_uuid(), %s, %s, 1, 1, 1, repeat('a', 64),"
                " gen_random_uuid()::text, 'scheduled', 'available', now(), %s",
                *(f"z{n}", NOW - days * DAY, NOW - days * DAY),
            )
    planned, after = [], ""
    while True:
        page = expiry.plan(own.control_plane, own.settings, after=after, limit=2)
        planned += page.planned
        if page.after is None:
            break
        after = page.after
    found = {p.tenant_id: (len(p.keep), len(p.delete), p.problem is not None) for p in planned}
    assert found == {own.tenant_id: (1, 3, False), "z0": (3, 0, False), "z1": (1, 2, False), "z2": (0, 0, True)}
    assert expiry.mark(own.control_plane, own.settings, [p for p in planned if p.tenant_id == "z2"]) == []


def test_a_running_restore_and_a_hold_keep_theirs(own: World) -> None:
    """A legal hold has no end; a hold is refused for one that is on its way out."""
    _, gone = few(own)
    restoring(own, gone[0])
    run_sql(own, "UPDATE backups SET held_until = 'infinity', hold_reason = 'case 7' WHERE backup_id = %s", gone[1])
    assert [r.backup_id for r in run(own)] == [gone[2]]
    [of_tenant] = expiry.plan(own.control_plane, own.settings).planned
    assert {v.backup_id: v.reason for v in of_tenant.keep if v.backup_id in gone} == {
        gone[0]: "held: a restore is running",
        gone[1]: "held: case 7",
    }
    run_sql(own, "UPDATE restores SET state = 'failed'")
    expiry.hold(own.control_plane, gone[0], NOW + DAY, "a restore test")
    assert run(own) == []
    with pytest.raises(UnknownBackup):
        expiry.hold(own.control_plane, gone[2], NOW + DAY, "too late")
    check_truth(own)


def test_a_deleted_tenants_backups_go_after_their_days(own: World) -> None:
    """All of them, the last good one too: that is what deleting a tenant means."""
    kept, gone = few(own)
    run_sql(own, "UPDATE tenants SET state = 'deleted', updated_at = now() - interval '29 days'")
    assert run(own) == []
    run_sql(own, "UPDATE tenants SET updated_at = now() - interval '31 days'")
    assert {r.backup_id for r in run(own)} == {kept, *gone}
    assert own.objects.keys("tenants") == []


# --- what happens between the plan and the marking, and after it ---


@pytest.mark.parametrize("change", ["corrupt", "restore", "hold"])
def test_the_decision_is_taken_again_where_it_is_carried_out(own: World, change: str) -> None:
    """The newest was found corrupt, an old one restored from, while the fleet was planned."""
    kept, gone = few(own)
    page = expiry.plan(own.control_plane, own.settings)
    if change == "corrupt":
        own.control_plane.execute("backup_mark_corrupt", backup_id=kept)
    elif change == "restore":
        restoring(own, gone[0])
    else:
        expiry.hold(own.control_plane, gone[0], NOW + DAY, "a restore test")
    marked = expiry.mark(own.control_plane, own.settings, page.planned)
    assert set(marked) == set(gone[1:])
    expiry.remove(own.control_plane, own.objects, own.settings)
    check_truth(own)


def test_a_backup_found_corrupt_during_the_marking_waits_for_it_or_is_seen(own: World) -> None:
    """Both orders leave a good one; there is no third."""
    for _ in range(5):
        run_sql(own, "DELETE FROM backups")
        kept, gone = few(own)
        page = expiry.plan(own.control_plane, own.settings)
        together = threading.Barrier(2)

        def corrupt(kept: UUID = kept, together: threading.Barrier = together) -> None:
            together.wait()
            own.control_plane.execute("backup_mark_corrupt", backup_id=kept)

        other = threading.Thread(target=corrupt)
        other.start()
        together.wait()
        expiry.mark(own.control_plane, own.settings, page.planned)
        other.join()
        rows = statuses(own)
        assert rows[kept] == "corrupt"
        assert rows[gone[0]] in ("available", "deleting")
        for removed in expiry.remove(own.control_plane, own.objects, own.settings):
            # Marked first, found corrupt after: read and taken back. These objects are no databases, so as corrupt.
            assert removed.outcome == ("taken back" if rows[gone[0]] == "deleting" else "deleted")


def test_one_that_became_the_only_good_one_is_taken_back(own: World) -> None:
    """The store was away when it was to be removed; a day later the newer one turns out corrupt."""
    own.write("one")
    old = own.back_up()
    own.write("two")
    new = own.back_up()
    few(own)
    run_sql(own, "DELETE FROM backups WHERE sha256 NOT IN (%s, %s)", old.sha256, new.sha256)
    back = datetime.now(UTC) - 3 * DAY
    run_sql(own, "UPDATE backups SET created_at = %s, ts = CASE WHEN backup_id = %s THEN %s ELSE %s END",
            *(back, old.backup_id, back, back + DAY))  # fmt: skip
    [removed] = run(own, objects=Away(own))  # type: ignore[arg-type]
    assert (removed.backup_id, removed.outcome) == (old.backup_id, "unavailable")
    with pytest.raises(UnknownBackup):
        catalogue.get(own.control_plane, own.tenant_id, old.backup_id)
    own.control_plane.execute("backup_mark_corrupt", backup_id=new.backup_id)
    assert [r.outcome for r in run(own)] == ["taken back"]
    assert catalogue.newest(own.control_plane, own.tenant_id).backup_id == old.backup_id
    check_truth(own)


def test_one_that_became_the_only_one_and_whose_object_is_gone_is_not_taken_back(own: World) -> None:
    """The reply of its removal was lost: the row must not promise it again."""
    kept, _ = few(own)
    page = expiry.plan(own.control_plane, own.settings)
    expiry.mark(own.control_plane, own.settings, page.planned)
    for row in run_sql(own, "SELECT key FROM backups WHERE status = 'deleting'"):
        own.objects.delete(row["key"])
    own.control_plane.execute("backup_mark_corrupt", backup_id=kept)
    assert {r.outcome for r in run(own)} == {"deleted"}
    assert set(statuses(own).values()) == {"corrupt", "deleted"}


# --- an object store that is away, locked, or refuses ---


class Away:
    """A store that does not answer."""

    def __init__(self, world: World) -> None:
        self._objects, self.asked = world.objects, 0

    def delete(self, key: str) -> None:
        self.asked += 1
        raise ObjectStoreUnavailable(f"{key}: time-out")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)


def test_a_store_that_is_away_leaves_every_row_to_the_next_run(own: World) -> None:
    """Nothing is called deleted; it is not asked for every one of thousands."""
    _, gone = few(own)
    gone += [add(own, n * DAY) for n in range(6, 16)]
    away = Away(own)
    assert {r.outcome for r in run(own, objects=away)} == {"unavailable"}  # type: ignore[arg-type]
    assert away.asked < len(gone)
    rows = statuses(own)
    assert {rows[b] for b in gone} == {"deleting"}
    [said] = run_sql(own, "SELECT count(delete_error) AS n FROM backups")
    assert said["n"] == len(gone)
    check_truth(own)
    assert {r.outcome for r in run(own)} == {"deleted"}
    check_truth(own)


class Locked(Away):
    """A store with an object lock on everything."""

    def delete(self, key: str) -> None:
        raise ObjectLocked(f"{key}: locked until 2027")


def test_a_locked_object_is_listed_and_tried_another_day(own: World) -> None:
    """It is no failure; its row is not choosable and says why."""
    _, gone = few(own)
    assert {r.outcome for r in run(own, objects=Locked(own))} == {"locked"}  # type: ignore[arg-type]
    with pytest.raises(UnknownBackup, match="deleting"):
        catalogue.get(own.control_plane, own.tenant_id, gone[0])
    [row] = run_sql(own, "SELECT DISTINCT left(delete_error, 7) AS said FROM backups WHERE status = 'deleting'")
    assert row["said"] == "locked:"
    assert {r.outcome for r in run(own)} == {"deleted"}


# --- dying at every step ---


class Died(BaseException):
    """What SIGKILL is to the code after it."""


class Fuse:
    """Ends the run at the nth step: before and after each transaction's commit and each removal of an object."""

    def __init__(self, at: int) -> None:
        self._left, self._lock = at, threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left < 0:  # nothing of this process does anything from now on
                raise Died

    @property
    def blown(self) -> bool:
        return self._left < 0


class MortalControlPlane:
    def __init__(self, control_plane: ControlPlane, fuse: Fuse) -> None:
        self._control_plane, self._fuse = control_plane, fuse

    @contextmanager
    def transaction(self, **options: Any) -> Iterator[Connection]:
        with self._control_plane.transaction(**options) as connection:
            yield connection
            self._fuse.step()
        self._fuse.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control_plane, name)


class MortalObjects(Away):
    def __init__(self, world: World, fuse: Fuse) -> None:
        super().__init__(world)
        self._fuse = fuse

    def delete(self, key: str) -> None:
        self._fuse.step()
        self._objects.delete(key)
        self._fuse.step()


def die_at_every_step(world: World, kept: UUID, gone: list[UUID]) -> int:
    """Runs that die one step later each time, until one does not; the truth after each."""
    for at in range(100):
        fuse = Fuse(at)
        try:
            run(world, MortalObjects(world, fuse), MortalControlPlane(world.control_plane, fuse))  # type: ignore[arg-type]
        except Died:
            assert fuse.blown
        check_truth(world)
        assert statuses(world)[kept] == "available"
        if not fuse.blown:
            break
        gone.append(add(world, (10 + at) * DAY))  # so that the next run has something to do at each step
    rows = statuses(world)
    assert rows == {kept: "available", **dict.fromkeys(gone, "deleted")}
    return at


def test_a_run_that_dies_at_any_step_is_finished_by_the_next(own: World) -> None:
    """The row first, then the object, then the word that it is gone."""
    steps = die_at_every_step(own, *few(own))
    assert steps > 10


@pytest.mark.slow
def test_the_same_on_s3(own: World, s3: dict[str, object]) -> None:
    """SeaweedFS, where a delete is a bulk request whose answer is a 200."""
    on_s3 = at(own, **s3)
    assert die_at_every_step(on_s3, *few(on_s3)) > 10


# --- what stores say when they refuse ---


@contextmanager
def refusing(s3: dict[str, object], answer: Callable[[str], tuple[int, str] | None]) -> Iterator[dict[str, object]]:
    """A proxy before the store that answers deletes itself when `answer(body)` says so."""
    upstream = urlsplit(str(s3["s3_endpoint"]))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = answer(body.decode()) if self.path.endswith("?delete") else None
            if said is None:
                connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                status, text = reply.status, reply.read()
                headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in ("content-length", "connection")]
            else:
                status, text, headers = said[0], said[1].encode(), []
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else text)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {**s3, "s3_endpoint": f"http://127.0.0.1:{server.server_address[1]}"}
    finally:
        server.shutdown()
        server.server_close()


def _in_bulk(code: str, message: str) -> Callable[[str], tuple[int, str] | None]:
    def answer(body: str) -> tuple[int, str] | None:
        if "no-such-object" in body:
            return None
        key = body.split("<Key>")[1].split("</Key>")[0]
        error = f"<Error><Key>{key}</Key><Code>{code}</Code><Message>{message}</Message></Error>"
        return 200, f'<?xml version="1.0"?><DeleteResult>{error}</DeleteResult>'

    return answer


R2_LOCK = "<Error><Code>ObjectLockedByBucketPolicy</Code><Message>The object is locked by the bucket.</Message></Error>"
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda _: (403, R2_LOCK), "locked"),
        (_in_bulk("AccessDenied", "Access Denied because object protected by object lock."), "locked"),
        (_in_bulk("InvalidRequest", "Object is WORM protected and cannot be overwritten"), "locked"),
        (_in_bulk("AccessDenied", "Access Denied."), "locked"),  # but others may be deleted
        (lambda _: (403, DENIED), "refused"),  # nothing may be deleted
        (lambda _: (500, "<Error><Code>InternalError</Code></Error>"), "unavailable"),
    ],
    ids=["r2-lock", "aws-lock", "worm", "403-of-one", "403-of-all", "500"],
)
def test_a_refusal_to_delete_is_told_from_wrong_rights_and_from_an_outage(
    own: World, s3: dict[str, object], answer: Any, outcome: str
) -> None:
    """A lock is somebody's wish, missing rights are a fault to mend, an outage passes."""
    with refusing(s3, answer) as proxied:
        on_s3 = at(own, object_store_retries=0, **proxied)
        few(on_s3)
        assert {r.outcome for r in run(on_s3)} == {outcome}
        check_truth(on_s3)
