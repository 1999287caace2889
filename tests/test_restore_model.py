"""A tenant's life in any order, against a model of two lists: the live rows, and the rows of `.bak`."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from shared import plan as planning
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import ControlPlaneUnavailable, InMaintenance, Permanent
from shared.fence import Fence, RestoreMutex
from shared.hold import Hold
from shared.plan import Plan
from shared.sweep import sweep_disk, sweep_records
from tests.core_fixtures import World, contents_of, new_world, settings_in
from tests.crash_fixtures import undo
from tests.restore_fixtures import check_unlocked, check_whole, run
from tests.test_restore_faults import Interrupted, fail, fault, interrupt

pytest_plugins = ("tests.core_fixtures",)
pytestmark = pytest.mark.slow


# An example fsyncs hundreds of times, for each of which a disk that others use too may take long; it is processes that
# die here, not machines.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Died(BaseException):
    """Stands for SIGKILL: nothing of the run acts any more, and the kernel drops its locks."""


class TenantLife(RuleBasedStateMachine):
    """Every rule changes the tenant and the model alike; the invariants compare them."""

    url = ""
    control_plane: ControlPlane

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.world: World = new_world(Path(self._directory.name), self.url, self.control_plane)
        self.tenant = TenantDatabase(self.world.paths, lock_wait_seconds=0)
        self.active: list[str] = []
        self.bak: list[str] | None = None
        self.backups: list[tuple[Backup, list[str]]] = []
        self.numbers = itertools.count()
        self.dead = False  # a run died and nobody has swept yet

    def teardown(self) -> None:
        self.tenant.close()
        self._directory.cleanup()

    @rule(count=st.integers(1, 3))
    def write(self, count: int) -> None:
        contents = [f"memory {next(self.numbers)}" for _ in range(count)]
        try:
            with self.tenant.write() as connection:
                for content in contents:
                    memories.create(connection, NewMemory(content, tags=["all"]))
        except InMaintenance:
            assert self.dead
        else:
            self.active += contents

    @precondition(lambda self: self.active)
    @rule(at=st.integers(0, 1000))
    def delete(self, at: int) -> None:
        content = self.active[at % len(self.active)]
        with suppress(InMaintenance):
            with self.tenant.write() as connection:
                connection.execute("DELETE FROM memories WHERE content = ?", (content,))
            self.active.remove(content)

    @precondition(lambda self: len(self.backups) < 4)
    @rule()
    def back_up(self) -> None:
        self.backups.append((self.world.back_up(), list(self.active)))

    @rule()
    def reopen(self) -> None:
        self.tenant.close()
        self.tenant = TenantDatabase(self.world.paths, lock_wait_seconds=0)

    @precondition(lambda self: self.backups)
    @rule(age=st.integers(0, 3))
    def restore(self, age: int) -> None:
        made, rows = self.backups[-1 - age % len(self.backups)]
        run(self.world, self._plan(made))
        self._replaced(rows)

    @rule()
    def undo(self) -> None:
        if self.bak is None:
            with pytest.raises(Permanent):
                self._plan(None)
            return
        undo(self.world, self._plan(None))
        self._replaced(self.bak)

    @precondition(lambda self: self.backups)
    @rule(nth=st.integers(1, 75), after=st.booleans(), how=st.sampled_from(["fails", "is cancelled", "dies"]))
    def restore_that(self, nth: int, after: bool, how: str) -> None:
        made, rows = self.backups[-1]
        self._disturbed(self._plan(made), rows, nth, after, how)

    @precondition(lambda self: self.bak is not None)
    @rule(nth=st.integers(1, 75), after=st.booleans(), how=st.sampled_from(["fails", "is cancelled", "dies"]))
    def undo_that(self, nth: int, after: bool, how: str) -> None:
        assert self.bak is not None
        self._disturbed(self._plan(None), self.bak, nth, after, how)

    @rule()
    def sweep(self) -> None:
        at_once = self.world.settings.model_copy(update={"lease_seconds": 0.001})
        swept = [*sweep_disk(at_once), *sweep_records(at_once, self.control_plane)]
        assert all(found.ok for found in swept)
        check_unlocked(self.world)
        check_whole(self.world)
        self.dead = False

    def _plan(self, made: Backup | None) -> Plan:
        if made is None:
            return planning.plan_undo(self.world.settings, self.control_plane, self.world.tenant_id)
        return planning.plan(
            self.world.settings, self.control_plane, self.world.tenant_id, backup_id=str(made.backup_id)
        )

    def _replaced(self, rows: list[str]) -> None:
        self.bak, self.active, self.dead = self.active, list(rows), False

    def _disturbed(self, chosen: Plan, rows: list[str], nth: int, after: bool, how: str) -> None:
        act = {"fails": fail, "is cancelled": interrupt, "dies": die}[how]
        had_mark = self.world.paths.mark.exists()  # of a dead run, which one that ends on its first steps leaves
        before = self.world.paths.generation()
        mortal = pytest.MonkeyPatch()
        try:
            with fault(act, nth, after=after), suppress(OSError, ControlPlaneUnavailable, Interrupted, Died):
                if how == "dies":
                    make_mortal(mortal)
                (undo if chosen.backup is None else run)(self.world, chosen)
        finally:
            mortal.undo()
            bury()
        if self.world.paths.generation() != before:
            self._replaced(rows)
        has_mark = self.world.paths.mark.exists()
        assert how == "dies" or had_mark or not has_mark
        self.dead = how == "dies" or has_mark
        with self.control_plane.transaction() as connection:  # what time does to a lease
            connection.execute("UPDATE maintenance_locks SET expires_at = clock_timestamp() - interval '1 second'")

    @invariant()
    def rows_are_the_models(self) -> None:
        paths = self.world.paths
        assert contents_of(paths.database) == self.active
        assert (contents_of(paths.backup) if paths.backup.exists() else None) == self.bak
        with self.tenant.read() as connection:
            assert [row[0] for row in connection.execute("SELECT content FROM memories ORDER BY seq")] == self.active


living: list[RestoreMutex | Fence] = []


def die(name: str) -> None:
    Hold.settle = lambda self: None  # type: ignore[method-assign]
    raise Died(name)


def make_mortal(patch: pytest.MonkeyPatch) -> None:
    """Remember what the run holds; after `die` nothing of it cleans up."""
    patch.setattr(Hold, "settle", Hold.settle)
    patch.setattr("shared.hold._record_failure", lambda *_: None)
    for kind in (RestoreMutex, Fence):
        patch.setattr(kind, "__init__", remembering(kind))


def remembering(kind: type[RestoreMutex] | type[Fence]) -> object:
    real = kind.__init__

    def init(self: RestoreMutex | Fence, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        living.append(self)

    return init


def bury() -> None:
    """The kernel closes the descriptors of the dead."""
    while living:
        held = living.pop()
        fd, held._fd = held._fd, -1
        if fd >= 0:
            os.close(fd)


@pytest.fixture
def control_plane(tmp_path: Path, control_plane_url: str) -> Iterator[ControlPlane]:
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as made:
        yield made


def test_any_life_of_a_tenant_keeps_to_the_model(control_plane: ControlPlane, control_plane_url: str) -> None:
    """Writes, backups, restores, undos, faults, deaths and sweeps in any order: rows are where the model says."""
    life = type("Life", (TenantLife,), {"url": control_plane_url, "control_plane": control_plane})
    run_state_machine_as_test(
        life,
        settings=settings(max_examples=30, stateful_step_count=20, suppress_health_check=list(HealthCheck)),
    )
