"""Restores that fail or are killed at every step: the tenant is old or new, whole, and unlocked.

The steps are found by counting, not by a list: the n-th call that changes the disk or asks the control plane, for
n = 1, 2, … until a restore comes through. A new step in the code is a new row of the table.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from shared import restore
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, CorruptDatabase
from tests.core_fixtures import World, start_child
from tests.restore_fixtures import begun, check_unlocked, check_whole, expire_lease, perform, previous, run, state_of

pytest_plugins = ("tests.core_fixtures",)

DISK = ("rename", "replace", "symlink", "fsync", "unlink", "mkdir", "rmdir")
OLD = ["old 1", "old 2"]


class Interrupted(BaseException):
    """As Prefect's TerminationSignal: no `except Exception` sees it."""


@contextmanager
def fault(act: Callable[[str], None], nth: int, *, after: bool) -> Iterator[Callable[[], int]]:
    """Call `act(name)` instead of, or after, the n-th counted call; yields the count so far."""
    count = 0

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            mine = count == nth
            if mine and not after:
                act(name)
            result = real(*args, **kwargs)
            if mine and after:
                act(name)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in DISK:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        for name in ("rows", "execute"):
            patch.setattr(ControlPlane, name, wrap(f"control plane {name}", getattr(ControlPlane, name)))
        yield lambda: count


def fail(name: str) -> None:
    if name.startswith("control plane"):
        raise ControlPlaneUnavailable(f"injected in {name}")
    raise OSError(5, f"injected in {name}")


def interrupt(name: str) -> None:
    raise Interrupted(name)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["instead of the step", "after the step"])
@pytest.mark.parametrize("act", [fail, interrupt])
def test_a_restore_that_fails_at_any_step_leaves_a_whole_unlocked_tenant(
    world: World, act: Callable[[str], None], after: bool
) -> None:
    """An error or a cancellation at any call: old or new, `.bak` right, writes flow, the lease is free."""
    world.write(*OLD)
    made, outcomes = world.back_up(), Counter[str]()
    for nth in range(1, 300):
        world.write(f"live {nth}")
        live, bak = world.rows(), previous(world)
        chosen = begun(world, made)
        with fault(act, nth, after=after) as count:
            try:
                run(world, chosen)
                failed = False
            except (OSError, ControlPlaneUnavailable, Interrupted):
                failed = True
        if count() < nth:
            break
        rows = world.rows()
        if rows == OLD:
            assert previous(world) == live
        else:
            assert (rows, previous(world)) == (live, bak)
            assert failed
        if after and world.lease_holder() == f"restore {chosen.restore_id}":
            outcomes["lease left to expire"] += 1  # the grant's reply was lost: nobody knows its epoch
            expire_lease(world, free=True)
        check_unlocked(world)
        check_whole(world)
        assert state_of(world, chosen) in {"failed", "restored", "put_back"}
        outcomes["new" if rows == OLD else "old"] += 1
    assert not failed
    assert outcomes["old"] > 10
    assert outcomes["new"] > 5
    assert outcomes["lease left to expire"] <= 1
    print(f"{act.__name__}, after={after}: {dict(outcomes)}")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import obstore, psycopg, psycopg_pool  # before the fork, to load them once
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore
    from tests.core_fixtures import World, settings_in
    from tests.restore_fixtures import begun, run
    from tests.test_restore_faults import fault

    directory, url, tenant_id = sys.argv[1:]
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            settings = settings_in(Path(directory), url)
            world = World(settings, ControlPlane(settings), ObjectStore(settings), tenant_id)
            chosen = begun(world)
            with fault(lambda name: os.kill(os.getpid(), signal.SIGKILL), int(line), after=False) as count:
                run(world, chosen)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_restore_killed_at_any_step_is_finished_or_undone_by_the_next(world: World) -> None:
    """SIGKILL before each call: readable at once, and after repair exactly old or new, unlocked, restorable."""
    world.write(*OLD)
    world.back_up()
    url = world.settings.control_plane_url.get_secret_value()
    killer = start_child(KILLED, world.settings.data_dir, url, world.tenant_id, stdin=subprocess.PIPE)
    assert killer.stdin is not None
    assert killer.stdout is not None
    at_once, repaired, writable = Counter[str](), Counter[str](), Counter[bool]()
    for nth in range(1, 300):
        perform(world)
        world.write(f"live {nth}")
        live, bak = world.rows(), previous(world)
        killer.stdin.write(f"{nth}\n")
        killer.stdin.flush()
        if (exit_code := int(killer.stdout.readline())) == 0:
            break
        assert exit_code == -signal.SIGKILL
        rows = world.rows()
        assert (rows, previous(world)) in [(OLD, live), (live, bak)]
        at_once["new" if rows == OLD else "old"] += 1
        writable[not world.paths.mark.exists()] += 1
        expire_lease(world)
        with restore.holding(world.settings, world.control_plane, world.tenant_id):
            assert not world.paths.mark.exists()
            assert world.rows() == rows  # what clients may have read meanwhile stays true
        rows = world.rows()
        assert (rows, previous(world)) in [(OLD, live), (live, bak)]
        repaired["new" if rows == OLD else "old"] += 1
        expire_lease(world, free=True)
        check_unlocked(world)
        check_whole(world)
    killer.stdin.close()
    assert killer.wait(20) == exit_code == 0
    assert repaired["old"] > 10
    assert repaired["new"] > 5
    assert writable[False] > 3
    print(f"killed: at once {dict(at_once)}, repaired {dict(repaired)}, writable meanwhile {dict(writable)}")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["no database", "a corrupt database"])
def test_the_first_restore_of_a_lost_or_corrupt_tenant_may_fail_anywhere_and_is_repeated(
    world: World, start: str
) -> None:
    """Without a good database to go back to, the next try must still come through."""
    world.write(*OLD)
    world.back_up()
    for nth in range(1, 300):
        if start == "no database":
            world.paths.current.unlink()
            for name in ("engram.db", "engram.db-wal", "engram.db-shm"):
                for file in world.paths.generations.glob(f"*/{name}"):
                    file.unlink()
        else:
            world.paths.database.resolve().write_bytes(b"corrupt" * 2000)
        chosen = begun(world)
        with (
            fault(fail, nth, after=nth % 2 == 0) as count,
            suppress(OSError, ControlPlaneUnavailable, CorruptDatabase),
        ):
            run(world, chosen)
        done = count() < nth
        assert not world.paths.mark.exists()
        expire_lease(world)
        perform(world)
        assert world.rows() == OLD
        check_whole(world)
        if done:
            break
    assert done
    assert nth > 20
