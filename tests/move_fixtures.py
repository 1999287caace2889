"""Two machines that share a control plane and an object store, a move between them, and writers that are not told.

`Pair` has the machines `a` and `b`, each a `World` of the same tenant. `Stubborn` writes to one machine's files for as
long as it is let, whatever the control plane says: a gateway whose snapshot of the routes never learns anything.

Taken in with `pytest_plugins = ("tests.core_fixtures", "tests.move_fixtures")`. (PYTEST_DONT_REWRITE: it is imported
before pytest could rewrite its assertions.)
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from uuid import UUID

import pytest

from shared import move, move_arrive, move_journal, move_plan, move_settle, registry
from shared.control_plane import ControlPlane
from shared.departure import Departure, leaving
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.errors import EngramError, InMaintenance, TenantDatabaseUnavailable
from shared.move import Moved
from shared.move_arrive import Arrived
from shared.move_plan import MovePlan
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.sweep import Swept, sweep_disk, sweep_records
from tests.core_fixtures import World, contents_of, settings_in, wait_until

A, B = "machine-a", "machine-b"


def settings_of(directory: Path, url: str, machine_id: str, **more: object) -> Settings:
    quick = {"move_wait_seconds": 20, "move_hold_seconds": 20, "lease_seconds": 5}
    return settings_in(
        directory / machine_id,
        url,
        machine_id=machine_id,
        object_store_url=(directory / "objects").as_uri(),
        **(quick | more),
    )


@dataclass
class Pair:
    """A tenant on machine A, and machine B."""

    directory: Path
    url: str
    control_plane: ControlPlane
    tenant_id: str
    a: World = field(init=False)
    b: World = field(init=False)

    def __post_init__(self) -> None:
        (self.directory / "objects").mkdir(exist_ok=True)
        self.a, self.b = self._world(A), self._world(B)

    def _world(self, machine_id: str) -> World:
        settings = settings_of(self.directory, self.url, machine_id)
        return World(settings, self.control_plane, ObjectStore(settings), self.tenant_id)

    def world(self, machine_id: str) -> World:
        return self.a if machine_id == A else self.b

    def serving(self) -> World:
        """The machine that the control plane names."""
        return self.world(registry.get(self.control_plane, self.tenant_id).machine_id)

    def other(self) -> World:
        return self.b if self.serving() is self.a else self.a

    def plan(self) -> MovePlan:
        source, target = self.serving(), self.other()
        return move_plan.plan(source.settings, self.control_plane, self.tenant_id, target.settings.machine_id)

    def state(self, move_id: UUID) -> str:
        return move_journal.get(self.control_plane, move_id).state

    def can_use(self, world: World) -> bool:
        """Whether a process of that machine can read the tenant."""
        try:
            database = TenantDatabase(world.paths, lock_wait_seconds=0.2)
        except TenantDatabaseUnavailable:
            return False
        try:
            with database.read():
                return True
        except (InMaintenance, TenantDatabaseUnavailable):
            return False
        finally:
            database.close()


def new_pair(directory: Path, url: str, control_plane: ControlPlane, tenant_id: str) -> Pair:
    pair = Pair(directory, url, control_plane, tenant_id)
    registry.create(control_plane, pair.a.settings, tenant_id)
    return pair


def depart(world: World, chosen: MovePlan, between: Callable[[Departure], None] = lambda _: None) -> Moved:
    """The source's half as the flow runs it; `between`, once the first copy is made."""
    with leaving(world.settings, world.control_plane, chosen, requested_by="test", reason="test") as departure:
        copied = move.copy(departure, world.objects)
        between(departure)
        move.wait_staged(departure, copied)
        taken = move.lock(departure, reason="test")
        held = move.final_copy(departure, world.objects, copied, taken)
        return move.release(departure, move.route(departure, move.fence(departure, held)))


