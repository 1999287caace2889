"""What recording one usage event costs a request.

    python -m tests.bench.spool [RESULT.json] [--rounds 50] [--events 500] [--directory DIR]

The same events by each of these, taking turns round by round, so that whatever else this machine does falls on all of
them. µs an event, medians over the rounds: of wall time, and of the calling thread's CPU time, which a busy machine
changes least and of which the ratios are (not for fsyncs, whose time is the disk's). Read the ratios.

    list append         the frame's bytes, made before, to a list: the floor of anything
    write               the same bytes by a bare `os.write` to an O_APPEND file: the floor of what survives SIGKILL
    frame               msgpack, crc and head, to nowhere
    append              `Spool.append`, its ticker running as in the gateway: async mode, all that a request pays
    write + fdatasync   bare, one after the other: the floor of what survives power loss, one at a time
    sync, N waiting     `GroupSync.append` by N tasks on one event loop, each with its own event at a time

DIR should be on the disk the spool will lie on: a tmpfs has no fdatasync to speak of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gateway.durable import GroupSync
from gateway.periodic import Periodic, stop_all
from shared import spool
from shared.spool import Spool
from shared.usage import UsageEvent
from tests.core_fixtures import event, settings_in

WAITING = (1, 32)
SYNC_SHARE = 10  # a fdatasync is dearer than a write: so many times fewer events a round
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT


Seen = dict[str, list[float]]


class CountingSpool(Spool):
    syncs = 0

    def sync(self, refusals: Iterable[tuple[str, UsageEvent]] = ()) -> list[UsageEvent]:
        self.syncs += 1
        return super().sync(refusals)


class Bench:
    """`ways` maps a name to what brings a number of events to where it says; `events` are reused, ids included."""

    def __init__(self, directory: Path, events: int) -> None:
        self.events = [event(f"tenant-{n % 50}") for n in range(events)]
        self.frames = [spool.frame(each) for each in self.events]
        self.spool = CountingSpool(settings_in(directory, ""))
        self.groups: dict[int, list[float]] = {n: [] for n in WAITING}  # events a sync, by round
        self._list: list[bytes] = []
        self._fd = os.open(directory / "bare", _FLAGS, 0o600)
        self._ticking = Periodic("spool", 0.25, self.spool.tick)
        few = max(64, events // SYNC_SHARE)
        self.ways: dict[str, tuple[Callable[[int], None], int]] = {
            "list append": (self._append_to_list, events),
            "write": (self._write, events),
            "frame": (self._frame, events),
            "append": (self._append, events),
            "write + fdatasync": (self._write_and_sync, few),
            **{f"sync, {n} waiting": (lambda count, n=n: self._sync(count, n), few) for n in WAITING},  # type: ignore[misc]
        }

    def run(self, rounds: int) -> tuple[Seen, Seen]:
        """µs an event of wall and of CPU time, by way and round; the first round warms up and is left out."""
        wall: Seen = {name: [] for name in self.ways}
        cpu: Seen = {name: [] for name in self.ways}
        self._ticking.start()
        for number in range(rounds + 1):
            for name, (way, count) in self.ways.items():
                began = time.perf_counter(), time.thread_time()
                way(count)
                ended = time.perf_counter(), time.thread_time()
                if number:
                    wall[name].append((ended[0] - began[0]) / count * 1e6)
                    cpu[name].append((ended[1] - began[1]) / count * 1e6)
            self._list.clear()
            for path in spool.sealed(self.spool.dir):
                path.unlink()
        stop_all([self._ticking], 15.0)
        self.spool.close()
        return wall, cpu

    def _append_to_list(self, count: int) -> None:
        append = self._list.append
        for data in self.frames[:count]:
            append(data)

    def _write(self, count: int) -> None:
        fd, write = self._fd, os.write
        for data in self.frames[:count]:
            write(fd, data)

    def _frame(self, count: int) -> None:
        frame = spool.frame
        for each in self.events[:count]:
            frame(each)

    def _append(self, count: int) -> None:
        append = self.spool.append
        for each in self.events[:count]:
            append(each)

    def _write_and_sync(self, count: int) -> None:
        for data in self.frames[:count]:
            os.write(self._fd, data)
            os.fdatasync(self._fd)

    def _sync(self, count: int, waiting: int) -> None:
        events = iter(self.events[:count])

        async def answer(group: GroupSync) -> None:
            for each in events:
                await group.append(each, each)

        async def run() -> None:
            group = GroupSync(self.spool)
            await asyncio.gather(*(answer(group) for _ in range(waiting)))

        before = self.spool.syncs
        asyncio.run(run())
        self.groups[waiting].append(count / (self.spool.syncs - before))


def measure(directory: Path, rounds: int, events: int) -> dict[str, Any]:
    bench = Bench(directory, events)
    wall, cpu = bench.run(rounds)
    return {
        "events_a_round": events,
        "rounds": rounds,
        "frame_bytes": statistics.mean(map(len, bench.frames)),
        "wall_us": {name: statistics.median(values) for name, values in wall.items()},
        "cpu_us": {name: statistics.median(values) for name, values in cpu.items()},
        "append_to_list_append": statistics.median(map(_ratio, cpu["append"], cpu["list append"])),
        "append_to_write": statistics.median(map(_ratio, cpu["append"], cpu["write"])),
        "sync_to_write_and_fdatasync": {
            n: statistics.median(map(_ratio, wall[f"sync, {n} waiting"], wall["write + fdatasync"])) for n in WAITING
        },
        "events_a_fdatasync": {n: statistics.median(values) for n, values in bench.groups.items()},
    }


def _ratio(one: float, other: float) -> float:
    return one / other


def show(result: dict[str, Any]) -> None:
    print(f"{'µs an event':20}{'wall':>12}{'CPU':>10}")
    for name, us in result["wall_us"].items():
        print(f"{name:20}{us:12.2f}{result['cpu_us'][name]:10.2f}")
    print(f"append is {result['append_to_list_append']:.0f} × a list append, {result['append_to_write']:.2f} × a write")
    for n in WAITING:
        print(
            f"sync, {n} waiting: {result['events_a_fdatasync'][n]:.1f} events a fdatasync,"
            f" {result['sync_to_write_and_fdatasync'][n]:.2f} × write + fdatasync of each"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "spool.json")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spool-bench-", dir=arguments.directory) as directory:
        result = measure(Path(directory), arguments.rounds, arguments.events)
    arguments.result.write_text(json.dumps(result, indent=2))
    show(result)
    print(f"written to {arguments.result}")


if __name__ == "__main__":
    main()
