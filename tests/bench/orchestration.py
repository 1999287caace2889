"""What a day of runs costs the Prefect server, and so what 10,000 and 100,000 tenants cost it.

    python -m tests.bench.orchestration [RESULT.json] [--runs 10] [--idle 60] [--tenants 200]

Prefect as production runs it (`tests.prefect_fixtures`: PostgreSQL, Redis, two replicas, the services, one machine's
workers), real flows through the real worker; the drain's runs in a process of their own, as the drain does it. For each
kind of run, after what an idle server takes in the same time is taken off:

    rows, KB        that a run leaves in the server's database, with its events
    server CPU      of replicas, services, PostgreSQL and Redis, per run
    run CPU         of the worker and the run's own process, per run

A backup is measured without and with tenants, because one run does all tenants of a machine: what it costs the server
must not depend on how many they are. Then the day of a fleet: which runs the product starts, times what each costs.

The machine's speed is in every second here, so read CPU as a share of this one; rows and bytes do not depend on it.
The drain's runs are as short as they can be, so a long one's heartbeats (an event every 30 s) are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from deployments.postgres import EmbeddedPostgres
from shared import log, registry
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.ports import free_ports
from tests.prefect_fixtures import MACHINE, Production, running, start_worker, wait_for

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
SECONDS_A_DAY = 86_400
TENANTS_A_MACHINE = 5_000  # what `tests.bench.fleet` does in one run
EVENT_DAYS = 7  # Prefect's own retention of events
IDLE, ALONE = "idle, a second", "no worker, a s"  # between the two: a machine's workers that ask for runs

DRAIN_RUNS = """
import sys
from flows.metering import metering
for _ in range(int(sys.argv[1])):
    metering(linger_seconds=0.0, run_seconds=1.0)
"""


@dataclass(frozen=True)
class Usage:
    """Totals at one moment."""

    at: float
    rows: dict[str, int]
    sizes: dict[str, int]  # bytes with indexes
    server_cpu: float
    run_cpu: float


@dataclass(frozen=True)
class Measured:
    """What `count` runs did, with what the server does at idle still in it."""

    name: str
    count: float
    before: Usage
    after: Usage
    own_cpu: float  # of run processes that no worker started
    load: float


@dataclass(frozen=True)
class Cost:
    """Of one run, or of one second at idle."""

    name: str
    count: float
    rows: float
    run_bytes: float
    event_bytes: float
    server_cpu_seconds: float
    run_cpu_seconds: float
    load: float


class Bench:
    def __init__(self, production: Production, postgres_pid: int) -> None:
        self.production = production
        self._postgres = psutil.Process(postgres_pid)

    def usage(self) -> Usage:
        tables = "SELECT relname, pg_total_relation_size(relid) FROM pg_stat_user_tables"
        sizes = {str(name): int(size) for name, size in self.production.rows(tables)}
        rows = {name: int(self.production.rows(f"SELECT count(*) FROM {name}")[0][0]) for name in sizes}
        servers = [self.production.children[name].pid for name in ("api-0", "api-1", "services")]
        cpu = sum(map(_cpu, servers)) + _cpu(self._postgres.pid) + sum(map(_cpu, _named("redis-server")))
        return Usage(time.monotonic(), rows, sizes, cpu, _cpu(self.production.children["worker"].pid))

    def measure(self, name: str, count: float, work: Callable[[], float]) -> Measured:
        """`work` returns the CPU seconds of processes that this one started itself."""
        before = self.usage()
        own = work()
        time.sleep(6)  # events are written in batches, a few seconds later
        return Measured(name, count, before, self.usage(), own, os.getloadavg()[0])

    def through_the_worker(self, deployment: str, parameters: dict[str, Any], count: int) -> Callable[[], float]:
        def work() -> float:
            for _ in range(count):  # one after another: two sweeps or two backups do not run at a time
                run_id = self.production.start_run(deployment, parameters)
                wait_for(lambda run_id=run_id: self.production.state(run_id) in ENDED, 300)  # type: ignore[misc]
            return 0.0

        return work

    def in_the_drain(self, count: int) -> Callable[[], float]:
        def work() -> float:
            began = os.times()
            words = [sys.executable, "-c", DRAIN_RUNS, str(count)]
            subprocess.run(words, env=self.production.environment(), check=True, capture_output=True, timeout=600)
            ended = os.times()
            return ended.children_user + ended.children_system - began.children_user - began.children_system

        return work


def _cpu(pid: int) -> float:
    """Of a process, its ended children and its living descendants."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def _named(name: str) -> list[int]:
    """Children of this process by program."""
    return [p.pid for p in psutil.Process().children() if p.name() == name]