def arrive(world: World, move_id: UUID) -> Arrived:
    """The target's half as the flow runs it, from the moment there is something to fetch."""
    wait_until(lambda: _state(world, move_id) not in (None, "copying"))
    with move_arrive.arriving(world.settings, world.control_plane, str(move_id)) as arrival:
        staged = move_arrive.stage(arrival, world.objects)
        return move_arrive.serve(arrival, move_arrive.receive(arrival, world.objects, staged))


def _state(world: World, move_id: UUID) -> str | None:
    row = world.control_plane.row("move_get", move_id=move_id)
    return str(row["state"]) if row is not None else None


def perform(pair: Pair, between: Callable[[Departure], None] = lambda _: None) -> Moved:
    """A whole move, both halves at once."""
    chosen, target = pair.plan(), pair.other()
    failed: list[BaseException] = []

    def half() -> None:
        try:
            arrive(target, chosen.move_id)
        except (EngramError, OSError) as e:
            failed.append(e)

    thread = threading.Thread(target=half)
    thread.start()
    try:
        moved = depart(pair.serving(), chosen, between)
    finally:
        thread.join(30)
    assert not thread.is_alive()
    assert not failed, failed
    return moved


def sweep(world: World) -> list[Swept]:
    """What the resident process of a machine does."""
    settings = world.settings
    found = [*sweep_disk(settings), *sweep_records(settings, world.control_plane)]
    return [*found, *move_settle.sweep_moves(settings, world.control_plane)]


class Stubborn:
    """Writes to one machine's files without end and notes what was acknowledged; it never looks at the routes."""

    def __init__(self, world: World, name: str) -> None:
        self.acknowledged: list[str] = []
        self.refused = 0
        self._paths, self._name = world.paths, name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name=f"stubborn-{name}")

    def _write(self) -> None:
        database: TenantDatabase | None = None
        number = 0
        while not self._stop.is_set():
            content = f"{self._name}{number}"
            try:
                database = database or TenantDatabase(self._paths, lock_wait_seconds=0.1)
                with database.write() as connection:
                    memories.create(connection, memories.NewMemory(content))
            except (InMaintenance, TenantDatabaseUnavailable):
                self.refused += 1
                time.sleep(0.005)
                continue
            self.acknowledged.append(content)
            number += 1
            time.sleep(0.01)
        if database is not None:
            database.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)


@contextmanager
def stubborn(pair: Pair) -> Iterator[list[Stubborn]]:
    """One on each machine."""
    with ExitStack() as stack:
        yield [stack.enter_context(Stubborn(world, name)) for world, name in ((pair.a, "a"), (pair.b, "b"))]


def check_one_serves(pair: Pair, writers: list[Stubborn]) -> World:
    """Exactly the machine that the control plane names can use the tenant; it holds each acknowledged write once."""
    serving, other = pair.serving(), pair.other()
    assert pair.can_use(serving)
    assert not pair.can_use(other)
    acknowledged = {content for writer in writers for content in list(writer.acknowledged)}  # first: writers go on
    contents = contents_of(serving.paths.database)
    assert acknowledged <= set(contents), sorted(acknowledged - set(contents))[:5]
    assert len(contents) == len(set(contents))
    return serving


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(move_journal, "_SLOW_SECONDS", 0.02)


@pytest.fixture
def pair(tmp_path: Path, core_url: str, core_control_plane: ControlPlane, quick_looks: None) -> Pair:
    """A tenant with two rows on machine A, and machine B."""
    made = new_pair(tmp_path, core_url, core_control_plane, f"t{secrets.token_hex(6)}")
    made.a.write("one", "two")
    return made


def check_undone(pair: Pair, move_id: UUID) -> None:
    """The tenant is where it was, takes writes, and nothing of the move is left."""
    assert pair.serving() is pair.a and pair.state(move_id) == "undone"
    pair.a.write("after")
    assert pair.a.rows()[-1] == "after"
    assert pair.a.lease_holder() is None
    assert not pair.a.paths.mark.exists() and not pair.a.paths.moving.exists()
    assert not pair.b.paths.root.exists()


def row_is_there(pair: Pair, move_id: UUID) -> bool:
    return pair.control_plane.row("move_get", move_id=move_id) is not None
