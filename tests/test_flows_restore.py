"""A restore or an undo that fails at any step, through real Prefect: old or new is served, unlocked, with its cause."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import pytest
from prefect.client.schemas.objects import State

from flows import restore as restore_flow
from flows import undo as undo_flow
from flows.sweep import sweep
from shared import backup, fence, generation, lease, previous
from shared import plan as planning
from shared import restore as core
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import (
    ControlPlaneUnavailable,
    CorruptBackup,
    CorruptDatabase,
    InMaintenance,
    LeaseHeld,
    LeaseLost,
    ObjectStoreRefused,
    ObjectStoreUnavailable,
    UnknownBackup,
)
from shared.fence import in_use
from shared.objects import ObjectStore
from tests.core_fixtures import World
from tests.restore_fixtures import check_unlocked, check_whole, perform
from tests.test_flows import artifact_of, flow_world  # noqa: F401 - a fixture

# ruff: noqa: F811
pytest_plugins = ("tests.core_fixtures", "tests.flow_fixtures")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("prefect_server")]

Kind = Literal["restore", "undo"]


class Fault(NamedTuple):
    """`owner.name` raises `error` on its first call, before or after its work; `served` is what is active then.

    `row` is what `restores` says: `failed` before the fence was up, `put_back` when it was lowered on the old one.
    """

    owner: Any
    name: str
    error: Exception
    served: Literal["old", "new"] = "old"
    after: bool = False
    argument: str = ""  # only for a call with this one
    row: str = "failed"


AWAY = ControlPlaneUnavailable("fault: control plane away")
BOTH: dict[str, Fault] = {
    "lock: held": Fault(lease, "acquire", LeaseHeld("fault: held"), row="refused"),
    "lock: unreachable": Fault(lease, "acquire", AWAY),
    "lock: granted, the reply lost": Fault(lease, "acquire", AWAY, after=True),
    "lock: not recorded": Fault(ControlPlane, "execute", AWAY, argument="restore_fenced"),
    "swap: prepare": Fault(generation, "prepare", OSError(errno.ENOSPC, "fault: disk full")),
    "swap: prepared": Fault(generation, "prepare", CorruptDatabase("fault: prepared"), after=True),
    "swap: mark": Fault(fence, "write_file", OSError(errno.EIO, "fault: mark")),
    "swap: drained": Fault(fence.Fence, "raise_", LeaseLost("fault: drained"), after=True, row="put_back"),
    "swap: renew": Fault(lease, "renew", LeaseLost("fault: lost"), row="put_back"),
    "swap: record": Fault(ControlPlane, "execute", AWAY, argument="restore_swapping", row="put_back"),
    "swap: rename": Fault(generation, "replace_link", OSError(errno.EIO, "fault: rename"), row="put_back"),
    "swap: fsync after the rename": Fault(
        generation, "replace_link", OSError(errno.EIO, "fault: fsync"), served="new", after=True, row="restored"
    ),
    "verify": Fault(core, "check_active", CorruptDatabase("fault: does not verify"), row="put_back"),
    "verify: verified": Fault(
        core, "check_active", OSError(errno.EIO, "fault: verified"), served="new", after=True, row="restored"
    ),
    "release: not recorded": Fault(core, "finish", CorruptDatabase("fault: record"), served="new", row="restored"),
    "release: lease": Fault(lease, "release", LeaseLost("fault: release"), served="new", row="restored"),
}
RESTORE: dict[str, Fault] = {
    "plan": Fault(planning, "plan", UnknownBackup("fault: no backup"), row=""),
    "download": Fault(core, "download", ObjectStoreUnavailable("fault: store")),
    "download: checked": Fault(core, "download", CorruptBackup("fault: checked"), after=True, row="refused"),
    "safety-backup": Fault(ObjectStore, "put_file", ObjectStoreRefused("fault: full")),
    "safety-backup: registered": Fault(backup, "register", AWAY),
} | BOTH  # fmt: skip
UNDO: dict[str, Fault] = {
    "plan": Fault(planning, "plan_undo", UnknownBackup("fault: nothing before"), row=""),
    "copy": Fault(previous, "copy", OSError(errno.ENOSPC, "fault: disk full")),
    "copy: copied": Fault(core, "copy_previous", CorruptBackup("fault: copied"), after=True, row="refused"),
} | BOTH  # fmt: skip


class Prepared(NamedTuple):
    """A tenant before a restore or an undo: the backup, what is live, and what would come."""

    backup: Backup
    old: list[str]
    new: list[str]
    start: Callable[[], Any]


def prepare(world: World, kind: Kind) -> Prepared:
    world.write("old")
    made = world.back_up()
    world.write("newer")
    if kind == "restore":
        start = partial(restore_flow.restore, world.tenant_id, made.backup_id, return_state=True)
        return Prepared(made, ["old", "newer"], ["old"], start)
    perform(world, made)
    return Prepared(
        made, ["old"], ["old", "newer"], partial(undo_flow.restore_undo, world.tenant_id, return_state=True)
    )


def inject(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    real = getattr(fault.owner, fault.name)
    failed: list[str] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        mine = not failed and (not fault.argument or fault.argument in arguments)
        if mine:
            failed.append(fault.name)
            if not fault.after:
                raise fault.error
        result = real(*arguments, **options)
        if mine:
            raise fault.error
        return result

    patch.setattr(fault.owner, fault.name, failing)
    for step in ("plan", "download", "safety_backup", "release"):
        patch.setattr(getattr(restore_flow, step), "retries", 0)
    for step in ("plan", "copy"):
        patch.setattr(getattr(undo_flow, step), "retries", 0)


def row_of(world: World, state: State[Any]) -> str:
    row = world.control_plane.row("restore_by_flow_run", flow_run_id=str(state.state_details.flow_run_id))
    return str(row["state"]) if row else ""


@pytest.mark.parametrize(
    ("kind", "step"), [*(("restore", step) for step in RESTORE), *(("undo", step) for step in UNDO)]
)
def test_a_run_that_fails_at_a_step_serves_old_or_new_and_holds_nothing(
    flow_world: World, monkeypatch: pytest.MonkeyPatch, kind: Kind, step: str
) -> None:
    """Before the rename the old one, after it the new one that verifies; Failed with its cause; the next one works."""
    world, fault = flow_world, (RESTORE if kind == "restore" else UNDO)[step]
    prepared = prepare(world, kind)
    with monkeypatch.context() as patch:
        inject(patch, fault)
        state: State[Any] = prepared.start()
    assert state.is_failed() and str(fault.error) in str(state.message)
    assert row_of(world, state) == fault.row
    if fault.row:
        assert str(fault.error) in artifact_of(state)
    served = prepared.old if fault.served == "old" else prepared.new
    assert world.rows() == served
    check_unlocked(world)
    check_whole(world)
    world.write("still writable")
    assert perform(world, prepared.backup).outcome == "restored"
    assert world.rows() == ["old"]


@pytest.mark.parametrize("kind", ["restore", "undo"])
def test_a_process_that_stays_inside_keeps_the_restore_out(flow_world: World, kind: Kind) -> None:
    """A real drain time-out: writes flow again at once, nothing was changed."""
    prepared = prepare(flow_world, kind)
    with in_use(flow_world.paths, wait_seconds=1):
        state = prepared.start()
        assert not flow_world.paths.mark.exists()
    assert state.is_failed() and "kept the database in use" in str(state.message)
    assert flow_world.rows() == prepared.old
    check_unlocked(flow_world)
    flow_world.write("still writable")


@pytest.mark.parametrize("kind", ["restore", "undo"])
def test_when_neither_database_verifies_the_tenant_stays_locked_until_the_next_restore(
    flow_world: World, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Nobody may write into a database that is not known to be right; a restore is the way out, and the only one."""
    world, prepared = flow_world, prepare(flow_world, kind)

    def never(*_: Any) -> None:
        raise CorruptDatabase("fault: neither verifies")

    with monkeypatch.context() as patch:
        patch.setattr(core, "check_active", never)
        patch.setattr("shared.repair.check_active", never)
        state = prepared.start()
        assert state.is_failed() and "neither verifies" in str(state.message)
        assert row_of(world, state) == "failed"
        assert world.rows() == prepared.old  # put back, but not trusted
        with pytest.raises(InMaintenance):
            world.write("refused")
        swept = sweep(return_state=True)
        assert swept.is_failed() and f"{world.tenant_id} stays locked" in str(swept.message)
    after = restore_flow.restore(world.tenant_id, prepared.backup.backup_id, return_state=True)
    assert after.is_completed(), after.message
    assert world.rows() == ["old"]
    assert not world.paths.mark.exists() and world.lease_holder() is None
    world.write("writable again")


