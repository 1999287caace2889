"""SIGKILL at every system call on the spool's directory: of the worker that writes, of the drainer that takes over.

The points are counted, not listed: a run under strace without a fault says how often each call is made, then the n-th
of each is the last thing a fresh process gets to.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import spool
from shared.durable import unlink
from shared.spool import Spool
from shared.usage import UsageEvent
from tests.core_fixtures import event, settings_in, start_child
from tests.crash_fixtures import why_no_strace

CALLS = "openat,write,ftruncate,fsync,fdatasync,rename,unlink,mkdir,flock,close"
EVENTS, FULL = 9, 4


def produce(directory: Path) -> None:
    """A worker's life: fill segments, tick, fsync for answers that wait, seal the rest. Says what it acknowledged."""
    producer = Spool(settings_in(directory, "", usage_flush_seconds=3600, usage_flush_events=FULL))
    for number in range(EVENTS):
        producer.append(event(memories_created=number))
        say(f"acknowledged {number}")
        if number == 1:
            producer.sync()
        if number % FULL == 2:
            producer.tick()
    producer.close()


def drain(directory: Path) -> None:
    """What `shared.metering` does with a spool; a line on stdout stands for the COMMIT."""
    spool.adopt(directory / "spool")
    for path in spool.sealed(directory / "spool"):
        content = spool.read(path)
        spool.quarantine(path, content)
        say("committed " + " ".join(str(e.memories_created) for e in content.events))
        unlink(path)


def say(line: str) -> None:
    os.writev(1, [f"\n{line}\n".encode()])  # not a `write`: those are counted; a death may have cut a line of the log


