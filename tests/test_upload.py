"""An upload that was finished, and whose process died before the row: whoever comes next registers it."""

from __future__ import annotations

import msgspec
import pytest
from pydantic import SecretStr

from shared import backup, catalogue, fleet_run, keys, plan, upload
from shared.catalogue import Backup, Stored
from shared.errors import ObjectStoreUnavailable, UnknownBackup
from shared.objects import ObjectStore
from tests.core_fixtures import World, contents_of, sha256_of, start_child
from tests.fleet_fixtures import Machine

pytest_plugins = ("tests.core_fixtures", "tests.fleet_fixtures")


def stored_without_its_row(machine: Machine, tenant_id: str) -> Stored:
    taken = backup.take(machine.settings, tenant_id, machine.settings.data_dir)
    return backup.store(machine.objects, taken, machine.control_plane, kind="scheduled")


def newest(machine: Machine, tenant_id: str) -> Backup:
    return catalogue.newest(machine.control_plane, tenant_id)


@pytest.mark.parametrize("tenant", ["unchanged", "damaged", "gone"])
def test_the_next_run_of_the_machine_registers_it_whatever_became_of_the_tenant(machine: Machine, tenant: str) -> None:
    """Who waits for the tenant to be stored again waits for days, or, when its database is lost, for ever."""
    one, *others = machine.tenants
    machine.back_up()
    stored = stored_without_its_row(machine, one)
    if tenant == "damaged":
        machine.paths(one).database.resolve().write_bytes(b"not a database" * 1000)
    if tenant == "gone":
        machine.paths(one).database.resolve().unlink()
    done = {d.tenant_id: d for d in machine.back_up()}
    assert (done[one].error is None) == (tenant == "unchanged")
    assert all(done[other].error is None for other in others)
    made = newest(machine, one)
    assert (made.key, made.kind, made.sha256) == (stored.key, "scheduled", stored.snapshot.sha256)


def test_a_machine_registers_only_its_own(machine: Machine) -> None:
    """Another machine's run knows whether its upload still lives."""
    stored = stored_without_its_row(machine, machine.tenants[0])
    backup.repair_machine(machine.objects, machine.control_plane, f"{machine.settings.machine_id}-other")
    assert not catalogue.list_of(machine.control_plane, machine.tenants[0])
    backup.repair_machine(machine.objects, machine.control_plane, machine.settings.machine_id)
    assert newest(machine, machine.tenants[0]).key == stored.key


def test_a_restore_is_planned_from_it(machine: Machine) -> None:
    """It may be the only state of the last day, and a restore is when it is needed."""
    machine.back_up()
    one = machine.tenants[0]
    machine.write(one, "of today")
    stored = stored_without_its_row(machine, one)
    chosen = plan.plan(machine.settings, machine.control_plane, one)
    assert chosen.backup is not None and chosen.backup.key == stored.key and chosen.note is None


