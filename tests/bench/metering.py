"""How fast sealed segments become events and exact rollups in PostgreSQL.

    python -m tests.bench.metering [RESULT.json] [--rows 5000000] [--segment-events 5000] [--round-rows 250000]

Six ways of bringing rows into the embedded PostgreSQL, each into a database of its own, taking
turns round by round, so that whatever else this machine does falls on all of them. Read the ratios; where other work
takes the cores, the column of processor time (this process and the server's) says more than the clock.

    floor, one COPY a segment   pre-encoded rows, COPY (FORMAT BINARY) into an unlogged table without a key
    floor, one COPY a round     the same, one statement for the whole round
    executemany + rollups       INSERT … ON CONFLICT DO NOTHING RETURNING by executemany, the same exact rollups
    drain, all new              `metering.drain`: files read, judged, encoded, copied, rolled up, audited, removed
    drain, duplicates           one event in ten of every segment was drained before
    drain, replays              one segment in ten was drained before, as after a crash

Then what a segment costs against the number of tenants in it: each is a row in two rollups.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import psutil
import psycopg
from psycopg import sql

from deployments.postgres import EmbeddedPostgres
from shared import log, metering, partitions
from shared.control_plane import ControlPlane, queries, rows
from shared.settings import Settings
from shared.usage import UsageEvent
from shared.usage_batch import Batch, columns
from tests.metering_fixtures import segment
from tests.ports import free_ports

TENANTS = 100
TENANTS_A_SEGMENT = (1, 100, 5_000)
DUPLICATE_SHARE = 0.1
_SLOW_SHARE = 5  # the two slow ways get every fifth segment, in every round
_EVENTS_A_SECOND = 20_000  # how close ids lie in time
Segments = list[list[UsageEvent]]


class Source:
    """Events of new requests, one after the other in time, over `tenants` tenants."""

    def __init__(self, tenants: int) -> None:
        self._chance = random.Random(tenants)
        self._tenants = [f"tenant-{n:05d}" for n in range(tenants)]
        self._us = time.time_ns() // 1000 - 86_400_000_000  # yesterday: 5 M of them must not reach the future

    def segments(self, count: int, events: int) -> Segments:
        return [[self._event() for _ in range(events)] for _ in range(count)]

    def _event(self) -> UsageEvent:
        chance = self._chance
        self._us += 1_000_000 // _EVENTS_A_SECOND
        tail = bytearray(chance.randbytes(10))
        tail[0], tail[2] = 0x70 | (tail[0] & 0x0F), 0x80 | (tail[2] & 0x3F)
        request_id = (self._us // 1000).to_bytes(6, "big") + bytes(tail)
        search = chance.random() < 0.6
        route, status = ("/v1/search", 200) if search else ("/v1/memories", 201)
        tenant = self._tenants[chance.randrange(len(self._tenants))]
        return UsageEvent(request_id, tenant, route, status, 1, int(search), int(not search), self._us)


class Cost(NamedTuple):
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def plus(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def cpu_seconds(server: EmbeddedPostgres) -> float:
    """Of this process and of the server's, those that ended and were waited for included."""
    used = sum(psutil.Process().cpu_times()[:2])
    postmaster = psutil.Process(server.child.pid)
    for process in (postmaster, *postmaster.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(process.cpu_times()[: 4 if process == postmaster else 2])
    return used


class Place:
    """A database of its own, migrated, with a spool of its own."""

    def __init__(self, server: EmbeddedPostgres, directory: Path, name: str) -> None:
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        self._server = server
        self.settings = Settings(data_dir=directory / name, control_plane_url=server.url(name))  # type: ignore[arg-type]
        self.control_plane = ControlPlane(self.settings)
        self.control_plane.migrate()
        today = datetime.now(UTC).date()
        partitions.ensure(self.control_plane, [today - timedelta(days=1), today])

    def execute(self, statement: str) -> None:
        with self.control_plane.transaction() as connection:
            connection.execute(statement)  # type: ignore[arg-type]

    def cost_of(self, work: Callable[[], object]) -> Cost:
        cpu, start = cpu_seconds(self._server), time.perf_counter()
        work()
        return Cost(time.perf_counter() - start, cpu_seconds(self._server) - cpu)

    def drain(self, segments: Segments) -> Cost:
        """Of draining these, all of which were written to the spool before."""
        for events in segments:
            segment(self.settings, events)
        os.sync()
        return self.cost_of(lambda: sum(d.inserted for d in metering.drain_all(self.control_plane, self.settings)))

    def check(self) -> None:
        """The rollups say what the events say."""
        for table in ("usage_hourly", "usage_daily"):
            with self.control_plane.transaction(maintenance=True) as connection:
                [found] = connection.execute(
                    sql.SQL(
                        "SELECT (SELECT (count(*), sum(api_calls), sum(search_queries), sum(memories_created))"
                        " FROM usage_events)::text AS events, (SELECT (sum(api_calls), sum(api_calls),"
                        " sum(search_queries), sum(memories_created)) FROM {})::text AS rolled_up"
                    ).format(sql.Identifier(table))
                ).fetchall()
            if found["events"] != found["rolled_up"]:
                raise AssertionError(f"{table} is not exact: {found}")


def floor(place: Place, encoded: list[bytes]) -> Cost:
    """Each element of `encoded` in a transaction of its own."""
    statement = queries()["usage_copy"].replace("COPY usage_events", "COPY bare")

    def work() -> None:
        for data in encoded:
            with (
                place.control_plane.transaction() as connection,
                connection.cursor() as cursor,
                cursor.copy(statement.encode()) as sink,
            ):
                sink.write(data)

    return place.cost_of(work)


def joined(encoded: list[bytes]) -> bytes:
    """Many COPY messages as one: one header, one end."""
    return encoded[0][:19] + b"".join(data[19:-2] for data in encoded) + b"\xff\xff"


def executemany(place: Place, segments: Segments) -> Cost:
    """What one writes first: a prepared INSERT a row, pipelined by psycopg, and the rollups of what was new."""
    insert = (
        "INSERT INTO usage_events (request_id, tenant_id, route, status, api_calls, search_queries, memories_created,"
        " ts) VALUES (%s, %s, %s, %s, %s, %s, %s, to_timestamp(%s)) ON CONFLICT (request_id) DO NOTHING"
        " RETURNING request_id"
    )

    def work() -> None:
        for events in segments:
            batch = Batch.of(events)
            with place.control_plane.transaction() as connection, connection.cursor() as cursor:
                cursor.executemany(
                    insert,
                    [(UUID(bytes=e.request_id), *e_fields(e), e.ts_us / 1e6) for e in batch.events],
                    returning=True,
                )
                new = {row["request_id"] for result in cursor.results() for row in result.fetchall()}
                sums = columns(batch.only(new).sums())
                rows(connection, "usage_hourly_add", **sums)
                rows(connection, "usage_daily_add", **sums)

    return place.cost_of(work)


def e_fields(event: UsageEvent) -> tuple[object, ...]:
    return (
        event.tenant_id,
        event.route,
        event.status,
        event.api_calls,
        event.search_queries,
        event.memories_created,
    )


def compare(
    server: EmbeddedPostgres, directory: Path, total: int, size: int, a_round: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each way: rows a second, and processor µs a row."""
    names = ("floor", "floor_one", "executemany", "drain", "duplicates", "replays")
    places = {name: Place(server, directory, f"bench_{name}") for name in names}
    for name in ("floor", "floor_one"):
        places[name].execute("CREATE UNLOGGED TABLE bare (LIKE usage_events)")
    source, chance = Source(TENANTS), random.Random(7)
    costs = dict.fromkeys(names, Cost())
    sent = dict.fromkeys(names, 0)
    drained: Segments = []
    for _ in range(total // a_round):
        segments = source.segments(a_round // size, size)
        encoded = [Batch.of(s).copy_rows() for s in segments]
        some = segments[: max(1, len(segments) // _SLOW_SHARE)]
        again = [_with_duplicates(s, drained[: len(some)], chance) for s in some]
        replays = [chance.choice(drained) if drained and chance.random() < DUPLICATE_SHARE else s for s in segments]
        turns: dict[str, Callable[[], Cost]] = {
            "floor": lambda: floor(places["floor"], encoded),  # noqa: B023
            "floor_one": lambda: floor(places["floor_one"], [joined(encoded)]),  # noqa: B023
            "executemany": lambda: executemany(places["executemany"], some),  # noqa: B023
            "drain": lambda: places["drain"].drain(segments),  # noqa: B023
            "duplicates": lambda: places["duplicates"].drain(again),  # noqa: B023
            "replays": lambda: places["replays"].drain(replays),  # noqa: B023
        }
        for name in chance.sample(names, len(names)):
            costs[name] = costs[name].plus(turns[name]())
            sent[name] += sum(map(len, some)) if name in ("executemany", "duplicates") else a_round
        drained = segments
    for name in ("executemany", "drain", "duplicates", "replays"):
        places[name].check()
    for place in places.values():
        place.control_plane.close()
    return (
        {n: sent[n] / costs[n].seconds for n in names},
        {n: costs[n].cpu_seconds / sent[n] * 1e6 for n in names},
    )


def _with_duplicates(events: list[UsageEvent], drained: Segments, chance: random.Random) -> list[UsageEvent]:
    if not drained:
        return events
    count = int(len(events) * DUPLICATE_SHARE)
    return [*events[count:], *chance.sample(chance.choice(drained)[count:], count)]


def by_tenants(server: EmbeddedPostgres, directory: Path, total: int, size: int) -> dict[int, float]:
    """Microseconds an event, against tenants in a segment."""
    places = {n: Place(server, directory, f"bench_tenants_{n}") for n in TENANTS_A_SEGMENT}
    sources = {n: Source(n) for n in TENANTS_A_SEGMENT}
    seconds = dict.fromkeys(TENANTS_A_SEGMENT, 0.0)
    portions = max(1, total // size // 5)
    for _ in range(5):
        for n in TENANTS_A_SEGMENT:
            seconds[n] += places[n].drain(sources[n].segments(portions, size)).seconds
    for place in places.values():
        place.check()
        place.control_plane.close()
    return {n: seconds[n] / (5 * portions * size) * 1e6 for n in TENANTS_A_SEGMENT}


LABELS = {
    "floor": "floor, one COPY a segment",
    "floor_one": "floor, one COPY a round",
    "executemany": "executemany + rollups",
    "drain": "drain, all new",
    "duplicates": "drain, 1 in 10 events a duplicate",
    "replays": "drain, 1 in 10 segments a replay",
}


def report(rates: dict[str, float], cpu: dict[str, float], tenants: dict[int, float]) -> Iterator[str]:
    yield f"{'':36}{'rows/s':>12}{'of floor':>10}{'of one COPY':>13}{'× executemany':>15}{'cpu µs/row':>12}"
    for name, label in LABELS.items():
        rate = rates[name]
        shares = f"{rate / rates['floor']:>10.1%}{rate / rates['floor_one']:>13.1%}{rate / rates['executemany']:>15.2f}"
        yield f"{label:36}{rate:>12,.0f}{shares}{cpu[name]:>12.2f}"
    yield ""
    for n, cost in tenants.items():
        yield f"{n:>6,} tenants a segment: {cost:.2f} µs an event"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--round-rows", type=int, default=250_000)
    parser.add_argument("--segment-events", type=int, default=5_000)
    parser.add_argument("--tenant-rows", type=int, default=250_000)
    chosen = parser.parse_args()
    a_round = min(chosen.round_rows, chosen.rows)
    log.configure("warning")
    with (
        tempfile.TemporaryDirectory(prefix="engram-bench-") as temporary,
        EmbeddedPostgres(Path(temporary) / "server", free_ports(1)[0]) as server,
    ):
        rates, cpu = compare(server, Path(temporary), chosen.rows, chosen.segment_events, a_round)
        tenants = by_tenants(server, Path(temporary), chosen.tenant_rows, chosen.segment_events)
    print("\n".join(report(rates, cpu, tenants)))
    result = {
        "rows": chosen.rows,
        "segment_events": chosen.segment_events,
        "rows_per_second": rates,
        "cpu_us_per_row": cpu,
        "of_floor": rates["drain"] / rates["floor"],
        "of_one_copy": rates["drain"] / rates["floor_one"],
        "times_executemany": rates["drain"] / rates["executemany"],
        "us_per_event_by_tenants": tenants,
    }
    print(json.dumps(result))
    if chosen.result:
        chosen.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