def measure(bench: Bench, runs: int, idle_seconds: float, tenants: int, settings: Settings) -> list[Cost]:
    """Idle comes last: what starting leaves behind is no run's doing."""
    night = {"all": True, "kind": "scheduled"}
    found = [
        bench.measure("metering", 2 * runs, bench.in_the_drain(2 * runs)),
        bench.measure("sweep", runs, bench.through_the_worker("sweep/sweep", {}, runs)),
        bench.measure("backup of 0", runs, bench.through_the_worker("backup/backup", night, runs)),
    ]
    with ControlPlane(settings) as control_plane:
        for n in range(tenants):
            registry.create(control_plane, settings, f"tenant-{n:05d}")
    forced = bench.through_the_worker("backup/backup", night | {"force": True}, runs)
    found.append(bench.measure(f"backup of {tenants}", runs, forced))

    def rest() -> float:
        time.sleep(idle_seconds)
        return 0.0

    idle = bench.measure(IDLE, 1.0, rest)
    bench.production.children["worker"].stop(30.0)
    alone = bench.measure(ALONE, 1.0, rest)
    width = _bytes_a_row(found[0].before, alone.after)
    a_second = _a_second(idle, width)
    return [*(_cost(one, width, a_second) for one in found), a_second, _a_second(alone, width)]


def _a_second(one: Measured, width: dict[str, float]) -> Cost:
    total, seconds = _cost(one, width, None), one.after.at - one.before.at
    per_second = ("rows", "run_bytes", "event_bytes", "server_cpu_seconds", "run_cpu_seconds")
    return replace(total, **{name: getattr(total, name) / seconds for name in per_second})


def _bytes_a_row(first: Usage, last: Usage) -> dict[str, float]:
    """By table, over the whole bench: tables grow in steps of pages, a few runs alone may not."""
    grown = {name: last.rows[name] - first.rows.get(name, 0) for name in last.rows}
    return {
        name: max(0, last.sizes[name] - first.sizes.get(name, 0)) / count for name, count in grown.items() if count > 0
    }


def _cost(one: Measured, width: dict[str, float], idle: Cost | None) -> Cost:
    seconds = one.after.at - one.before.at
    rows = {name: one.after.rows[name] - one.before.rows.get(name, 0) for name in one.after.rows}
    events = {name for name in rows if name.startswith("event")}

    def each(total: float, at_idle: float) -> float:
        return (total - seconds * at_idle) / one.count

    return Cost(
        one.name,
        one.count,
        each(sum(rows.values()), idle.rows if idle else 0.0),
        each(sum(n * width.get(t, 0.0) for t, n in rows.items() if t not in events), idle.run_bytes if idle else 0.0),
        each(sum(rows[t] * width.get(t, 0.0) for t in events), idle.event_bytes if idle else 0.0),
        each(one.after.server_cpu - one.before.server_cpu, idle.server_cpu_seconds if idle else 0.0),
        each(one.after.run_cpu - one.before.run_cpu + one.own_cpu, idle.run_cpu_seconds if idle else 0.0),
        one.load,
    )


