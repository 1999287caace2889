"""A restore, a put-back or an undo in a process of its own under strace, with a fault at a chosen call."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

import obstore
import psycopg_pool
import pytest

from shared import plan as planning
from shared import restore
from shared.control_plane import ControlPlane
from shared.errors import CorruptDatabase
from shared.objects import ObjectStore
from shared.plan import Plan
from shared.restore import Released, Swapped, Verified
from shared.tenant import TenantPaths
from tests.core_fixtures import World, new_world, settings_in, start_child
from tests.restore_fixtures import begun, run, running

assert obstore and psycopg_pool  # loaded before the fork, once

# Between two of these nothing in the directory changes, so dying there is dying at the next of them.
CALLS = (
    "openat,write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,symlink,symlinkat,link,linkat,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,flock,fcntl"
)
_TO_THE_TEST = "@ "  # the rest of stdout is the log
VARIANTS = ("restore", "put-back", "undo")


def undo(world: World, chosen: Plan) -> Released:
    """As `flows.restore_undo` does it."""
    with running(world, chosen) as hold:
        staged = restore.copy_previous(hold, chosen)
        taken = restore.lock(staged, holder=f"undo {chosen.restore_id}", reason="test")
        swapped = restore.swap(staged, taken)
        try:
            verified = restore.verify(swapped)
        except CorruptDatabase:
            restore.release(chosen, taken, restore.verify(restore.put_back(swapped)))
            raise
        return restore.release(chosen, taken, verified)


def plan_of(world: World, variant: str) -> Plan:
    if variant == "undo":
        return planning.plan_undo(world.settings, world.control_plane, world.tenant_id)
    return begun(world)


def perform_variant(world: World, variant: str, chosen: Plan) -> None:
    """A restore, an undo, or a restore whose first verification is made to fail, so that it puts back."""
    if variant == "undo":
        undo(world, chosen)
    elif variant == "restore":
        run(world, chosen)
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CorruptDatabase, match="made to fail"):
            patch.setattr(restore, "verify", _fail_once(restore.verify))
            run(world, chosen)


def _fail_once(real: Callable[[Swapped], Verified]) -> Callable[[Swapped], Verified]:
    calls: list[Verified] = []

    def verify(swapped: Swapped) -> Verified:
        calls.append(real(swapped))
        if len(calls) == 1:
            raise CorruptDatabase("made to fail")
        return calls[-1]

    return verify


def zygote() -> None:
    """`variant` on stdin → a forked child that plans, waits for SIGUSR1 and runs it; twice when it fails."""
    directory, url, tenant_id = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                _child(line.strip(), directory, url, tenant_id)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _say(f"exit {code}")


def _child(variant: str, directory: str, url: str, tenant_id: str) -> None:
    settings = settings_in(Path(directory), url)
    world = World(settings, ControlPlane(settings), ObjectStore(settings), tenant_id)
    chosen = plan_of(world, variant)
    _say(f"ready {os.getpid()} {chosen.restore_id}")
    signal.sigwait({signal.SIGUSR1})
    try:
        perform_variant(world, variant, chosen)
    except Exception as e:  # noqa: BLE001 what the injected error became is the test's to judge
        _say(f"failed {type(e).__name__}: {' '.join(str(e).split())}")
        signal.sigwait({signal.SIGUSR1})
        run(world, begun(world))  # the same process, which goes on living, can restore
        _say("again")
    else:
        _say("done")


def _say(word: str) -> None:
    print(f"{_TO_THE_TEST}{word}", flush=True)


class Point(NamedTuple):
    """The `nth` time that a call is made in the tenant's directory."""

    call: str
    nth: int


