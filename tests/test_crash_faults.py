"""What is worse than dying: a disk that says EIO or is full, a process stopped and continued around a swap."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared import lease
from shared.control_plane import ControlPlane
from shared.errors import DrainTimeout, EngramError, LeaseHeld
from shared.fence import RestoreMutex
from shared.objects import ObjectStore
from shared.sweep import sweep_disk, sweep_records
from tests.core_fixtures import LIVE, OLD, World, new_world, settings_in, start_child, wait_until
from tests.crash_fixtures import VARIANTS, Point, Runner, traced_world
from tests.disk_fixtures import file_system
from tests.live_writer import Seen, Writer, dump
from tests.restore_fixtures import begun, check_unlocked, check_whole, expire_lease, perform, previous, run, state_of
from tests.test_crash_points import Judge, row_of

pytest_plugins = ("tests.core_fixtures",)


def fail_at_each(world: World, variant: str, calls: set[str], error: str, only: str = "") -> Counter[str]:
    """Each such call fails once, in a run of its own: the same process goes on and restores."""
    backup, outcomes = Seen(world.paths).active, Counter[str]()
    with Runner(world) as runner, Writer(world) as writer:
        judge = Judge(world, writer, backup)
        points: list[Point] = [p for p in runner.points(variant, only) if p.call in calls]
        if os.environ.get("ENGRAM_CRASH_POINTS") != "all":
            points = [p for p in points if p.call != "pwrite64" or p.nth % 3 == 0]  # most fill a new -shm
        for point in points:
            for _ in range(2 if variant == "undo" else 1):
                perform(world)
            judge.begin(variant)
            running = runner.start(variant, f"{point.call}:error={error}:when={point.nth}")
            said = next(running)
            outcome = judge.outcome(runner.calls())
            outcomes[f"{said.split(':')[0]}, {outcome}"] += 1
            assert not world.paths.mark.exists(), (point, said)
            judge.writer_goes_on()
            assert world.lease_holder() is None, (point, said)
            assert row_of(world, runner.restore_id) in (
                {"restored"} if outcome == "new" else {"failed", "put_back", "refused"}
            ), (point, said)
            if said == "done":
                assert outcome == ("old" if variant == "put-back" else "new")
                assert list(running) == ["exit 0"]
            else:
                runner.resume()
                assert list(running) == ["again", "exit 0"], (point, said)
                outcomes["the same process restored"] += 1
            settings = world.settings.model_copy(update={"lease_seconds": 0.001})
            assert all(swept.ok for swept in [*sweep_disk(settings), *sweep_records(settings, world.control_plane)])
            check_whole(world)
    print(f"\n{variant}, {error}: {len(points)} points, {dict(outcomes)}")
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_fsync_that_fails_leaves_old_or_new_unlocked_and_nothing_held(
    tmp_path: Path, control_plane_url: str, variant: str
) -> None:
    """EIO at every fsync: never reported as done unless it is, no lock stays with the process that lives on."""
    with traced_world(tmp_path, control_plane_url) as world:
        outcomes = fail_at_each(world, variant, {"fsync", "fdatasync"}, "EIO")
    assert sum(outcomes.values()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_disk_full_at_any_call_leaves_old_or_new_unlocked_and_nothing_held(
    tmp_path: Path, control_plane_url: str, variant: str
) -> None:
    """ENOSPC at everything that can want space."""
    wants_space = {"write", "pwrite64", "symlink", "mkdir", "rename", "openat", "ftruncate", "fallocate"}
    with traced_world(tmp_path, control_plane_url) as world:
        outcomes = fail_at_each(world, variant, wants_space, "ENOSPC", only=r"^(?!.*O_RDONLY)(?!.*O_RDWR\|O_NOFOLLOW)")
    assert sum(outcomes.values()) > 20


@pytest.mark.slow
def test_a_small_disk_that_is_full_refuses_a_restore_and_keeps_the_old_database(
    tmp_path: Path, control_plane_url: str
) -> None:
    """With less room than a restore needs, down to none: old until it fits, then new, and never locked for good."""
    (tmp_path / "objects").mkdir()
    settings = settings_in(tmp_path / "data", control_plane_url, object_store_url=(tmp_path / "objects").as_uri())
    with file_system(tmp_path / "data", "size=2m"), ControlPlane(settings) as control_plane:
        world = new_world(settings.data_dir, control_plane_url, control_plane)
        world.settings, world.objects = settings, ObjectStore(settings)
        world.write(*(f"old {n} " + "x" * 500 for n in range(200)))
        world.back_up()
        world.write("live")
        before, outcomes = Seen(world.paths), Counter[str]()
        filler = settings.data_dir / "filler"
        for free_kib in range(0, 1200, 24):
            fill(filler, free_kib * 1024)
            try:
                run(world, begun(world))
            except (OSError, EngramError) as e:
                filler.unlink()  # to read it, SQLite needs a little room
                assert all(swept.ok for swept in sweep_disk(settings))
                check_unlocked(world)
                now = Seen(world.paths)
                outcomes[f"{type(e).__name__}, {'old' if now.generation == before.generation else 'new'}"] += 1
                if now.generation != before.generation:  # it was full when it came to the verification
                    assert (now.bak, len(now.active.memories)) == (before.active, 200)
                else:
                    assert (now.bak, now.active) == (before.bak, before.active)
                before = now
            else:
                break
        filler.unlink()
        assert dump(world.paths.backup) == before.active
        assert len(world.rows()) == 200
        check_whole(world)
    print(f"\nfull disk: {dict(outcomes)}, restored with {free_kib} KiB free")
    assert sum(outcomes.values()) > 5


def fill(file: Path, free_bytes: int) -> None:
    with file.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            filler.truncate(max(0, filler.tell() - free_bytes))


def test_a_full_disk_does_not_leave_the_mutex_with_a_process_that_lives_on(
    backed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resident sweep would otherwise lock out every restore until it is restarted."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            RestoreMutex(backed.paths)
    perform(backed)


@contextmanager
def stopped(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A child that has stopped itself by SIGSTOP."""
    child = start_child(
        "import os, signal, sys\nstop = lambda: os.kill(os.getpid(), signal.SIGSTOP)\n" + code, *arguments
    )
    try:
        wait_until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
        yield child
    finally:
        child.kill()
        child.wait()


