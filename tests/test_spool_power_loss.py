"""What a power loss costs: an ext4 that is shut down under a worker's spool (see `tests.test_power_loss`).

The child appends as fast as it can, fsyncs as the gateway does, and reports through a pipe what it acknowledged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from shared import spool
from tests.core_fixtures import start_child
from tests.test_power_loss import Disk, cut_the_power, disk

assert disk  # a fixture
pytestmark = pytest.mark.slow
ROUNDS = 8 if os.environ.get("ENGRAM_CRASH_POINTS") == "all" else 1

ASYNC = """
    import os, sys, time
    from pathlib import Path
    from gateway.periodic import Periodic
    from shared.spool import Spool
    from tests.core_fixtures import event, settings_in
    settings = settings_in(Path(sys.argv[1]), "", usage_flush_events=700)
    producer, numbers = Spool(settings), 0

    def tick():
        before = numbers
        os.write(1, b"tick %.6f\\n" % time.time())
        producer.tick()
        os.write(1, b"ended %.6f\\n" % time.time())
        if not producer._sealing and not producer._segment._suspect:
            os.write(1, b"synced %d\\n" % before)

    Periodic("spool", min(settings.usage_fsync_seconds, settings.usage_flush_seconds) / 2, tick).start()
    while True:
        producer.append(event(memories_created=numbers))
        os.write(1, b"acknowledged %d %.6f\\n" % (numbers, time.time()))
        numbers += 1
        time.sleep(0.0005)
"""

SYNC = """
    import asyncio, itertools, os, sys, time
    from pathlib import Path
    from gateway.durable import GroupSync
    from gateway.periodic import Periodic
    from shared.errors import SpoolUnavailable
    from shared.spool import Spool
    from tests.core_fixtures import event, settings_in
    settings = settings_in(Path(sys.argv[1]), "", usage_fsync_seconds=0.1, usage_flush_events=700)
    producer, numbers = Spool(settings), itertools.count()

    async def requests(group):
        while True:
            number = next(numbers)
            one = event(memories_created=number)
            try:
                await group.append(one, one)
            except SpoolUnavailable:
                os.write(1, b"refused %d\\n" % number)
                return
            os.write(1, b"acknowledged %d %.6f\\n" % (number, time.time()))

    async def main():
        group = GroupSync(producer)
        await asyncio.gather(*(requests(group) for _ in range(16)))

    Periodic("spool", 0.05, producer.tick).start()
    asyncio.run(main())
"""


@dataclass
class Outcome:
    """`acknowledged` says when each event was, by its number; `synced` events were before a tick that succeeded;
    `ticks` are when those before the cut began and ended, the cut being the end of the last."""

    acknowledged: dict[int, float]
    synced: int
    refused: int
    read: set[int]
    cut_at: float
    ticks: list[tuple[float, float]]

    @property
    def lost(self) -> list[int]:
        return [n for n, at in self.acknowledged.items() if at < self.cut_at and n not in self.read]

    @property
    def longest_between_seconds(self) -> float:
        """From the begin of a tick to the end of the next one."""
        return max(end - begin for (begin, _), (_, end) in pairwise(self.ticks))


def lose_power(
    disk: Disk, code: str, log_path: Path, seconds: float, enough: Callable[[list[str]], bool], *, ends: bool
) -> Outcome:
    """After so long and when enough was said, be the disk as slow as it may. `ends`: by itself, on the dead disk."""
    with log_path.open("wb") as log:
        child = start_child(code, disk.directory, stderr=log)
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        assert lines[0], log_path.read_text()
        end = time.monotonic() + seconds
        while time.monotonic() < end or not enough(lines):
            lines.append(child.stdout.readline())
            assert lines[-1], log_path.read_text()
        cut_at = time.time()
        cut_the_power(disk.directory)
        killing = threading.Timer(60 if ends else 0.1, child.kill)  # it goes on for a while, on a dead disk
        killing.start()
        lines += child.stdout.readlines()
        killing.cancel()
        child.wait()
    disk.unmount()
    disk.mount()
    # Two threads that log at once may end both their lines after the second: then one is empty.
    words = [line.split() for line in lines if line.endswith("\n") and line.strip()]
    read: list[int] = []
    spool.adopt(disk.directory / "spool")
    for path in spool.sealed(disk.directory / "spool"):
        read += [e.memories_created for e in spool.read(path).events]
        path.unlink()
    assert len(read) == len(set(read))
    begun, ended = ([float(w[1]) for w in words if w[0] == what and float(w[1]) < cut_at] for what in ("tick", "ended"))
    return Outcome(
        {int(w[1]): float(w[2]) for w in words if w[0] == "acknowledged"},
        max((int(w[1]) for w in words if w[0] == "synced"), default=0),
        sum(w[0] == "refused" for w in words),
        set(read),
        cut_at,
        list(zip(begun, [*ended, cut_at], strict=False)),
    )


def some_synced(lines: list[str]) -> bool:
    return any(line.startswith("synced ") and line != "synced 0\n" for line in lines)


def test_async_loses_at_most_what_came_after_the_last_tick_began(disk: Disk, tmp_path: Path) -> None:
    """Ticks begin half of `usage_fsync_seconds` (0.5 s) after one another; what was appended before one that succeeded
    is on the disk. So README's bound holds while a tick takes less than the other half, and what is lost is younger
    than two ticks and what was between them."""
    for round_number in range(ROUNDS):
        seconds = 3.0 + 0.03 * round_number  # longer than the bound, by far
        found = lose_power(disk, ASYNC, tmp_path / "log", seconds, some_synced, ends=False)
        assert found.synced > 0
        assert set(range(found.synced)) <= found.read
        ages = [found.cut_at - found.acknowledged[n] for n in found.lost]
        print(
            f"async: {len(found.acknowledged)} acknowledged, {found.synced} before the last tick, {len(found.lost)}"
            f" lost, the oldest {max(ages, default=0) * 1000:.0f} ms old (a tick every 250 ms), at most"
            f" {found.longest_between_seconds * 1000:.0f} ms from the begin of one to the end of the next"
        )
        assert max(ages, default=0.0) <= found.longest_between_seconds


def test_sync_loses_nothing_that_was_acknowledged_and_refuses_what_it_cannot_make_durable(
    disk: Disk, tmp_path: Path
) -> None:
    """16 requests at once share the fsyncs; on the dead disk each of them is refused, none told OK."""
    for round_number in range(ROUNDS):
        seconds = 0.8 + 0.23 * round_number
        found = lose_power(disk, SYNC, tmp_path / "log", seconds, lambda lines: len(lines) > 32, ends=True)
        assert len(found.acknowledged) > 16
        assert found.lost == []
        # The ioctl is not one instant as a real cut is: what was in flight in it may be told OK and be lost.
        assert len(found.acknowledged.keys() - found.read) <= 16
        assert found.refused == 16
        print(f"sync: {len(found.acknowledged)} acknowledged, {len(found.read)} read back, none lost")