def test_a_restore_is_planned_without_it_and_says_so_when_the_store_is_away(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older backup is better than no plan; that there may be a newer one must be known."""
    machine.back_up()
    one = machine.tenants[0]
    before = newest(machine, one)
    stored_without_its_row(machine, one)

    def away(*_: object) -> bool:
        raise ObjectStoreUnavailable("time-out")

    monkeypatch.setattr(ObjectStore, "exists", away)
    chosen = plan.plan(machine.settings, machine.control_plane, one)
    assert chosen.backup == before and chosen.note is not None and "time-out" in chosen.note
    assert all(done.error is None for done in machine.back_up() if done.tenant_id != one)


def test_a_restore_is_planned_without_it_and_says_so_when_its_key_cannot_be_had(machine: Machine) -> None:
    """It is there and may be the newest; that only the log knew would leave a restore to an older day unseen."""
    machine.back_up()
    one = machine.tenants[0]
    before = newest(machine, one)

    def with_master() -> Machine:
        master = SecretStr(keys.new_master()[0])
        update = {"backup_encryption": "age", "backup_master_key": master}
        settings = machine.settings.model_copy(update=update)
        return Machine(settings, machine.control_plane, ObjectStore(settings), machine.tenants)

    stored = stored_without_its_row(with_master(), one)
    again = msgspec.structs.replace(stored, stored_sha256="0" * 64)  # a second try encrypts to other bytes
    upload.begin(machine.objects, machine.control_plane, again, "scheduled", lambda s: s.snapshot.sha256)
    chosen = plan.plan(with_master().settings, machine.control_plane, one)
    assert chosen.backup == before and chosen.note is not None and stored.key in chosen.note


def test_a_run_is_told_of_its_backup_though_a_repair_registered_it_first(machine: Machine) -> None:
    """Each run begins with a repair, which meets the live uploads of the others: none of them has failed by that."""
    one = machine.tenants[0]
    stored = stored_without_its_row(machine, one)
    backup.repair_machine(machine.objects, machine.control_plane, machine.settings.machine_id)
    repaired = newest(machine, one)
    run_id = f"run-of-{one}"
    for flow_run_id in (run_id, f"{run_id}-again"):
        made = backup.register(machine.control_plane, stored, kind="scheduled", flow_run_id=flow_run_id)
        assert made == repaired
    [done] = fleet_run.made_by(machine.control_plane, run_id, [one], error=None)
    assert (done.error, done.backup_id) == (None, repaired.backup_id)


DIES = """
    import os, sys
    from pathlib import Path
    from shared import backup
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore
    from shared.settings import Settings
    settings, tenant_id, kind = Settings(), sys.argv[1], sys.argv[2]
    with ControlPlane(settings) as control_plane:
        taken = backup.take(settings, tenant_id, settings.data_dir)
        print(backup.store(ObjectStore(settings), taken, control_plane, kind=kind).key, flush=True)
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["scheduled", "safety"])
def test_what_a_crash_between_object_and_row_left_is_registered_by_the_next_backup(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an object nobody knows of, nor a row nobody checked; a safety backup stays one."""
    world.write("one")
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(world.settings.data_dir))
    monkeypatch.setenv("ENGRAM_CONTROL_PLANE_URL", world.settings.control_plane_url.get_secret_value())
    child = start_child(DIES, world.tenant_id, kind)
    key = child.communicate(timeout=30)[0].strip()
    assert key and catalogue.list_of(world.control_plane, world.tenant_id) == []
    world.write("two")
    made = world.back_up()
    adopted = next(b for b in catalogue.list_of(world.control_plane, world.tenant_id) if b.key == key)
    assert (adopted.kind, adopted.status) == (kind, "available")
    assert (adopted.sha256, adopted.size_bytes) == (sha256_of(world.object_path(adopted)), adopted.stored_bytes)
    assert catalogue.newest(world.control_plane, world.tenant_id) == made
    assert backup.repair(world.objects, world.control_plane, world.tenant_id) == []
    backup.fetch(world.objects, adopted, world.settings.data_dir / "back", world.control_plane)
    assert contents_of(world.settings.data_dir / "back") == ["one"]


@pytest.mark.parametrize("found", ["nothing", "something else"])
def test_a_repair_registers_nothing_it_has_not_read(world: World, found: str) -> None:
    """An upload that never arrived, or another object under its key, is no backup."""
    stored = backup.store(
        world.objects,
        backup.take(world.settings, world.tenant_id, world.settings.data_dir),
        world.control_plane,
    )
    there = world.settings.data_dir / "objects" / stored.key
    there.unlink()
    if found == "something else":
        there.write_bytes(b"something else")
    assert backup.repair(world.objects, world.control_plane, world.tenant_id) == []
    with pytest.raises(UnknownBackup):
        catalogue.newest(world.control_plane, world.tenant_id)
    assert there.exists() == (found == "something else")
