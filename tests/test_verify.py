"""Stored backups read again: what is not whole is found, what could not be read says nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shared import backup, catalogue, expiry, verify
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import UnknownBackup
from shared.objects import ObjectStore
from shared.verify import Examined
from tests.core_fixtures import World, encrypted, new_world, settings_in
from tests.expiry_fixtures import run_sql, statuses
from tests.ports import free_ports

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def own(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)


def run(world: World, limit: int | None = 99) -> list[Examined]:
    share = verify.choose(world.control_plane, world.settings, limit)
    return verify.examine_all(world.control_plane, world.objects, world.settings, share)


def outcomes(examined: list[Examined]) -> list[str]:
    return sorted(e.outcome for e in examined)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def backups(world: World, count: int) -> list[Backup]:
    made = []
    for n in range(count):
        world.write(f"memory {n}")
        made.append(world.back_up())
    return made


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "another tenant's", "missing"])
def test_a_damaged_object_is_marked_and_never_chosen_again(own: World, damage: str) -> None:
    """Until then the row was a promise; the one before it becomes the last good one."""
    before, damaged = backups(own, 2)
    path = own.object_path(damaged)
    if damage == "a flipped bit":
        flip(path)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "another tenant's":
        path.write_bytes(own.object_path(before).read_bytes())
    else:
        path.unlink()
    assert outcomes(run(own)) == sorted(["good", "missing" if damage == "missing" else "corrupt"])
    assert statuses(own) == {before.backup_id: "available", damaged.backup_id: "corrupt"}
    assert catalogue.newest(own.control_plane, own.tenant_id).backup_id == before.backup_id
    with pytest.raises(UnknownBackup, match="corrupt"):
        catalogue.get(own.control_plane, own.tenant_id, damaged.backup_id)
    [said] = run_sql(own, "SELECT status_reason FROM backups WHERE status = 'corrupt'")
    assert said["status_reason"]
    assert not list((own.settings.data_dir / "tmp").glob("verify-*"))


def test_those_not_read_for_longest_are_read_first_and_all_within_the_cycle(own: World) -> None:
    """A share a day; a new backup does not push an old one back."""
    made = backups(own, 6)
    for n, one in enumerate(made):
        last = timedelta(days=50 - n)
        run_sql(own, "UPDATE backups SET verified_at = now() - %s WHERE backup_id = %s", last, one.backup_id)
    own.settings = own.settings.model_copy(update={"verify_cycle_days": 3})
    seen = []
    for _ in range(3):
        seen.append({e.backup.backup_id for e in run(own, None)})
    assert seen == [{m.backup_id for m in made[n : n + 2]} for n in (0, 2, 4)]


def test_a_store_that_cannot_be_read_changes_nothing(own: World) -> None:
    """Inconclusive: an outage is not a corruption."""
    backups(own, 2)
    before = run_sql(own, "SELECT backup_id, status, verified_at FROM backups ORDER BY 1")
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    keys_ = {"s3_access_key_id": "k", "s3_secret_access_key": "s", "object_store_retries": 0}
    url = own.settings.control_plane_url.get_secret_value()
    own.objects = ObjectStore(
        settings_in(own.settings.data_dir, url, object_store_url="s3://engram/x", s3_endpoint=nobody, **keys_)
    )
    assert outcomes(run(own)) == ["inconclusive"] * 2
    assert run_sql(own, "SELECT backup_id, status, verified_at FROM backups ORDER BY 1") == before


def test_a_store_in_which_nothing_is_found_is_the_wrong_one(own: World) -> None:
    """A bucket or prefix mistyped must not call a whole fleet's backups corrupt."""
    made = backups(own, 3)
    elsewhere = own.settings.data_dir / "objects-elsewhere"
    elsewhere.mkdir()
    own.objects = ObjectStore(own.settings.model_copy(update={"object_store_url": elsewhere.as_uri()}))
    found = run(own)
    assert outcomes(found) == ["inconclusive"] * 3 and "right object store" in str(found[0].cause)
    assert set(statuses(own).values()) == {"available"} and len(statuses(own)) == len(made)


