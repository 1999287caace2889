"""A move in which something fails or dies: exactly one machine serves afterwards, and no write is lost."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

from shared import lease, move, move_disk, move_journal
from shared.control_plane import ControlPlane
from shared.departure import Departure
from shared.errors import (
    ControlPlaneUnavailable,
    EngramError,
    LeaseLost,
    Permanent,
    Refused,
)
from tests import restore_fixtures
from tests.core_fixtures import contents_of, sampled, wait_until
from tests.move_fixtures import (
    A,
    B,
    Pair,
    arrive,
    check_one_serves,
    depart,
    perform,
    row_is_there,
    stubborn,
    sweep,
)
from tests.move_processes import STEPS, Half

pytest_plugins = ("tests.core_fixtures", "tests.move_fixtures")


def test_a_route_needs_the_lease_and_a_move_nobody_gave_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two proofs in its transaction; each alone stops it, and the tenant comes back."""
    real = move_journal.route

    def without_lease(control_plane: ControlPlane, *more: object) -> None:
        with control_plane.transaction() as connection:
            connection.execute("UPDATE maintenance_locks SET holder = 'x' WHERE tenant_id = %s", (pair.tenant_id,))
        try:
            real(control_plane, *more)  # type: ignore[arg-type]
        finally:
            lease.release(control_plane, pair.tenant_id, "x")

    def given_up(control_plane: ControlPlane, row: move_journal.Row, *more: object) -> None:
        move_journal.undo(control_plane, row.move_id, "by the target")
        real(control_plane, row, *more)  # type: ignore[arg-type]

    for broken, error in ((without_lease, LeaseLost), (given_up, Permanent)):
        monkeypatch.setattr(move_journal, "route", broken)
        with pytest.raises(error):
            perform(pair)
        assert pair.serving() is pair.a
        assert not pair.b.paths.root.exists()
    pair.a.write("after")