def zygote() -> None:
    """`produce DIRECTORY` or `drain DIRECTORY` on stdin → a forked child that waits for SIGUSR1 and does it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for line in sys.stdin:
        what, directory = line.split()
        pid = os.fork()
        if not pid:
            try:
                say(f"ready {os.getpid()}")
                signal.sigwait({signal.SIGUSR1})
                (produce if what == "produce" else drain)(Path(directory))
            finally:
                os._exit(0)
        say(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


class Runner:
    """Runs `produce` or `drain` in a fresh process under strace."""

    def __init__(self, log: Path) -> None:
        self._log = log
        code = "from tests import test_spool_crash; test_spool_crash.zygote()"
        self._zygote = start_child(code, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def run(self, what: str, directory: Path, inject: str = "") -> tuple[list[str], int]:
        """What it said, and its exit code."""
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(f"{what} {directory}\n")
        self._zygote.stdin.flush()
        pid = self._line().split()[1]
        command = ["strace", "-y", "-s", "0", "-o", str(self._log), "-e", f"trace={CALLS}"]
        command += ["-e", f"inject={inject}"] if inject else []
        strace = subprocess.Popen([*command, "-p", pid], stderr=subprocess.PIPE, text=True)
        assert strace.stderr is not None
        while "attached" not in (line := strace.stderr.readline()):
            assert line, "strace ended"
        os.kill(int(pid), signal.SIGUSR1)
        said = []
        while not (line := self._line()).startswith("exit"):
            said.append(line)
        strace.wait(20)
        strace.stderr.close()
        return said, int(line.split()[1])

    def _line(self) -> str:
        assert self._zygote.stdout is not None
        for line in self._zygote.stdout:
            if line.startswith(("ready", "acknowledged", "committed", "exit")):
                return line.strip()
        raise AssertionError("the zygote is gone")

    def points(self, what: str, directory: Path) -> list[tuple[str, int]]:
        """Every call of an undisturbed run, as (name, its number among those of its name)."""
        said, code = self.run(what, directory)
        assert code == 0, said
        seen = Counter[str]()
        found = []
        for name in re.findall(r"^(\w+)\(", self._log.read_text(), re.MULTILINE):
            seen[name] += 1
            found.append((name, seen[name]))
        return found

    def close(self) -> None:
        self._zygote.kill()
        self._zygote.wait()


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    if why := why_no_strace():
        pytest.skip(why)
    made = Runner(tmp_path / "strace.log")
    yield made
    made.close()


def numbers(lines: list[str], word: str) -> list[int]:
    return [int(n) for line in lines if line.startswith(word) for n in line.split()[1:]]


def left(directory: Path) -> list[UsageEvent]:
    """What a drain finds, in a directory that has nothing else left then."""
    spool.adopt(directory)
    events: list[UsageEvent] = []
    for path in spool.sealed(directory):
        content = spool.read(path)
        assert content.damage == []
        events += content.events
        unlink(path)
    assert [p.name for p in directory.iterdir() if p.is_file()] == []
    return events


@pytest.mark.slow
def test_a_worker_killed_at_any_call_has_lost_nothing_it_acknowledged(runner: Runner, tmp_path: Path) -> None:
    """What was acknowledged, and at most the one event that was about to be, is found once by who adopts it."""
    points = runner.points("produce", tmp_path / "whole")
    assert len(left(tmp_path / "whole" / "spool")) == EVENTS
    beyond = 0
    for at, (call, nth) in enumerate(points):
        directory = tmp_path / str(at)
        said, code = runner.run("produce", directory, f"{call}:signal=KILL:when={nth}")
        assert code == -9, (call, nth, said)
        acknowledged = numbers(said, "acknowledged")
        found = [e.memories_created for e in left(directory / "spool")] if (directory / "spool").exists() else []
        assert sorted(found) == list(range(len(found))), (call, nth)
        assert len(acknowledged) <= len(found) <= len(acknowledged) + 1, (call, nth)
        beyond += len(found) - len(acknowledged)
    print(f"\nworker: killed at {len(points)} points; written and not yet acknowledged at {beyond}")


def spool_of_the_dead(directory: Path) -> None:
    """Sealed, open and damaged segments, an empty one, and an unfinished copy of an open one."""
    settings = settings_in(directory, "", usage_flush_seconds=3600, usage_flush_events=3)
    dead = Spool(settings)
    for number in range(8):
        dead.append(event(memories_created=number))
    dead.tick()
    assert dead._segment is not None
    os.close(dead._segment._fd)
    [open_one] = settings.spool_dir.glob("*.open")
    open_one.with_suffix(".tmp").write_bytes(open_one.read_bytes()[:-1])
    (settings.spool_dir / "0000000000000001-1-aa.tmp").write_bytes(spool.MAGIC)
    raw = spool.sealed(settings.spool_dir)[0].read_bytes()
    spool.sealed(settings.spool_dir)[0].write_bytes(raw[:-1])  # event 2 is torn


@pytest.mark.slow
def test_a_drainer_killed_at_any_call_leaves_every_event_committed_or_for_the_next(
    runner: Runner, tmp_path: Path
) -> None:
    """Committed or still in a segment; both is allowed, for the insert knows the id. Damage is in quarantine."""
    spool_of_the_dead(tmp_path / "whole")
    points = runner.points("drain", tmp_path / "whole")
    both = 0
    for at, (call, nth) in enumerate(points):
        directory = tmp_path / str(at)
        spool_of_the_dead(directory)
        said, code = runner.run("drain", directory, f"{call}:signal=KILL:when={nth}")
        assert code == -9, (call, nth, said)
        committed = numbers(said, "committed")
        again, code = runner.run("drain", directory)
        assert code == 0
        rest = numbers(again, "committed")
        assert len(committed) == len(set(committed))
        assert len(rest) == len(set(rest)), (call, nth)
        assert {*committed, *rest} == {0, 1, 3, 4, 5, 6, 7}, (call, nth)
        both += len({*committed} & {*rest})
        assert [p.name for p in (directory / "spool").iterdir()] == ["quarantine"]
        assert list((directory / "spool" / "quarantine").glob("*.bad")), (call, nth)
    print(f"\ndrainer: killed at {len(points)} points; events committed twice {both}")
