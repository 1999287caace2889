"""Deletion of backups: a row never promises an object that is gone, whatever the store says."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from uuid import UUID

import pytest

from shared import catalogue, expiry, strays, verify
from shared.errors import ObjectLocked, UnknownBackup
from tests.core_fixtures import World
from tests.expiry_fixtures import DAY, NOW, Away, add, check_truth, few, restoring, run, run_sql, statuses

pytest_plugins = ("tests.core_fixtures", "tests.s3_fixtures", "tests.expiry_fixtures")


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
        own.control_plane.execute("backup_found_corrupt", backup_id=kept, reason="test")
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
            own.control_plane.execute("backup_found_corrupt", backup_id=kept, reason="test")

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
    own.control_plane.execute("backup_found_corrupt", backup_id=new.backup_id, reason="test")
    assert [r.outcome for r in run(own)] == ["taken back"]
    assert catalogue.newest(own.control_plane, own.tenant_id).backup_id == old.backup_id
    check_truth(own)


def test_one_that_became_the_only_one_and_whose_object_is_gone_is_promised_to_nobody(own: World) -> None:
    """The reply of its removal was lost, or the store is wrong: its row neither promises it nor calls it deleted."""
    kept, _ = few(own)
    page = expiry.plan(own.control_plane, own.settings)
    expiry.mark(own.control_plane, own.settings, page.planned)
    for row in run_sql(own, "SELECT key FROM backups WHERE status = 'deleting'"):
        own.objects.delete(row["key"])
    own.control_plane.execute("backup_found_corrupt", backup_id=kept, reason="test")
    assert {r.outcome for r in run(own)} == {"taken back"}
    assert set(statuses(own).values()) == {"corrupt"}
    assert run(own) == []


class Forgetful(Away):
    """A store that says of everything that there is no such object."""

    def exists(self, key: str) -> bool:
        return False


def test_the_last_good_one_outlives_a_store_that_forgot_it_for_a_night(own: World) -> None:
    """It was to go, its successors were lost, and the store answered 404: when the store is right again it is there."""
    own.write("one")
    old = own.back_up()
    own.objects.sha256(old.key)
    run_sql(own, "UPDATE backups SET status = 'deleting', status_before = 'available', verified_at = NULL")
    [removed] = expiry.remove(own.control_plane, Forgetful(own), own.settings)  # type: ignore[arg-type]
    assert removed.outcome == "taken back" and statuses(own) == {old.backup_id: "corrupt"}
    settings = own.settings.model_copy(update={"retention_orphan_hours": 1e-9})
    assert list(strays.find(own.control_plane, own.objects, settings, dry_run=False)) == []
    share = verify.choose(own.control_plane, own.settings)
    verify.examine_all(own.control_plane, own.objects, own.settings, share)
    assert catalogue.newest(own.control_plane, own.tenant_id).backup_id == old.backup_id


# --- an object store that is away, locked, or refuses ---


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
