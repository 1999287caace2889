"""One half of a move in a process of its own, killed at a chosen step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import msgspec

from shared import backup, generation, lease, move, move_disk, move_journal, move_plan, move_settle
from shared.control_plane import ControlPlane
from shared.errors import EngramError
from shared.fence import Fence
from tests.core_fixtures import start_child
from tests.move_fixtures import A, Pair, arrive, depart, settings_of

# Where a run is killed: before or after one of these. In the order of a move.
STEPS: dict[str, tuple[Any, str]] = {
    "begin": (move_journal, "begin"),
    "copy": (move, "_back_up"),
    "step": (move_journal, "step"),
    "lock": (lease, "acquire"),
    "mark": (move_disk, "write"),
    "raise": (Fence, "raise_"),
    "leave": (move_disk, "leave"),
    "route": (move_journal, "route"),
    "forget": (move_settle, "left_for_good"),
    "room": (move_disk, "make_room"),
    "fetch": (backup, "fetch"),
    "prepare": (generation, "prepare"),
    "arrive": (move_disk, "arrive"),
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
            chosen = move_plan.plan(world.settings, control_plane, tenant_id, target)
            depart(world, msgspec.structs.replace(chosen, move_id=UUID(move_id)))
        else:
            target, move_id = text.split(",")
            arrive(pair.world(target), UUID(move_id))


class Half:
    """A process that runs one half of a move when told to."""

    def __init__(self, pair: Pair) -> None:
        code = "from tests import move_processes; move_processes.zygote()"
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