class Runner:
    """Runs a variant in a fresh process, optionally under strace with an injection."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._log = world.settings.data_dir / "strace.log"
        code = "from tests import crash_fixtures; crash_fixtures.zygote()"
        url = world.settings.control_plane_url.get_secret_value()
        arguments = (world.settings.data_dir, url, world.tenant_id)
        self._zygote = start_child(code, *arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.restore_id = ""
        self.pid = 0

    def start(self, variant: str, inject: str = "") -> Iterator[str]:
        """Start and yield what the process says, line by line; `exit CODE` is the last."""
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(f"{variant}\n")
        self._zygote.stdin.flush()
        _, pid, self.restore_id = self._line().split()
        self.pid = int(pid)
        command = ["strace", "-f", "-y", "-ttt", "-s", "0", "-o", str(self._log), "-e", f"trace={CALLS}"]
        command += [f"-P{path}" for path in _paths(self.world.paths)]
        command += ["-e", f"inject={inject}"] if inject else []
        strace = subprocess.Popen([*command, "-p", pid], stderr=subprocess.PIPE, text=True)
        assert strace.stderr is not None
        while "attached" not in (line := strace.stderr.readline()):  # before it, how it resolved our links
            assert line, "strace ended"
        self.resume()
        while not (said := self._line()).startswith("exit"):
            yield said
        self.pid = 0
        strace.stderr.close()
        strace.wait(20)
        yield said

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def _line(self) -> str:
        assert self._zygote.stdout is not None
        for line in self._zygote.stdout:
            if line.startswith(_TO_THE_TEST):
                return line.removeprefix(_TO_THE_TEST).strip()
        raise AssertionError("the zygote is gone")

    def calls(self) -> list[tuple[float, str, str]]:
        """Every call of the last run in the tenant's directory: (time, name, the rest of its line)."""
        found = re.findall(r"^\d+ +([\d.]+) (\w+)(\(.*)$", self._log.read_text(), re.MULTILINE)
        return [(float(at), name, rest) for at, name, rest in found]

    def points(self, variant: str, only: str = "") -> list[Point]:
        """Run it undisturbed and count; the calls whose arguments match `only`. Until its swap, one that puts back is
        a restore like any: its points begin there."""
        said = list(self.start(variant))
        assert said == ["done", "exit 0"], said
        seen = Counter[str]()
        points = []
        swapped = variant != "put-back" or os.environ.get("ENGRAM_CRASH_POINTS") == "all"
        for _, name, rest in self.calls():
            seen[name] += 1
            swapped |= name.startswith("rename") and f'"{self.world.paths.current}"' in rest
            if swapped and re.search(only, rest):
                points.append(Point(name, seen[name]))
        return points

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._zygote.kill()
        self._zygote.wait()


def _paths(paths: TenantPaths) -> list[Path]:
    """Every path a run can touch: strace's filter knows no wildcards."""
    plain = [paths.database, paths.backup, paths.current, paths.mark, paths.lock, paths.restore_lock]
    found = [paths.root, paths.generations, *plain, *(p.with_name(f"{p.name}.tmp") for p in plain)]
    last = max(int(p.name) for p in paths.generations.iterdir() if p.name.isdigit())
    directories = [*paths.generations.iterdir(), paths.generation_dir(last + 1)]
    databases = [paths.restore_file, *(d / "engram.db" for d in directories)]
    found += [*directories, *(d / "engram.db.bak" for d in directories)]
    return found + [db.with_name(db.name + suffix) for db in databases for suffix in ("", "-wal", "-shm", "-journal")]


def why_no_strace() -> str | None:
    """Why strace cannot inject here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "-e", "inject=getpid:retval=1", "true"], capture_output=True, text=True
    )
    return f"strace cannot trace here: {tried.stderr.strip()[:200]}" if tried.returncode else None


@contextmanager
def traced_world(directory: Path, url: str) -> Iterator[World]:
    """A tenant with a backup and one restore behind it, in a control plane of its own."""
    if why := why_no_strace():
        pytest.skip(why)
    with ControlPlane(settings_in(directory, url)) as control_plane:
        world = new_world(directory, url, control_plane)
        world.write("old 1", "old 2")
        world.back_up()
        world.write("live 3")
        run(world, begun(world))
        yield world