def test_what_cannot_be_read_takes_no_others_place_in_the_share(own: World) -> None:
    """A lost key concerns its own backups: the others are verified as often as before, and it is tried beside them."""
    lost, *readable = backups(own, 4)
    run_sql(own, "UPDATE backups SET verified_at = now() - interval '90 days' WHERE backup_id = %s", lost.backup_id)
    for one in (lost, readable[0]):  # two shares' worth of them
        run_sql(own, "UPDATE backups SET packing = 'age', key_id = gen_random_uuid(), stored_sha256 = sha256"
                     " WHERE backup_id = %s", one.backup_id)  # fmt: skip
    assert [outcomes(run(own, 1)) for _ in range(4)] == [
        ["inconclusive"],
        ["inconclusive", "inconclusive"],
        ["good", "inconclusive"],
        ["good", "inconclusive"],
    ]
    assert set(statuses(own).values()) == {"available"}


def test_a_run_that_is_killed_has_recorded_what_it_read(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share may take hours: what was found is not to be found again."""
    *first, last = backups(own, 3)
    flip(own.object_path(first[0]))
    own.settings = own.settings.model_copy(update={"verify_parallel": 1})
    look = verify.fetch

    def fetch(objects: ObjectStore, chosen: Backup, *rest: Any) -> Any:
        if chosen.backup_id == last.backup_id:
            raise KeyboardInterrupt
        return look(objects, chosen, *rest)

    monkeypatch.setattr(verify, "fetch", fetch)
    before = {b.backup_id: b.verified_at for b in catalogue.list_of(own.control_plane, own.tenant_id)}
    with pytest.raises(KeyboardInterrupt):
        run(own)
    after = {b.backup_id: b for b in catalogue.list_of(own.control_plane, own.tenant_id)}
    assert after[first[0].backup_id].status == "corrupt"
    assert after[first[1].backup_id].verified_at != before[first[1].backup_id]
    assert after[last.backup_id].verified_at == before[last.backup_id]


def test_one_that_reads_whole_again_is_available_again(own: World) -> None:
    """What was damaged was the way to it; the mark is not for ever."""
    _, damaged = backups(own, 2)
    data = own.object_path(damaged).read_bytes()
    flip(own.object_path(damaged))
    run(own)
    assert statuses(own)[damaged.backup_id] == "corrupt"
    own.object_path(damaged).write_bytes(data)
    run(own)
    assert catalogue.newest(own.control_plane, own.tenant_id).backup_id == damaged.backup_id


@pytest.mark.parametrize("damaged", [False, True])
def test_without_its_key_an_object_is_still_compared_with_what_was_stored(own: World, damaged: bool) -> None:
    """A lost key is somebody's to find, not the object's fault; other bytes than were stored are."""
    own.change(**encrypted())
    own.write("secret")
    taken = backup.take(own.settings, own.tenant_id, own.settings.data_dir)
    made = backup.register(own.control_plane, backup.store(own.objects, taken, own.control_plane))
    assert outcomes(run(own)) == ["good"]
    if damaged:
        flip(own.object_path(made))
    own.change(backup_encryption="none", backup_master_key="")
    assert outcomes(run(own)) == ["corrupt" if damaged else "inconclusive"]
    assert statuses(own)[made.backup_id] == ("corrupt" if damaged else "available")


# --- the figure operators alert on ---


def age(world: World) -> float:
    row = world.control_plane.row("fleet_ages")
    assert row is not None
    return float(row["backup_age_seconds"]) / 3600


def shift(world: World, made: Backup, hours: float, **also: object) -> None:
    """As if it had been taken so many hours ago."""
    columns = "".join(f", {name} = %s" for name in also)
    run_sql(
        world,
        f"UPDATE backups SET ts = now() - %s, created_at = now() - %s{columns} WHERE backup_id = %s",
        *(timedelta(hours=hours), timedelta(hours=hours), *also.values(), made.backup_id),
    )


def test_the_age_counts_only_good_backups_that_a_restore_would_choose(own: World) -> None:
    """Corrupt, deleted, unverified and safety ones are no backups when somebody needs one."""
    run_sql(own, "UPDATE tenants SET created_at = now() - interval '100 hours'")
    assert age(own) == pytest.approx(100, abs=0.1)  # never backed up: since its creation
    oldest, newer, newest, safety = backups(own, 4)
    for one, hours in ((oldest, 50), (newer, 30), (newest, 10)):
        shift(own, one, hours)
    shift(own, safety, 1, kind="safety")
    assert age(own) == pytest.approx(10, abs=0.1)
    run_sql(own, "UPDATE backups SET status = 'corrupt' WHERE backup_id = %s", newest.backup_id)
    assert age(own) == pytest.approx(30, abs=0.1)
    row = own.control_plane.row("fleet_ages")
    assert row is not None and row["backups_corrupt"] == 1
    run_sql(own, "UPDATE backups SET status = 'deleting' WHERE backup_id = %s", newer.backup_id)
    assert age(own) == pytest.approx(50, abs=0.1)
    run_sql(own, "UPDATE backups SET verified_at = NULL WHERE backup_id = %s", oldest.backup_id)
    assert age(own) == pytest.approx(100, abs=0.1)


def test_the_age_is_the_worst_tenants_and_the_list_names_it(own: World) -> None:
    """One forgotten tenant among thousands is what the figure is for; a suspended one is to be restored too."""
    [made] = backups(own, 1)
    shift(own, made, 3)
    for tenant_id, state, hours in (("worse", "suspended", 40), ("gone", "deleted", 90)):
        run_sql(
            own,
            "INSERT INTO tenants (tenant_id, state, schema_version, machine_id, created_at)"
            " VALUES (%s, %s, 1, 'm', now() - %s)",
            *(tenant_id, state, timedelta(hours=hours)),
        )
    assert age(own) == pytest.approx(40, abs=0.1)
    [listed] = catalogue.stale(own.control_plane, 26 * 3600)
    assert (listed["tenant_id"], listed["good_at"]) == ("worse", None)
    assert [r["tenant_id"] for r in catalogue.stale(own.control_plane, 3600)] == ["worse", own.tenant_id]


def test_a_backup_dated_in_the_future_does_not_hide_that_it_is_old(own: World) -> None:
    """The clock of the machine that took it was wrong: when its row was written counts then."""
    [made] = backups(own, 1)
    shift(own, made, 20)
    run_sql(own, "UPDATE backups SET ts = now() + interval '1 year'")
    assert age(own) == pytest.approx(20, abs=0.1)


def test_a_tenant_found_unchanged_is_as_old_as_that_look(own: World) -> None:
    """Nothing was written since: its backup of last week still is all there is of it."""
    [made] = backups(own, 1)
    shift(own, made, 90)
    run_sql(own, "UPDATE backups SET current_at = now() - interval '2 hours'")
    assert age(own) == pytest.approx(2, abs=0.1)


def test_retention_never_counts_a_corrupt_backup_as_the_last_good_one(own: World) -> None:
    """From the damage to the plan: the older one is kept because the newer is not good."""
    run_sql(own, "UPDATE plans SET backups_daily = 0, backups_weekly = 0, backups_monthly = 0, backups_last = 1")
    older, newer = backups(own, 2)
    shift(own, older, 60)
    shift(own, newer, 50)
    flip(own.object_path(newer))
    run(own)
    [planned] = expiry.plan(own.control_plane, own.settings).planned
    assert {v.backup_id: v.reason for v in planned.keep}[older.backup_id].startswith("last good")
    assert planned.delete == ()
