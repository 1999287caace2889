"""SIGKILL of a restoring process at its system calls in the tenant's directory, while another process writes.

The points are counted, not listed: a run under strace without a fault says which calls there are, then the n-th of
each is the last thing a fresh run gets to. ENGRAM_CRASH_POINTS=all runs every one; else those that only read or
lock are thinned out when there are too many, and one that puts back is killed from its swap on, before which it is a
restore like any. `-s` prints the counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.sweep import sweep_disk, sweep_records
from tests.core_fixtures import World, wait_until
from tests.crash_fixtures import VARIANTS, Point, Runner, traced_world
from tests.live_writer import Acknowledged, Dump, Seen, Writer
from tests.restore_fixtures import check_whole, perform

pytest_plugins = ("tests.core_fixtures",)

ALWAYS = {"rename", "renameat", "renameat2", "symlink", "symlinkat", "unlink", "unlinkat", "fsync", "fdatasync"}
ALWAYS |= {"mkdir", "rmdir", "flock", "write", "ftruncate"}
MOST_POINTS = 60


@pytest.fixture
def world(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    with traced_world(tmp_path, control_plane_url) as made:
        yield made


def chosen_points(points: list[Point]) -> list[Point]:
    """All of them, or the ones that change something and an even share of the rest."""
    kept = {p for p in points if p.call in ALWAYS}
    rest = [p for p in points if p not in kept]
    room = MOST_POINTS - len(kept)
    if os.environ.get("ENGRAM_CRASH_POINTS") == "all" or len(rest) <= room:
        return points
    kept |= {rest[i * len(rest) // room] for i in range(room)}
    return [p for p in points if p in kept]


class Judge:
    """Says whether a tenant is old or new, and that the writer's rows are where they must be."""

    def __init__(self, world: World, writer: Writer, backup: Dump) -> None:
        self._world, self._writer, self._backup = world, writer, backup
        self._acknowledged: list[Acknowledged] = []
        self._next = 0

    def begin(self, variant: str) -> None:
        """Look at the tenant as it is before a run."""
        numbers = [a.number for a in self._writer.news()]
        before = Seen(self._world.paths)
        source = before.bak if variant == "undo" else self._backup
        assert before.bak is not None
        assert source is not None
        numbers += before.active.written() + before.bak.written()
        self._next = max(numbers) + 1
        self._before, self._source, self._acknowledged = before, source, []

    def writer_goes_on(self) -> None:
        """Wait for one more acknowledgement."""
        self._acknowledged += self._writer.news()
        wait_until(lambda: bool(new := self._writer.news()) and self._acknowledged.extend(new) is None)

    def outcome(self, run: list[tuple[float, str, str]] | None = None) -> str:
        """`old` or `new`; anything else fails. With the run's calls, when it locked and released counts too."""
        self._acknowledged += self._writer.news()
        before, now = self._before, Seen(self._world.paths)
        if now.generation == before.generation:
            assert now.bak == before.bak
            kept, written = [], now.active.tail(before.active)
        else:
            assert now.bak is not None
            kept, written = now.bak.tail(before.active), now.active.tail(self._source)
        assert kept + written == list(range(self._next, self._next + len(kept) + len(written)))
        fresh = [a for a in self._acknowledged if a.number >= self._next]
        assert all(a.number in (written if a.generation == now.generation else kept) for a in fresh)
        if now.generation == before.generation:
            return "old"
        if run is not None:
            self._check_times(fresh, run, set(kept), set(written))
        return "new"

    def _check_times(
        self, fresh: list[Acknowledged], run: list[tuple[float, str, str]], kept: set[int], written: set[int]
    ) -> None:
        lock, mark = f"<{self._world.paths.lock}>, LOCK_EX", f'("{self._world.paths.mark}")'
        locked = [at for at, call, rest in run if call == "flock" and lock in rest and rest.endswith("= 0")]
        released = [at for at, call, rest in run if call == "unlink" and mark in rest and rest.endswith("= 0")]
        assert locked
        assert all(a.number in kept for a in fresh if a.ended < locked[-1])
        assert all(a.number in written for a in fresh if released and a.begun > released[-1])


def row_of(world: World, restore_id: str) -> str | None:
    with world.control_plane.transaction() as connection:
        row = connection.execute("SELECT state FROM restores WHERE restore_id = %s", (restore_id,)).fetchone()
    return str(row["state"]) if row else None


def sweep(world: World) -> None:
    """One sweep, and nothing of a dead run is left."""
    # A row without a lease is closed when it is older than a lease: it is by now.
    settings = world.settings.model_copy(update={"lease_seconds": 0.001})
    assert all(swept.ok for swept in [*sweep_disk(settings), *sweep_records(settings, world.control_plane)])
    paths = world.paths
    assert not paths.mark.exists()
    assert not list(paths.root.glob("restore.sqlite*"))
    assert paths.restore_lock.stat().st_size == 0
    assert {p.parent for p in paths.generations.glob("*/engram.db")} == {
        p.resolve().parent for p in (paths.database, paths.backup)
    }
    assert world.lease_holder() is None
    assert sweep_disk(settings) == sweep_records(settings, world.control_plane) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_restoring_process_killed_at_any_call_leaves_old_or_new_and_a_sweep_repairs_it(
    world: World, variant: str
) -> None:
    """Readable at once as exactly old or new, every acknowledged write where it belongs, and one sweep unlocks it."""
    backup = Seen(world.paths).active
    with Runner(world) as runner, Writer(world) as writer:
        judge = Judge(world, writer, backup)
        points, at_once, swept, locked, late = runner.points(variant), Counter[str](), Counter[str](), 0, 0
        chosen, last = chosen_points(points), "new"
        for point in chosen:
            for _ in range(2 if (variant, last) == ("undo", "new") else 1):  # else what is undone grows
                perform(world)  # it works after every repair
            judge.begin(variant)
            said = list(runner.start(variant, f"{point.call}:signal=KILL:when={point.nth}"))
            if said == ["done", "exit 0"]:
                late += 1  # the writer's timing saved this run a call
                assert judge.outcome(runner.calls()) == ("old" if variant == "put-back" else "new"), point
                continue
            assert said == ["exit -9"], (point, said)
            first = judge.outcome(runner.calls())
            at_once[first] += 1
            if world.paths.mark.exists():
                locked += 1
            else:
                judge.writer_goes_on()
            sweep(world)
            last = judge.outcome()
            assert last in ({"old", first} if variant == "put-back" else {first}), point
            # No row: it died before it had one, and so before it had the lease.
            closed = {"restored"} if last == "new" else {"failed", "put_back", None}
            assert row_of(world, runner.restore_id) in closed, point
            swept[last] += 1
            judge.writer_goes_on()
            check_whole(world)
    print(
        f"\n{variant}: {len(chosen)} of {len(points)} points; at once {dict(at_once)}; locked until the sweep {locked};"
        f" after it {dict(swept)}; not reached {late}; {dict(Counter(p.call for p in chosen))}"
    )
    assert late < len(chosen) / 10
    assert at_once["old"] > len(chosen) / 6
    assert at_once["new"] > (0 if variant == "put-back" else len(chosen) / 6)
    assert locked > len(chosen) / 20