@dataclass(frozen=True)
class Day:
    """What the product starts in a day for so many tenants, and what that costs the server."""

    machines: int
    runs: float
    bytes: float
    kept_bytes: float
    server_cpu: float  # of one core, over the day


def day(costs: dict[str, Cost], tenants: int, drain_run_seconds: float, retention_days: int) -> Day:
    """Traffic on every machine at every hour, which is the most: the drain makes no runs at idle."""
    machines = math.ceil(tenants / TENANTS_A_MACHINE)
    backup = next(name for name in costs if name.startswith("backup of") and name != "backup of 0")
    counts = {
        "metering": machines * SECONDS_A_DAY / drain_run_seconds,
        "sweep": 1_440.0,
        backup: float(machines),  # one run a machine; the first starts the others
    }
    idle, alone = costs[IDLE], costs[ALONE]
    run_bytes = sum(n * costs[name].run_bytes for name, n in counts.items())
    event_bytes = sum(n * costs[name].event_bytes for name, n in counts.items())
    event_bytes += SECONDS_A_DAY * machines * idle.event_bytes  # not `alone`'s: there a worker has just left
    polls = machines * max(0.0, idle.server_cpu_seconds - alone.server_cpu_seconds)
    of_runs = sum(n * costs[name].server_cpu_seconds for name, n in counts.items()) / SECONDS_A_DAY
    return Day(
        machines,
        sum(counts.values()),
        run_bytes + event_bytes,
        run_bytes * retention_days + event_bytes * EVENT_DAYS,
        alone.server_cpu_seconds + polls + of_runs,
    )


@contextmanager
def _production(directory: Path) -> Iterator[tuple[Bench, Settings]]:
    with EmbeddedPostgres(directory, free_ports(1)[0]) as postgres:
        postgres.create_databases()
        url = postgres.url("engram")
        with ControlPlane(Settings(control_plane_url=SecretStr(url))) as control_plane:
            control_plane.migrate()
        with running(postgres, url) as production:
            start_worker(production)
            yield Bench(production, postgres.child.pid), production.settings(machine_id=MACHINE)


def show(cost: Cost) -> None:
    print(
        f"{cost.name:16}{cost.count:6.0f}{cost.rows:9.1f}{cost.run_bytes / 1e3:10.1f}{cost.event_bytes / 1e3:11.1f}"
        f"{cost.server_cpu_seconds:12.3f}{cost.run_cpu_seconds:11.2f}{cost.load:8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "orchestration.json")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--tenants", type=int, default=200)
    arguments = parser.parse_args()
    log.configure("error")
    costs: dict[str, Cost] = {}
    print(f"{'':16}{'runs':>6}{'rows':>9}{'KB':>10}{'KB events':>11}{'server CPU':>12}{'run CPU':>11}{'load':>8}")
    with tempfile.TemporaryDirectory(prefix="orchestration-") as made, _production(Path(made)) as (bench, settings):
        for cost in measure(bench, arguments.runs, arguments.idle, arguments.tenants, settings):
            costs[cost.name] = cost
            show(cost)
        arguments.result.write_text(json.dumps([asdict(c) for c in costs.values()], indent=2))
    head = f"{'tenants':>9}{'machines':>10}{'drain run':>11}{'kept days':>11}{'runs a day':>12}{'MB a day':>10}"
    print(head + f"{'MB kept':>10}{'of a core':>11}")
    for tenants, drain_run_seconds, days in ((5_000, 60, 14), (10_000, 60, 14), (100_000, 60, 14), (100_000, 600, 14)):
        found = day(costs, tenants, drain_run_seconds, days)
        print(
            f"{tenants:9,}{found.machines:10}{drain_run_seconds:9} s{days:11}{found.runs:12,.0f}"
            f"{found.bytes / 1e6:10,.0f}{found.kept_bytes / 1e6:10,.0f}{found.server_cpu:11.0%}"
        )
    print(f"written to {arguments.result}")


if __name__ == "__main__":
    main()
