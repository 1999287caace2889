"""Objects and uploads that no row knows: what a crash, or a control plane from before, leaves in the store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared import backup, catalogue, remnants, snapshot, strays, uploads, verify
from shared.bucket import Bucket
from shared.control_plane import ControlPlane
from shared.errors import ObjectStoreRefused, ObjectStoreUnavailable, UnknownBackup
from shared.objects import ObjectStore
from shared.snapshot import Manifest
from shared.strays import Stray
from shared.tenant import object_key
from tests.core_fixtures import World, encrypted, new_world, settings_in
from tests.expiry_fixtures import add, run_sql, statuses
from tests.ports import free_ports

pytest_plugins = ("tests.core_fixtures", "tests.s3_fixtures")


@pytest.fixture
def own(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)


def find(world: World, *, dry_run: bool = False, hours: float = 1e-9) -> list[Stray]:
    settings = world.settings.model_copy(update={"retention_orphan_hours": hours})
    return list(strays.find(world.control_plane, world.objects, settings, dry_run=dry_run))


def put(world: World, key: str, data: bytes) -> str:
    file = world.settings.data_dir / "stray"
    file.write_bytes(data)
    world.objects.put_file(key, file, hashlib.sha256(data).hexdigest())
    file.unlink()  # the local store may have linked it
    return key


@pytest.mark.parametrize("packing", ["none", "zstd", "zstd+age"])
def test_a_backup_whose_row_is_missing_is_adopted_as_a_safety_backup(own: World, packing: str) -> None:
    """It is whole and the tenant's, and may be what a restore was meant to replace: never "the newest"."""
    own.write("one", "two")
    compression = "zstd" if "zstd" in packing else "none"
    own.change(**(encrypted(compression) if "age" in packing else {"backup_compression": compression}))
    taken = backup.take(own.settings, own.tenant_id, own.settings.data_dir)
    stored = backup.store(own.objects, taken, own.control_plane)
    run_sql(own, "DELETE FROM backup_uploads")  # a control plane restored from before
    assert find(own, hours=1) == []  # it may be about to get its row
    assert [s.outcome for s in find(own, dry_run=True)] == ["adopted"]
    assert statuses(own) == {}
    assert [s.outcome for s in find(own)] == ["adopted"]
    assert find(own) == []
    with pytest.raises(UnknownBackup):
        catalogue.newest(own.control_plane, own.tenant_id)
    adopted = catalogue.newest(own.control_plane, own.tenant_id, at=datetime.now(UTC))
    assert (adopted.key, adopted.sha256, adopted.packing) == (stored.key, taken.sha256, packing)
    restored = own.settings.data_dir / "restored"
    backup.fetch(own.objects, adopted, restored, own.control_plane)
    assert restored.stat().st_size == adopted.size_bytes