def test_a_release_whose_control_plane_is_away_is_finished_when_it_comes_back(
    flow_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is safe and served; only the record waits, so the last step is tried again."""
    prepared = prepare(flow_world, "restore")
    give_back, failures = lease.release, list[int]()

    def away_twice(*arguments: Any) -> bool:
        if len(failures) < 2:
            failures.append(1)
            raise AWAY
        return give_back(*arguments)

    monkeypatch.setattr(lease, "release", away_twice)
    state = prepared.start()
    assert state.is_completed() and len(failures) == 2
    assert row_of(flow_world, state) == "restored"
    check_unlocked(flow_world)


def test_a_control_plane_away_from_the_swap_on_is_told_by_the_sweep(
    flow_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are put right without PostgreSQL; its lease and its row are, as soon as it answers."""
    prepared = prepare(flow_world, "restore")
    real = generation.activate

    def last_moment(*arguments: Any) -> None:
        real(*arguments)
        for name in ("rows", "execute", "row"):
            patch.setattr(ControlPlane, name, away)

    def away(*_: Any, **__: Any) -> None:
        raise AWAY

    with monkeypatch.context() as patch:
        patch.setattr(generation, "activate", last_moment)
        patch.setattr(restore_flow.release, "retries", 0)
        state = prepared.start()
    assert state.is_failed() and str(AWAY) in str(state.message)
    assert flow_world.rows() == prepared.new
    flow_world.write("writable without a control plane")
    assert flow_world.lease_holder() is not None and row_of(flow_world, state) == "running"
    assert sweep(return_state=True).is_completed()
    assert row_of(flow_world, state) == "restored"
    check_unlocked(flow_world)
    assert os.environ["ENGRAM_DATA_DIR"] == str(flow_world.settings.data_dir)