WRITER = """
import fcntl
from pathlib import Path
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.tenant import TenantPaths
tenants, tenant_id, where = sys.argv[1:]
def stop_before(module, name, at):
    real = getattr(module, name)
    def call(*arguments, **more):
        if where == at and (name != "flock" or arguments[1] == (fcntl.LOCK_UN if "commit" in at else SHARED)):
            setattr(module, name, real)
            stop()
        return real(*arguments, **more)
    if where == at:
        setattr(module, name, call)
SHARED = fcntl.LOCK_SH | fcntl.LOCK_NB
tenant = TenantDatabase(TenantPaths.of(Path(tenants), tenant_id))
with tenant.read() as connection:
    connection.execute("SELECT 1")
stop_before(fcntl, "flock", "before the lock")
stop_before(os, "readlink", "after the lock")
stop_before(os, "access", "before the mark is looked for")
stop_before(fcntl, "flock", "after the commit")
with tenant.write() as connection:
    memories.create(connection, memories.NewMemory("stopped"))
    if where == "inside the transaction":
        stop()
if where == "before the acknowledgement":
    stop()
print("acknowledged", flush=True)
"""


@pytest.mark.parametrize(
    "where", ["after the lock", "before the mark is looked for", "inside the transaction", "after the commit"]
)
def test_a_writer_stopped_inside_the_fence_keeps_the_restore_out(backed: World, where: str) -> None:
    """It may commit the moment it is continued: so nothing is swapped under it, and its row is live."""
    with stopped(WRITER, backed.settings.tenants_dir, backed.tenant_id, where) as child:
        links = Seen(backed.paths).generation
        chosen = begun(backed.change(restore_drain_timeout_seconds=0.3))
        with pytest.raises(DrainTimeout):
            run(backed, chosen)
        assert (Seen(backed.paths).generation, state_of(backed, chosen)) == (links, "failed")
        assert not backed.paths.mark.exists()
        assert backed.lease_holder() is None
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=20)[0] == "acknowledged\n"
    assert (backed.rows(), previous(backed)) == ([*LIVE, "stopped"], None)
    perform(backed)
    assert (backed.rows(), previous(backed)) == (OLD, [*LIVE, "stopped"])


@pytest.mark.parametrize(
    ("where", "rows", "bak"),
    [("before the lock", [*OLD, "stopped"], LIVE), ("before the acknowledgement", OLD, [*LIVE, "stopped"])],
)
def test_a_writer_stopped_outside_the_fence_goes_on_with_the_new_database(
    backed: World, where: str, rows: list[str], bak: list[str]
) -> None:
    """What it wrote before is in `.bak`, what it writes after is live, and the old file takes nothing any more."""
    with stopped(WRITER, backed.settings.tenants_dir, backed.tenant_id, where) as child:
        perform(backed)
        kept = dump(backed.paths.backup)
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=20)[0] == "acknowledged\n"
    assert dump(backed.paths.backup) == kept
    assert (backed.rows(), previous(backed)) == (rows, bak)
    check_unlocked(backed)


RESTORER = """
from pathlib import Path
from shared import generation, lease, restore
from shared.control_plane import ControlPlane
from shared.objects import ObjectStore
from tests.core_fixtures import World, settings_in
from tests.restore_fixtures import begun, run
directory, url, tenant_id, where = sys.argv[1:]
settings = settings_in(Path(directory), url)
world = World(settings, ControlPlane(settings), ObjectStore(settings), tenant_id)
def stop_before(module, name, at):
    real = getattr(module, name)
    def call(*arguments, **more):
        stop()
        return real(*arguments, **more)
    if where == at:
        setattr(module, name, call)
stop_before(lease, "renew", "before the proof")
stop_before(generation, "activate", "after the proof")
stop_before(restore, "verify", "after the swap")
try:
    run(world, begun(world))
except Exception as e:
    print(f"@{type(e).__name__}", flush=True)
else:
    print("@done", flush=True)
"""


@pytest.mark.parametrize(
    ("where", "end"), [("before the proof", "LeaseLost"), ("after the proof", "done"), ("after the swap", "done")]
)
def test_a_restore_stopped_until_its_lease_is_anothers_never_mixes(backed: World, where: str, end: str) -> None:
    """Before the proof it must give up; after it, the mutex has kept everybody else of this machine out."""
    url = backed.settings.control_plane_url.get_secret_value()
    with stopped(RESTORER, backed.settings.data_dir, url, backed.tenant_id, where) as child:
        expire_lease(backed)
        lease.acquire(backed.control_plane, backed.tenant_id, holder="successor", reason="x", seconds=60)
        with pytest.raises(LeaseHeld):
            perform(backed)
        assert sweep_disk(backed.settings) == []
        child.send_signal(signal.SIGCONT)
        assert f"@{end}\n" in child.communicate(timeout=20)[0]
    assert (backed.rows(), previous(backed)) == ((OLD, LIVE) if end == "done" else (LIVE, None))
    assert not backed.paths.mark.exists()
    assert backed.lease_holder() == "successor"
    backed.write("after")
    assert lease.release(backed.control_plane, backed.tenant_id, "successor")
    check_unlocked(backed)
    check_whole(backed)