def test_when_the_reply_to_the_route_is_lost_nobody_writes_until_it_is_known(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been decided: letting writes in again at the source would be a guess."""
    real = move_journal.route
    away = [True]

    def lost(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise ControlPlaneUnavailable("the connection broke")

    def get(control_plane: ControlPlane, move_id: object) -> move_journal.Row:
        if away[0] and threading.current_thread() is threading.main_thread() and move_disk.has_left(pair.a.paths):
            raise ControlPlaneUnavailable("still away")
        return get_(control_plane, move_id)  # type: ignore[arg-type]

    get_ = move_journal.get
    monkeypatch.setattr(move_journal, "route", lost)
    monkeypatch.setattr(move_journal, "get", get)
    with stubborn(pair) as writers:
        wait_until(lambda: len(writers[0].acknowledged) > 3)
        with pytest.raises(ControlPlaneUnavailable):
            perform(pair)
        assert move_disk.has_left(pair.a.paths)
        away[0] = False
        assert all(s.ok for s in sweep(pair.a))
        check_one_serves(pair, writers)
    assert pair.serving() is pair.b
    assert sweep(pair.a) == sweep(pair.b) == []


# Where a half of a move can die and leave something else behind: which half, step, before or after, its nth call.
DEATHS = [
    "source begin after 1",
    "source copy after 1",
    "source step after 1",
    "source lock after 1",
    "source mark after 1",
    "source raise after 1",
    "source step after 2",
    "source step after 3",
    "source raise after 2",
    "source leave after 1",
    "source route after 1",
    "source forget after 1",
    "target room after 1",
    "target mark after 1",
    "target step after 1",
    "target fetch after 1",
    "target step after 2",
    "target prepare after 1",
    "target mark after 2",
    "target step after 3",
    "target arrive before 1",
    "target arrive after 1",
    "target done after 1",
]
IN_CI = (
    "source copy after 1",
    "source raise after 1",
    "source step after 3",
    "source leave after 1",
    "source route after 1",
    "target step after 1",
    "target prepare after 1",
    "target step after 3",
    "target arrive before 1",
    "target arrive after 1",
)
ALONE = DEATHS[:2]  # before there is anything for the target to fetch
DECIDED = {"source route", "source forget", "target arrive", "target done"}
EITHER = "target step after 3"  # it is ready, and the source may route before a sweep gives up: both are whole


@pytest.fixture
def halves(pair: Pair) -> Iterator[tuple[Half, Half]]:
    """A process for each half of a move."""
    with Half(pair) as source, Half(pair) as target:
        yield source, target


def test_killed_at_any_step_a_move_is_finished_or_undone_by_the_sweeps_and_no_write_is_lost(
    pair: Pair, halves: tuple[Half, Half]
) -> None:
    """SIGKILL of either half at each step, with writers on both machines that go on regardless. Before a sweep at most
    one machine can be used; after it exactly the one the control plane names."""
    ended = {"done": 0, "undone": 0}
    with stubborn(pair) as writers:
        for death in sampled(DEATHS, *IN_CI):
            role, *point = death.split()
            source, target, move_id = pair.serving(), pair.other(), uuid4()
            from_, to = source.settings.machine_id, target.settings.machine_id
            halves[0].start("source", f"{from_},{to},{move_id}", point if role == "source" else ())
            wait_until(lambda: row_is_there(pair, move_id))  # noqa: B023
            if death not in ALONE:
                halves[1].start("target", f"{to},{move_id}", point if role == "target" else ())
            dead, other = halves if role == "source" else halves[::-1]
            assert dead.end() == "exit -9", death
            assert not (pair.can_use(pair.a) and pair.can_use(pair.b)), death
            assert all(s.ok for world in (source, target) for s in sweep(world)), death
            if death not in ALONE:
                other.end()
            assert all(s.ok for world in (source, target) for s in sweep(world)), (
                death
            )  # what the other half left to it
            state = pair.state(move_id)
            if death != EITHER:
                assert state == ("done" if " ".join((role, point[0])) in DECIDED else "undone"), death
            assert pair.serving() is (target if state == "done" else source), death
            check_one_serves(pair, writers)
            count = len(writers[pair.serving() is pair.b].acknowledged)
            wait_until(lambda: len(writers[pair.serving() is pair.b].acknowledged) > count)  # noqa: B023
            assert source.lease_holder() is None, death
            assert sweep(source) == sweep(target) == [], death
            ended[state] += 1
        check_one_serves(pair, writers)
    print(f"\n{ended}; {sum(len(w.acknowledged) for w in writers)} writes acknowledged, 0 lost")
    perform(pair)


@pytest.mark.parametrize("step", ["copy", "lock", "raise", "leave", "route", "prepare"])
def test_a_step_that_fails_gives_everything_back_by_itself(
    pair: Pair, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sweep is needed for a run that lives; a full disk at any step is no reason to refuse writes for long."""
    owner, name = STEPS[step]
    monkeypatch.setattr(owner, name, failing_once(getattr(owner, name)))
    chosen = pair.plan()
    try:
        if step == "copy":
            with pytest.raises(OSError, match="no space"):
                depart(pair.a, chosen)
        else:
            with pytest.raises((OSError, EngramError)):
                perform(pair)
    finally:
        monkeypatch.undo()
    assert pair.serving() is pair.a
    pair.a.write("after")
    assert contents_of(pair.a.paths.database)[-1] == "after"
    assert pair.a.lease_holder() is None and not pair.b.paths.root.exists()
    assert sweep(pair.a) == sweep(pair.b) == []
    perform(pair)
    assert pair.b.rows() == ["one", "two", "after"]


def failing_once(real: Callable[..., object]) -> Callable[..., object]:
    calls: list[None] = []

    def fail(*arguments: object, **more: object) -> object:
        calls.append(None)
        if len(calls) == 1:
            raise OSError(28, "no space left")
        return real(*arguments, **more)

    return fail


def test_the_target_does_not_serve_before_the_control_plane_says_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ready is not routed: nobody can use what was prepared."""
    seen: list[bool] = []
    real = move_disk.leave

    def look(paths: object) -> None:
        seen.append(pair.can_use(pair.b))
        real(paths)  # type: ignore[arg-type]
        seen.extend((pair.can_use(pair.a), pair.can_use(pair.b)))

    monkeypatch.setattr(move_disk, "leave", look)
    perform(pair)
    assert seen == [False, False, False]


def test_a_move_takes_a_tenant_up_after_a_dead_restore_was_settled(pair: Pair) -> None:
    """The mark of a restore that died says more than that of a move: it must be acted on, not written over."""
    made = pair.a.back_up()
    pair.a.write("three")
    chosen = restore_fixtures.begun(pair.a, made)
    with pytest.raises(KeyboardInterrupt), restore_fixtures.running(pair.a, chosen) as hold:
        restore_fixtures.swap(pair.a, hold, chosen)
        assert hold.fence is not None
        hold.fence.leave_locked()  # as a process leaves it that is killed here
        hold.fence = None
        hold.mutex.release()
        perform_after_death(pair)
        raise KeyboardInterrupt
    assert pair.serving() is pair.b
    assert pair.b.rows() == ["one", "two"]


def perform_after_death(pair: Pair) -> None:
    lease.release_dead(pair.control_plane, pair.tenant_id)
    perform(pair)


def test_a_control_plane_that_goes_away_while_writes_are_held_does_not_hold_them_longer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the tenant has left, nobody else can serve it: letting writes in again needs nobody's word."""

    def away(*_: object, **__: object) -> None:
        raise ControlPlaneUnavailable("away")

    chosen = pair.plan()
    with monkeypatch.context() as patch:
        real = move_disk.write
        patch.setattr(move_disk, "write", lambda *a: (patch.setattr(move_journal, "undo", away), real(*a)))
        patch.setattr(move, "_step", lambda d, state, **_: away() if state == "held" else None)
        patch.setattr(move, "wait_staged", lambda _, copied: copied)
        with pytest.raises(ControlPlaneUnavailable):
            depart(pair.a, chosen)
        pair.a.write("three")
    assert pair.state(chosen.move_id) == "copying"
    assert [s.ok for s in sweep(pair.a)] == [True]
    assert pair.state(chosen.move_id) == "undone" and pair.serving() is pair.a
    perform(pair)
    assert pair.b.rows() == ["one", "two", "three"]


def test_files_on_the_target_that_no_move_left_there_are_not_touched(pair: Pair) -> None:
    """What an arrival that is given up removes is its own; the source is told at once."""
    pair.b.paths.generation_dir(1).mkdir(parents=True)
    kept = pair.b.paths.generation_dir(1) / "engram.db"
    kept.write_text("somebody's")
    chosen = pair.plan()
    refused: list[Refused] = []

    def try_it(_: Departure) -> None:
        with pytest.raises(Refused) as raised:
            arrive(pair.b, chosen.move_id)
        refused.append(raised.value)

    with pytest.raises(Permanent, match="no move left there"):
        depart(pair.a, chosen, try_it)
    assert refused and kept.read_text() == "somebody's"
    pair.a.write("three")


def test_a_target_that_lost_its_disk_after_the_route_says_which_backup_holds_all_of_it(
    pair: Pair, halves: tuple[Half, Half]
) -> None:
    """The worst moment for a machine to be replaced by an empty one; nothing is lost, and the way out is a restore."""
    move_id = uuid4()
    halves[0].start("source", f"{A},{B},{move_id}")
    wait_until(lambda: row_is_there(pair, move_id))
    halves[1].start("target", f"{B},{move_id}", ("arrive", "before", "1"))
    assert halves[1].end() == "exit -9"
    shutil.rmtree(pair.b.paths.root)
    *_, left = sweep(pair.b)
    row = move_journal.get(pair.control_plane, move_id)
    assert not left.ok and f"engram restore {pair.tenant_id} --backup {row.final_backup_id}" in left.done
    assert move_disk.has_left(pair.a.paths), "the source keeps its files until the target serves"
    lease.release_dead(pair.control_plane, pair.tenant_id)  # or its end, a minute later
    restore_fixtures.perform(pair.b)
    assert sweep(pair.b)[-1].done == f"done, machine {B} serves it"
    assert halves[0].end() == "exit 0"
    assert pair.b.rows() == ["one", "two"]


def test_a_return_that_is_given_up_leaves_the_earlier_stay_as_it_was(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files kept there wait for their time, and whoever asks there is told of maintenance, not of a broken file."""
    perform(pair)
    pair.b.write("three")
    kept = sorted(pair.a.paths.generations.iterdir())
    monkeypatch.setattr(move_disk, "leave", failing_once(move_disk.leave))
    with pytest.raises(OSError, match="no space"):
        perform(pair)
    assert pair.serving() is pair.b and not pair.can_use(pair.a)
    assert sorted(pair.a.paths.generations.iterdir()) == kept
    marker = move_disk.read(pair.a.paths)
    assert marker is not None and marker.settled and marker.target == B
    assert sweep(pair.a) == sweep(pair.b) == []
    perform(pair)
    assert pair.a.rows() == ["one", "two", "three"]
