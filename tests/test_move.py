"""Moving a tenant between two machines: what it keeps and what it refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from pydantic import SecretStr

from shared import catalogue, deletion, fingerprint, keys, move, move_disk, move_journal, move_plan, registry, watermark
from shared import plan as planning
from shared.departure import Departure
from shared.errors import (
    CorruptBackup,
    InMaintenance,
    KeyUnavailable,
    LeaseHeld,
    Permanent,
    Refused,
    TenantDatabaseUnavailable,
)
from shared.fence import Fence, Mark
from shared.objects import ObjectStore
from shared.sweep import sweep_disk
from tests import restore_fixtures
from tests.core_fixtures import World, wait_until
from tests.move_fixtures import (
    A,
    B,
    Pair,
    arrive,
    check_one_serves,
    check_undone,
    depart,
    perform,
    stubborn,
    sweep,
)

pytest_plugins = ("tests.core_fixtures", "tests.move_fixtures")


def test_a_move_and_a_move_back_keep_every_acknowledged_write_and_one_machine_serves(pair: Pair) -> None:
    """Writers on both machines that never look at the routes: gateways with the stalest snapshots there can be."""
    with stubborn(pair) as writers:
        for target in (pair.b, pair.a, pair.b):
            wait_until(lambda: len(writers[0].acknowledged) + len(writers[1].acknowledged) > 20)
            moved = perform(pair)
            assert pair.serving() is target
            assert pair.state(moved.move_id) == "done"
            count = len(writers[pair.serving() is pair.b].acknowledged)
            wait_until(lambda: len(writers[pair.serving() is pair.b].acknowledged) > count)  # noqa: B023
            check_one_serves(pair, writers)
    assert {"one", "two"} <= set(pair.b.rows())
    assert min(len(w.acknowledged) for w in writers) > 0
    assert pair.a.lease_holder() is None
    tenant = registry.get(pair.control_plane, pair.tenant_id)
    assert tenant.generation == pair.b.paths.generation() == 4, "higher at each stop: no generation is named twice"


def test_a_tenant_nobody_writes_to_is_copied_once(pair: Pair) -> None:
    """Then writes are held for a look, not for an upload and a download."""
    moved = perform(pair)
    row = move_journal.get(pair.control_plane, moved.move_id)
    assert row.final_backup_id == row.first_backup_id == moved.final_backup_id
    assert (row.memories, moved.memories) == (2, 2)
    assert row.held_ms == pytest.approx(moved.held_ms, abs=0.1)


def test_files_that_have_not_changed_since_the_first_copy_are_not_read_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most tenants of a machine that is emptied are idle: their writes are held for a moment, whatever their size."""
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", 0.0)
    taken: list[object] = []
    real = move._back_up

    def count(*arguments: object, **named: object) -> object:
        taken.append(arguments)
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(move, "_back_up", count)
    moved = perform(pair)
    assert len(taken) == 1
    assert moved.memories == 2 and pair.b.rows() == ["one", "two"]
    perform(pair, lambda _: pair.b.write("three"))
    assert len(taken) == 3
    assert pair.a.rows() == ["one", "two", "three"]


def test_what_is_written_after_the_first_copy_moves_too(pair: Pair) -> None:
    """The second copy is the one that counts."""
    moved = perform(pair, lambda _: pair.a.write("late"))
    assert pair.b.rows() == ["one", "two", "late"]
    row = move_journal.get(pair.control_plane, moved.move_id)
    assert row.final_backup_id != row.first_backup_id


def test_encrypted_copies_travel_and_the_target_needs_the_key(pair: Pair) -> None:
    """A machine without the master key refuses before anything is held, and the source serves on."""
    master = keys.new_master()[0]
    encrypted = {"backup_encryption": "age", "backup_master_key": SecretStr(master)}
    plain = pair.b
    pair.a, pair.b = (
        World(changed, pair.control_plane, ObjectStore(changed), pair.tenant_id)
        for changed in (world.settings.model_copy(update=encrypted) for world in (pair.a, pair.b))
    )
    refused: list[KeyUnavailable] = []

    def without_key(departure: Departure) -> None:
        with pytest.raises(KeyUnavailable) as raised:
            arrive(plain, departure.plan.move_id)
        refused.append(raised.value)

    with pytest.raises(Permanent, match="KeyUnavailable"):
        depart(pair.a, pair.plan(), without_key)
    assert refused
    perform(pair, lambda _: pair.a.write("late"))
    assert pair.b.rows() == ["one", "two", "late"]
    [newest, *_] = catalogue.list_of(pair.control_plane, pair.tenant_id)
    assert newest.key.endswith(".age")


