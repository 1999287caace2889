"""Power loss, really: an ext4 in a file, shut down without flushing its journal, mounted again.

Everything that was not fsynced, file and directory entry, is gone. Needs root and loop mounts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.control_plane import ControlPlane
from shared.objects import ObjectStore
from shared.sweep import sweep_disk, sweep_records
from tests.core_fixtures import World, new_world, settings_in, start_child
from tests.live_writer import Dump, Seen, Writer
from tests.restore_fixtures import check_unlocked, check_whole, perform
from tests.test_crash_points import row_of

pytest_plugins = ("tests.core_fixtures",)
pytestmark = pytest.mark.slow

RUN = """
    import os, sys
    from pathlib import Path
    import obstore, psycopg, psycopg_pool  # before the fork, to load them once
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore
    from tests.core_fixtures import World, settings_in
    from tests.restore_fixtures import begun, run
    from tests.test_restore_faults import fault
    from tests.test_power_loss import cut_the_power
    directory, objects, url, tenant_id = sys.argv[1:]

    def lose_power(nth):
        settings = settings_in(Path(directory), url, object_store_url=Path(objects).as_uri())
        world = World(settings, ControlPlane(settings), ObjectStore(settings), tenant_id)
        chosen = begun(world)
        print(f"@{chosen.restore_id}", flush=True)
        def off(name):
            cut_the_power(Path(directory))
            os._exit(7)
        with fault(off, nth, after=False):
            run(world, chosen)
        cut_the_power(Path(directory))

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                lose_power(int(line))
            finally:
                os._exit(0)
        print(f"@exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)
"""


def cut_the_power(directory: Path) -> None:
    """ext4's shutdown ioctl, without a flush of its journal; says when."""
    fd = os.open(directory, os.O_RDONLY)
    print(f"@{time.time()}", flush=True)
    fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
    os.close(fd)


@dataclass
class Disk:
    """An ext4 on a loop device that can be mounted again after its shutdown."""

    image: Path
    directory: Path

    def mount(self) -> None:
        tried = subprocess.run(
            ["mount", "-o", "loop", str(self.image), str(self.directory)], capture_output=True, text=True
        )
        if tried.returncode:
            pytest.skip(f"no loop mounts here: {tried.stderr.strip()[:200]}")

    def unmount(self) -> None:
        for _ in range(100):
            if subprocess.run(["umount", str(self.directory)], capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        subprocess.run(["umount", "-l", str(self.directory)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    made = Disk(tmp_path / "disk.img", tmp_path / "disk")
    made.directory.mkdir()
    with made.image.open("wb") as image:
        image.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(made.image)], check=True)
    made.mount()
    try:
        yield made
    finally:
        made.unmount()


@contextmanager
def world_on(disk: Disk, url: str, objects: Path) -> Iterator[World]:
    objects.mkdir()
    settings = settings_in(disk.directory, url, object_store_url=objects.as_uri())
    with ControlPlane(settings) as control_plane:
        world = new_world(disk.directory, url, control_plane)
        world.settings, world.objects = settings, ObjectStore(settings)
        world.write("old 1", "old 2")
        world.back_up()
        world.write("live 3")
        perform(world)
        yield world


def lose_power(runner: subprocess.Popen[str], nth: int) -> tuple[str, float, bool]:
    """A restore that loses power before its nth step, or right after its end: its id, when, whether it said done."""
    assert runner.stdin is not None
    assert runner.stdout is not None
    runner.stdin.write(f"{nth}\n")
    runner.stdin.flush()
    said: list[str] = []
    while not (said and said[-1].startswith("exit")):
        line = runner.stdout.readline()
        assert line, said
        said += [line[1:].strip()] if line.startswith("@") else []
    restore_id, cut_at, code = said
    return restore_id, float(cut_at), code == "exit 0"


def written(now: Seen, before: Seen, backup: Dump) -> tuple[str, list[int]]:
    """`old` or `new`, and the writer's numbers beyond `before` in the order of their writing."""
    if now.generation == before.generation:
        assert now.bak == before.bak
        return "old", now.active.tail(before.active)
    assert now.bak is not None
    return "new", now.bak.tail(before.active) + now.active.tail(backup)


def test_power_lost_at_any_step_of_a_restore_leaves_old_or_new_and_every_acknowledged_write(
    disk: Disk, tmp_path: Path, control_plane_url: str
) -> None:
    """After the machine is up again: old or new, new if the restore said done; what was acknowledged is there."""
    outcomes, locked, told_after = Counter[str](), 0, 0
    objects = tmp_path / "objects"
    with world_on(disk, control_plane_url, objects) as world:
        arguments = (disk.directory, objects, control_plane_url, world.tenant_id)
        runner = start_child(RUN, *arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        backup = Seen(world.paths).active
        for nth in range(1, 200, 1 if os.environ.get("ENGRAM_CRASH_POINTS") == "all" else 2):
            perform(world)
            before = Seen(world.paths)
            assert before.active == backup
            acknowledged = tmp_path / f"acknowledged {nth}"
            with Writer(world, acknowledged) as writer:
                restore_id, cut_at, done = lose_power(runner, nth)
            news = writer.news()
            disk.unmount()
            disk.mount()
            locked += world.paths.mark.exists()
            settings = world.settings.model_copy(update={"lease_seconds": 0.001})
            assert all(swept.ok for swept in [*sweep_disk(settings), *sweep_records(settings, world.control_plane)])
            outcome, numbers = written(Seen(world.paths), before, backup)
            assert numbers == list(range(len(numbers)))
            # The ioctl is not one instant as a real cut is: what was in flight in it may be told OK and be lost.
            lost = [a for a in news if a.number >= len(numbers)]
            assert len(lost) <= 1, (nth, cut_at, lost)
            assert not [a for a in lost if a.ended < cut_at], (nth, cut_at, lost)
            for a in lost:
                print(
                    f"told OK {(a.ended - cut_at) * 1000:.1f} ms after the cut, begun {(a.begun - cut_at) * 1000:.1f}"
                )
            told_after += len(lost)
            row = row_of(world, restore_id)  # None: it lost power before it wrote one
            assert row == "restored" if outcome == "new" else row in {None, "failed"}, nth
            assert outcome == "new" or not done
            outcomes[outcome] += 1

            check_unlocked(world)
            check_whole(world)
            if done:
                break
        runner.kill()
        runner.wait()
    print(
        f"\npower lost at {outcomes.total()} of {nth} points: {dict(outcomes)}, locked until the sweep {locked},"
        f" acknowledged after the cut and lost {told_after}"
    )
    assert done
    assert outcomes["old"] > 10
    assert outcomes["new"] > 5


PUT = """
    import hashlib, os, sys
    from pathlib import Path
    from shared.objects import ObjectStore
    from tests.core_fixtures import settings_in
    from tests.test_power_loss import cut_the_power
    directory, count = Path(sys.argv[1]), 0

    def counted(real, nth):
        def call(*arguments, **options):
            global count
            count += 1
            if count == nth:
                cut_the_power(directory)
                os._exit(7)
            return real(*arguments, **options)
        return call

    def put_some(nth):
        store = ObjectStore(settings_in(directory / "data", "", object_store_url=(directory / "objects").as_uri()))
        for name in ("fsync", "link", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name), nth))
        for tenant in (f"a{nth}", f"a{nth}", f"b{nth}"):
            path, data = directory / "data" / f"{tenant}.sqlite", os.urandom(300_000)
            path.write_bytes(data)
            key, digest = f"tenants/{tenant}/db/{hashlib.sha256(data).hexdigest()}", hashlib.sha256(data).hexdigest()
            store.put_file(key, path, digest)
            print("+" + key, flush=True)
            path.unlink()
        cut_the_power(directory)

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                put_some(int(line))
            finally:
                os._exit(0)
        print(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)
"""


def test_power_lost_at_any_step_of_storing_keeps_every_object_that_was_said_to_be_stored(disk: Disk) -> None:
    """A catalogue row is written next: its object and the directories on the way to it must be there, and whole."""
    for name in ("data", "objects"):
        (disk.directory / name).mkdir()
    subprocess.run(["sync", "-f", str(disk.directory)], check=True)
    child = start_child(PUT, disk.directory, stdin=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    stored: set[str] = set()
    died = finished = 0
    try:
        for nth in range(1, 60):
            child.stdin.write(f"{nth}\n")
            child.stdin.flush()
            while not (line := child.stdout.readline().strip()).startswith("exit"):
                assert line, child.poll()
                stored |= {line[1:]} if line.startswith("+") else set()
            disk.unmount()
            disk.mount()
            root = disk.directory / "objects"
            there = {str(f.relative_to(root)): f for f in root.rglob("*") if f.is_file() and "#" not in f.name}
            assert stored <= there.keys()
            for key, file in there.items():
                assert hashlib.sha256(file.read_bytes()).hexdigest() == Path(key).name
            died, finished = died + line.endswith("7"), line.endswith("0")
            if finished:
                break
    finally:
        child.stdin.close()
        child.wait(30)
    assert finished and died >= 12