def test_what_does_not_open_or_is_not_ours_is_listed_and_left(own: World) -> None:
    """Half an upload, another tenant's file under this one's name, a note somebody put there."""
    own.write("one")
    made = own.back_up()
    whole = own.object_path(made).read_bytes()
    other = f"{own.tenant_id}-other"
    run_sql(
        own,
        "INSERT INTO tenants (tenant_id, state, schema_version, machine_id) VALUES (%s, 'active', 1, 'm')",
        other,
    )
    now = datetime.now(UTC)
    wrong = {
        put(own, object_key(own.tenant_id, now, 1), whole[: len(whole) // 2]): "does not open",
        put(own, object_key(own.tenant_id, now, 77), whole): "schema version",
        put(own, object_key(other, now, made.schema_version), whole): "does not open",
        put(own, object_key("nobody", now, 1), whole): "no tenant",
        put(own, f"tenants/{own.tenant_id}/notes.txt", b"hello"): "not a key",
    }
    found = {s.key: s for s in find(own)}
    assert found.keys() == wrong.keys()
    for key, cause in wrong.items():
        assert found[key].outcome == "listed" and cause in found[key].cause, found[key]
        assert own.objects.exists(key)
    assert statuses(own) == {made.backup_id: "available"}


def test_an_object_whose_row_says_deleted_goes(own: World) -> None:
    """A local disk may bring a file back after a power loss; a row that says deleted must not lie."""
    good, gone = add(own, timedelta(days=8)), add(own, timedelta(days=9), status="deleted")
    assert [s.outcome for s in find(own, dry_run=True)] == ["removed"]
    assert [s.outcome for s in find(own)] == ["removed"]
    assert len(own.objects.keys("tenants")) == 1 and statuses(own) == {good: "available", gone: "deleted"}


def test_an_object_whose_row_says_deleted_stays_while_its_tenant_has_no_good_one(own: World) -> None:
    """The row may be wrong, by a store that denied the object: the tenant's last good backup is not removed for it."""
    own.write("one")
    made = own.back_up()
    run_sql(own, "UPDATE backups SET status = 'deleted'")
    assert [s.outcome for s in find(own, dry_run=True)] == ["adopted"] and statuses(own) == {made.backup_id: "deleted"}
    assert [s.outcome for s in find(own)] == ["adopted"]
    assert find(own) == [] and statuses(own) == {made.backup_id: "corrupt"}
    share = verify.choose(own.control_plane, own.settings)
    verify.examine_all(own.control_plane, own.objects, own.settings, share)
    assert catalogue.newest(own.control_plane, own.tenant_id).backup_id == made.backup_id


def test_a_deleted_tenants_stray_gets_no_row_and_goes_with_the_tenants_backups(own: World) -> None:
    """A row made now would be missed by the deletion, and would keep what was to be erased."""
    own.write("one")
    backup.store(own.objects, backup.take(own.settings, own.tenant_id, own.settings.data_dir))
    for state, days, expected in (("deleting", 99, "listed"), ("deleted", 1, "listed"), ("deleted", 99, "removed")):
        run_sql(own, "UPDATE tenants SET state = %s, updated_at = now() - %s", state, timedelta(days=days))
        assert [s.outcome for s in find(own)] == [expected], (state, days)
    assert own.objects.keys("tenants") == [] and statuses(own) == {}


def test_what_an_erased_tenant_left_is_removed_at_once_also_under_its_new_owner(own: World) -> None:
    """The receipt said that nothing was left; and the next tenant of that id must not find the former one's data."""
    run_sql(
        own,
        "INSERT INTO tenant_deletions (deletion_id, tenant_id, reason, requested_by, keep_backups, inventory, erased,"
        " finished_at) VALUES (gen_random_uuid(), %s, 'r', 't', false, '{}', true, now())",
        own.tenant_id,
    )
    for state, days, expected in (("deleted", 1, "removed"), ("active", 1, "removed"), ("active", -1, "adopted")):
        key = object_key(own.tenant_id, datetime.now(UTC) - timedelta(days=days), 1)
        own.write("one")
        put(own, key, backup.take(own.settings, own.tenant_id, own.settings.data_dir).path.read_bytes())
        run_sql(own, "UPDATE tenants SET state = %s", state)
        assert [s.outcome for s in find(own)] == [expected], (state, days)


def test_a_finished_upload_is_registered_as_what_it_was_made_for(own: World) -> None:
    """Its tenant may never be stored again: it did not change, or its database is gone; adopting would only guess."""
    own.write("one")
    taken = backup.take(own.settings, own.tenant_id, own.settings.data_dir)
    stored = backup.store(own.objects, taken, own.control_plane, kind="scheduled")
    assert find(own, hours=1) == []  # it may be about to get its row
    assert [s.outcome for s in find(own, dry_run=True)] == ["registered"] and statuses(own) == {}
    assert [s.outcome for s in find(own)] == ["registered"]
    made = catalogue.newest(own.control_plane, own.tenant_id)
    assert (made.key, made.kind, made.sha256) == (stored.key, "scheduled", taken.sha256)
    assert find(own) == []


def test_two_finished_uploads_of_one_tenant_are_both_registered(own: World) -> None:
    """The repair that the first asks for registers the second, too: nothing of it is unread."""
    own.write("one")
    stored = backup.store(
        own.objects, backup.take(own.settings, own.tenant_id, own.settings.data_dir), own.control_plane
    )
    there, late = own.settings.data_dir / "objects" / stored.key, own.settings.data_dir / "late"
    there.rename(late)  # else the second upload registers it
    backup.store(own.objects, backup.take(own.settings, own.tenant_id, own.settings.data_dir), own.control_plane)
    late.rename(there)
    assert [s.outcome for s in find(own)] == ["registered", "registered"]
    assert len(statuses(own)) == 2 and find(own) == []


def test_the_copy_of_a_stray_has_its_tenants_name(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of a deletion says that this machine has no copy left: it finds them by name."""
    own.write("one")
    backup.store(own.objects, backup.take(own.settings, own.tenant_id, own.settings.data_dir))
    seen, inspect = [], snapshot.inspect

    def look(file: Path, tenant_id: str) -> Manifest:
        seen.append(remnants.copies(own.settings, tenant_id))
        return inspect(file, tenant_id)

    monkeypatch.setattr(snapshot, "inspect", look)
    assert [s.outcome for s in find(own)] == ["adopted"]
    assert len(seen) == 1 and seen[0] and remnants.copies(own.settings, own.tenant_id) == {}


def test_staged_files_of_the_local_store_go_when_they_are_old(own: World) -> None:
    """obstore writes NAME#1 and renames it; a killed one stays, and no listing shows it."""
    made = own.back_up()
    staged = own.object_path(made).with_name("20200101T000000.000000Z_v1.sqlite#1")
    staged.write_bytes(b"half")
    assert uploads.clear(own.settings) == []
    os.utime(staged, (1, 1))
    assert len(uploads.clear(own.settings, dry_run=True)) == 1 and staged.exists()
    assert len(uploads.clear(own.settings)) == 1 and not staged.exists()
    assert own.object_path(made).exists()


@pytest.mark.slow
def test_abandoned_multipart_uploads_are_aborted_when_they_are_old(own: World, s3: dict[str, object]) -> None:
    """Their parts are stored and paid for, and no listing shows them."""
    url = own.settings.control_plane_url.get_secret_value()
    there = settings_in(own.settings.data_dir, url, object_store_url=f"s3://engram/{own.tenant_id}", **s3)
    put(World(there, own.control_plane, ObjectStore(there), own.tenant_id), object_key("t", datetime.now(UTC), 1), b"x")
    bucket = Bucket(there)
    names = [f"{own.tenant_id}/tenants/t/db/a b+{n}.sqlite" for n in range(3)]
    for name in names:
        bucket.request("POST", name, {"uploads": ""})
    bucket.request("POST", f"elsewhere-{own.tenant_id}/tenants/t/db/x.sqlite", {"uploads": ""})
    bucket.request("POST", names[1], {"uploads": ""})  # the same key twice: the next page begins inside it
    for page in (1, 2, 3, 1000):
        assert sorted(u.key for u in bucket.uploads(page=page)) == sorted([*names, names[1]]), f"pages of {page}"
    assert len({u.upload_id for u in bucket.uploads(page=1)}) == 4
    assert uploads.clear(there) == []
    assert len(uploads.of_tenant(there, "t")) == 4 and uploads.of_tenant(there, "other") == []
    uploads.abort(there, [u for u in uploads.of_tenant(there, "t") if u.key == names[1]][:1])
    bucket.request("POST", names[1], {"uploads": ""})
    old = there.model_copy(update={"retention_orphan_hours": -1.0})
    assert len(uploads.clear(old, dry_run=True)) == 4 and len(list(bucket.uploads())) == 4
    assert sorted({u.key for u in uploads.clear(old)}) == names
    assert list(bucket.uploads()) == []
    assert len(ObjectStore(there).keys("tenants")) == 1


@pytest.mark.slow
def test_a_wrong_key_or_a_store_that_is_away_says_so(own: World, s3: dict[str, object]) -> None:
    """Nothing to abort and nothing seen are not the same."""
    url = own.settings.control_plane_url.get_secret_value()
    for update, error in (
        ({"s3_secret_access_key": "wrong"}, ObjectStoreRefused),
        ({"s3_endpoint": f"http://127.0.0.1:{free_ports(1)[0]}"}, ObjectStoreUnavailable),
    ):
        there = settings_in(own.settings.data_dir, url, object_store_url="s3://engram/x", **(s3 | update))
        with pytest.raises(error) as raised:
            uploads.clear(there)
        assert "wrong" not in str(raised.value) and "admin-secret" not in str(raised.value)