def test_reads_go_on_at_the_source_while_writes_are_held(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move holds writes for longer than a restore does."""
    seen: list[object] = []
    real = move._back_up

    def look(departure: Departure, *more: object, **named: object) -> object:
        if pair.a.paths.mark.exists():
            seen.append(pair.can_use(pair.a))
        return real(departure, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(move, "_back_up", look)
    perform(pair)
    assert seen == [True]


def test_after_a_move_the_source_can_no_longer_back_up_restore_or_undo_and_says_where_to(pair: Pair) -> None:
    """A run of the source that was late must not make a second truth."""
    pair.a.back_up()
    restore_fixtures.perform(pair.a)
    chosen = planning.plan(pair.a.settings, pair.control_plane, pair.tenant_id)
    perform(pair)
    with pytest.raises(TenantDatabaseUnavailable):
        pair.a.back_up()
    with pytest.raises(LeaseHeld, match=f"from machine {A} to {B}"):
        restore_fixtures.run(pair.a, chosen)
    pair.a.paths.moving.unlink()  # the marker is one guard, the control plane's word is another
    with pytest.raises(Refused, match=f"moved to machine {B}"):
        restore_fixtures.run(pair.a, chosen)
    assert pair.a.lease_holder() is None
    with pytest.raises(Permanent, match="no database from before"):
        planning.plan_undo(pair.b.settings, pair.control_plane, pair.tenant_id)
    assert pair.b.back_up().manifest["memories"] == 2
    assert restore_fixtures.perform(pair.b).outcome == "restored"


def test_a_deletion_waits_until_the_source_kept_nothing(pair: Pair) -> None:
    """A receipt that says "gone" must be true of the machine the tenant left, too."""
    perform(pair)
    arguments = (pair.b.settings, pair.control_plane, pair.b.objects, pair.tenant_id)
    with pytest.raises(Refused, match=f"machine {A} still keeps files"):
        deletion.delete(*arguments, reason="asked", requested_by="test")
    assert [s.done for s in sweep(pair.a)] == ["removed"]
    assert not pair.a.paths.root.exists()
    assert deletion.delete(*arguments, reason="asked", requested_by="test").erased


def test_a_deletion_that_is_refused_for_its_own_reasons_leaves_what_the_source_keeps(pair: Pair) -> None:
    """What is there from before the move may be the last whole copy: only a deletion that happens may ask for it."""
    perform(pair)
    with pair.control_plane.transaction() as connection:
        connection.execute(
            "UPDATE backups SET held_until = 'infinity', hold_reason = 'case 7' WHERE tenant_id = %s", (pair.tenant_id,)
        )
    arguments = (pair.b.settings, pair.control_plane, pair.b.objects, pair.tenant_id)
    with pytest.raises(Refused, match="case 7"):
        deletion.delete(*arguments, reason="asked", requested_by="test")
    assert sweep(pair.a) == []
    assert move_disk.has_left(pair.a.paths)


def test_a_deletion_does_not_wait_for_a_machine_that_is_said_to_be_gone_and_the_receipt_says_so(pair: Pair) -> None:
    """Its volume was destroyed after the move: nobody could ever delete the tenant."""
    perform(pair)
    arguments = (pair.b.settings, pair.control_plane, pair.b.objects, pair.tenant_id)
    with pytest.raises(Refused, match="machine-z keeps nothing"):
        deletion.delete(*arguments, reason="asked", requested_by="test", machines_gone=["machine-z", A])
    done = deletion.delete(*arguments, reason="asked", requested_by="test", machines_gone=[A])
    assert done.erased and f"machine {A}, said to be gone for good" in done.receipt
    assert [s.done for s in sweep(pair.a)] == ["removed"], "it was there after all"
    assert not pair.a.paths.root.exists()


def test_a_source_that_died_holding_writes_lets_them_in_without_the_control_plane_unless_it_has_left(
    pair: Pair,
) -> None:
    """While PostgreSQL is away nobody else can have been told to serve a tenant that is still here."""
    move_disk.write(pair.a.paths, move_disk.Moving(str(uuid4()), pair.tenant_id, A, B, generation=1))
    fence = Fence(pair.a.paths, Mark(pair.tenant_id, "move", 1, 1, 1, 0.0))
    fence.raise_(1.0)
    fence.leave_locked()
    move_disk.leave(pair.a.paths)
    assert [s.done for s in sweep_disk(pair.a.settings)] == ["left to the journal of moves"]
    move_disk.come_back(pair.a.paths)
    with pytest.raises(InMaintenance):
        pair.a.write("held")
    assert [s.done for s in sweep_disk(pair.a.settings)] == ["it had not left: writes are let in"]
    pair.a.write("three")
    assert sweep_disk(pair.a.settings) == [] and not pair.a.paths.moving.exists()


def test_the_source_keeps_its_files_for_their_time_and_never_removes_a_tenant_that_came_back(pair: Pair) -> None:
    """The one thing worse than keeping too long."""
    first = perform(pair)
    assert sweep(pair.a) == []
    assert move_disk.has_left(pair.a.paths)
    perform(pair)
    with pair.control_plane.transaction() as connection:
        connection.execute("UPDATE moves SET remove_after = '2000-01-01' WHERE tenant_id = %s", (pair.tenant_id,))
    assert move_journal.get(pair.control_plane, first.move_id).removed_at is not None
    assert sweep(pair.a) == []
    assert [s.done for s in sweep(pair.b)] == ["removed"]
    assert pair.a.rows() == ["one", "two"]
    with pytest.raises(Permanent, match="active database"):
        move_disk.remove(pair.a.settings, pair.a.paths)


def test_a_handle_that_was_open_through_it_all_writes_where_the_tenant_is(pair: Pair) -> None:
    """Away, removed, and back: the lock file and the first generation's number are others then."""
    from shared.engine.database import TenantDatabase
    from shared.engine.memories import NewMemory, create

    handle = TenantDatabase(pair.a.paths)
    with handle.read():
        pass
    perform(pair)
    with pair.control_plane.transaction() as connection:
        connection.execute("UPDATE moves SET remove_after = '2000-01-01' WHERE tenant_id = %s", (pair.tenant_id,))
    sweep(pair.a)
    with pytest.raises(TenantDatabaseUnavailable), handle.write():
        pass
    perform(pair)
    with handle.write() as connection:
        create(connection, NewMemory("three"))
    handle.close()
    assert pair.a.rows() == ["one", "two", "three"]


def test_usage_is_complete_only_when_the_source_brought_in_the_last_of_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is spooled at the source is drained there, perhaps later."""
    monkeypatch.setattr("shared.watermark.CLOCKS_SECONDS", 600.0)  # or it passed the move on a slow machine
    for world in (pair.a, pair.b):
        world.settings.spool_dir.mkdir(parents=True)
    until = datetime.now(UTC) - timedelta(hours=1)
    with pair.control_plane.transaction() as connection:
        connection.execute("DELETE FROM usage_watermarks WHERE machine_id = ANY (%s)", ([A, B],))

    def complete() -> datetime | None:
        return watermark.of_tenant(pair.control_plane, pair.b.settings, pair.tenant_id)

    perform(pair)
    assert complete() is None, "the source never said anything"
    pair.control_plane.execute("usage_watermark_set", machine_id=A, complete_until=until)
    assert complete() == until
    sweep(pair.a)
    assert complete() == until, "requests of just before the move may still be in the air"
    with pair.control_plane.transaction() as connection:
        connection.execute(
            "UPDATE moves SET routed_at = routed_at - interval '1 hour' WHERE tenant_id = %s", (pair.tenant_id,)
        )
    sweep(pair.a)  # an idle machine has nothing to drain, and says so
    said = complete()
    assert said is not None and said > until


def test_two_moves_of_a_tenant_at_once_are_one(pair: Pair) -> None:
    """The second is refused by the mutex on the same machine, and by the journal from anywhere."""
    chosen = pair.plan()

    def again(_: Departure) -> None:
        with pytest.raises(LeaseHeld):
            pair.plan()
        with pytest.raises(LeaseHeld):
            depart(pair.a, chosen)
        with pytest.raises(LeaseHeld, match="moved already"):
            begin = {"requested_by": "", "reason": "", "flow_run_id": None}
            move_journal.begin(pair.control_plane, uuid4(), pair.tenant_id, A, "machine-c", **begin)  # type: ignore[arg-type]

    perform(pair, again)
    assert pair.serving() is pair.b


@pytest.mark.parametrize("target", [A, "nowhere"])
def test_a_move_to_nowhere_changes_nothing(pair: Pair, target: str) -> None:
    """To itself it is refused at once; where nobody takes it up it is given up before anything is held."""
    if target == A:
        with pytest.raises(Refused, match="already"):
            move_plan.plan(pair.a.settings, pair.control_plane, pair.tenant_id, A)
        return
    chosen = move_plan.plan(pair.a.settings, pair.control_plane, pair.tenant_id, target)
    settings = pair.a.settings.model_copy(update={"move_wait_seconds": 0.1})
    world = World(settings, pair.control_plane, pair.a.objects, pair.tenant_id)
    with pytest.raises(Permanent, match="still copied"):
        depart(world, chosen)
    check_undone(pair, chosen.move_id)


def test_a_damaged_copy_is_refused_by_the_target_and_the_source_serves_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts are compared with the manifest even when the bytes are whole."""
    chosen, failed = pair.plan(), []

    def damage(departure: Departure) -> None:
        row = move_journal.get(pair.control_plane, departure.plan.move_id)
        with pair.control_plane.transaction() as connection:
            connection.execute(
                "UPDATE backups SET manifest = manifest || '{\"memories\": 3}' WHERE backup_id = %s",
                (row.first_backup_id,),
            )
        with pytest.raises(CorruptBackup, match="its manifest says") as raised:
            arrive(pair.b, departure.plan.move_id)
        failed.append(raised.value)

    with pytest.raises(Permanent, match="its manifest says"):
        depart(pair.a, chosen, damage)
    assert failed
    check_undone(pair, chosen.move_id)
