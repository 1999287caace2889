"""Two machines that share a control plane and an object store, a move between them, and writers that are not told.

`Pair` has the machines `a` and `b`, each a `World` of the same tenant. `Stubborn` writes to one machine's files for as
long as it is let, whatever the control plane says: a gateway whose snapshot of the routes never learns anything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import msgspec
import pytest

from shared import backup, generation, lease, move, move_arrive, move_journal, move_settle, moving, registry
from shared.control_plane import ControlPlane
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.errors import EngramError, InMaintenance, TenantDatabaseUnavailable
from shared.fence import Fence
from shared.move import Departure, Moved, MovePlan
from shared.move_arrive import Arrived
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.sweep import Swept, sweep_disk, sweep_records
from tests.core_fixtures import World, contents_of, settings_in, start_child, wait_until

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
        return move.plan(source.settings, self.control_plane, self.tenant_id, target.settings.machine_id)

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
    with move.leaving(world.settings, world.control_plane, chosen, requested_by="test", reason="test") as departure:
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
        return depart(pair.serving(), chosen, between)
    finally:
        thread.join(30)
        assert not thread.is_alive()
        assert not failed, failed


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


# Where a run is killed: before or after one of these. In the order of a move.
STEPS: dict[str, tuple[Any, str]] = {
    "begin": (move_journal, "begin"),
    "copy": (move, "_back_up"),
    "step": (move_journal, "step"),
    "lock": (lease, "acquire"),
    "mark": (moving, "write"),
    "raise": (Fence, "raise_"),
    "leave": (moving, "leave"),
    "route": (move_journal, "route"),
    "forget": (move_settle, "left_for_good"),
    "room": (moving, "make_room"),
    "fetch": (backup, "fetch"),
    "prepare": (generation, "prepare"),
    "arrive": (moving, "arrive"),
    "done": (move_journal, "done"),
}


def kill_at(step: str, when: str, nth: int) -> None:
    """Have this process killed before or after the nth call of a step."""
    owner, name = STEPS[step]
    real, calls = getattr(owner, name), [0]

    def killing(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **more)
        if calls[0] == nth and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killing)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(move_journal, "_SLOW_SECONDS", 0.02)


def zygote() -> None:
    """`role ids step when nth` on stdin → a forked child that runs one half of a move, killed there ("-": never)."""
    directory, url, tenant_id = sys.argv[1:]
    move_journal._SLOW_SECONDS = 0.02
    for line in sys.stdin:
        role, text, step, when, nth = line.split()
        pid = os.fork()
        if not pid:
            try:
                _child(Path(directory), url, tenant_id, role, text, (step, when, int(nth)))
            except EngramError as e:
                print(f"failed {type(e).__name__}: {' '.join(str(e).split())}", flush=True)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"exit {code}", flush=True)


def _child(directory: Path, url: str, tenant_id: str, role: str, text: str, point: tuple[str, str, int]) -> None:
    with ControlPlane(settings_of(directory, url, A)) as control_plane:
        pair = Pair(directory, url, control_plane, tenant_id)
        if point[0] != "-":
            kill_at(*point)
        if role == "source":
            source, target, move_id = text.split(",")
            world = pair.world(source)
            chosen = move.plan(world.settings, control_plane, tenant_id, target)
            depart(world, msgspec.structs.replace(chosen, move_id=UUID(move_id)))
        else:
            target, move_id = text.split(",")
            arrive(pair.world(target), UUID(move_id))


class Half:
    """A process that runs one half of a move when told to."""

    def __init__(self, pair: Pair) -> None:
        code = "from tests import move_fixtures; move_fixtures.zygote()"
        self._process = start_child(code, pair.directory, pair.url, pair.tenant_id, stdin=-1, stderr=-3)

    def start(self, role: str, text: str, point: Sequence[str] = ()) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{role} {text} {' '.join(point or ('-', '-', '0'))}\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """How it ended: `exit 0`, `exit -9`, or what failed."""
        assert self._process.stdout is not None
        said = ""
        for line in self._process.stdout:
            if line.startswith("exit"):
                return said or line.strip()
            if line.startswith("failed"):
                said = line.strip()
        raise AssertionError("the process is gone")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
