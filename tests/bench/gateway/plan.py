"""Which requests go to which server, in which order.

Cases take turns in short bursts, `rounds` times, and the table shows medians: on a machine with neighbours a slow
minute then hits every case alike, and the ratios stand. At half load it is more rounds, and the p95 is the median of
quarter seconds (`load`). Whoever is not measured is suspended: several idle gateways with all that they look after
would be a twentieth of the one core. What ran last is warm, so each burst begins with a short one that does not count.
"""

from __future__ import annotations

import json
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.bench.gateway.curve import CONNECTIONS, Point, curve, mixed
from tests.bench.gateway.floors import floor
from tests.bench.gateway.load import Requests, Result, closed_loop, open_loop, request
from tests.bench.gateway.world import MAIN_MEMORIES, MAIN_TENANT, Server, World, fill

SETTLE_SECONDS = 0.5  # what a resumed server has put off meanwhile
WARM_SECONDS = 0.3
OPEN_CONNECTIONS = 96  # fewer than one tenant may have at work and waiting
MIX_TENANTS = 50
MIX_MEMORIES = 500


@dataclass(frozen=True)
class Case:
    """`server` None: the same SQL in a plain loop on `file`."""

    name: str
    server: str | None
    requests: Requests
    file: Path | None = None
    bodies: tuple[dict[str, object], ...] = ()


@dataclass
class Tail:
    """p95s in ms at one rate, of each window and of each burst."""

    windows: list[float] = field(default_factory=list)
    bursts: list[float] = field(default_factory=list)

    def p95_ms(self, *, whole: bool = False) -> float:
        """The median of windows, or of whole bursts."""
        found = self.bursts if whole else self.windows
        return median(found) if found else float("nan")

    def add(self, result: Result) -> None:
        self.windows += result.windows_ms(0.95)
        self.bursts.append(result.percentile_ms(0.95))


@dataclass
class Measured:
    rate: float
    rates: list[float]
    cpu_us: float
    p50_ms: float
    p95_ms: float
    bad: int  # at half load too
    client_busy: float
    half: Tail = field(default_factory=Tail)
    beside: Tail = field(default_factory=Tail)  # at the load at which the SQL alone was measured


class Bench:
    def __init__(self, world: World, seconds: float, rounds: int, only: set[str], against: Path | None = None) -> None:
        self._world = world
        self._seconds = seconds
        self._rounds = rounds
        self._only = only
        self._against = against
        self._stack = ExitStack()
        self._servers: dict[str, Server] = {}
        self._running: str | None = None
        self._warm: set[str] = set()
        self._random = random.Random(2)
        self.measured: dict[str, Measured] = {}
        self.tenants: list[Point] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        cases = [c for c in self._cases() if not self._only or any(c.name.startswith(o) for o in self._only)]
        results: dict[str, list[tuple[Result, float]]] = {c.name: [] for c in cases}
        for n in range(self._rounds):
            for case in cases if n % 2 == 0 else reversed(cases):
                results[case.name].append(self._saturate(case))
        for case in cases:
            self.measured[case.name] = _summary(results[case.name])
        halved = [c for c in cases if not c.name.endswith((" usual", " single"))]
        for n in range(2 * self._rounds + 1):
            for case in halved if n % 2 == 0 else reversed(halved):
                measured = self.measured[case.name]
                self._tail(case, measured.rate / 2, measured.half)
                if (alone := self.measured.get(f"{case.name} sql")) is not None:
                    self._tail(case, alone.rate / 2, measured.beside)
        if not self._only or "tenants" in self._only:
            self._stack.close()
            self._servers.clear()
            self._running = None
            self.tenants = curve(self._world, self._seconds, self._rounds, self._against)

    def _saturate(self, case: Case) -> tuple[Result, float]:
        """One burst; with the server's CPU time a request, which neighbours on the core hardly change."""
        if case.server is None:
            return self._floor(case, None)
        server = self._server(case.server)
        first = case.name not in self._warm  # connections per thread and tenant, on the usual side, take time to open
        self._warm.add(case.name)
        warm_seconds = self._seconds if first else WARM_SECONDS
        closed_loop(server.port, case.requests, connections=CONNECTIONS, seconds=warm_seconds)
        before = server.cpu_seconds()
        result = closed_loop(server.port, case.requests, connections=CONNECTIONS, seconds=self._seconds)
        return result, (server.cpu_seconds() - before) / max(1, len(result.latencies)) * 1e6

    def _tail(self, case: Case, rate: float, tail: Tail) -> None:
        """One burst at this rate."""
        if case.server is None:
            tail.add(self._floor(case, rate)[0])
            return
        port = self._server(case.server).port
        closed_loop(port, case.requests, connections=CONNECTIONS, seconds=WARM_SECONDS)
        result = open_loop(port, case.requests, connections=OPEN_CONNECTIONS, seconds=self._seconds, rate=rate)
        tail.add(result)
        self.measured[case.name].bad += result.bad

    def _floor(self, case: Case, rate: float | None) -> tuple[Result, float]:
        assert case.file is not None
        self._none()
        return floor(case.name.partition(" ")[0], case.file, list(case.bodies), self._seconds, rate)

    def _server(self, name: str) -> Server:
        """It, and no other server on their core."""
        if self._running == name:
            return self._servers[name]
        if self._running is not None:
            self._servers[self._running].suspend()
        if name in self._servers:
            self._servers[name].resume()
            time.sleep(SETTLE_SECONDS)
        else:
            self._servers[name] = self._stack.enter_context(self._world.server(name))
            self._stack.callback(lambda: self._servers[name].resume())  # or it could not end in order
        self._running = name
        return self._servers[name]

    def _none(self) -> None:
        if self._running is not None:
            self._servers[self._running].suspend()
            self._running = None

    def _cases(self) -> list[Case]:
        world, main = self._world, self._world.headers(MAIN_TENANT)
        ids = self._random.sample(world.ids, 1_000)
        gets = [request("GET", f"/v1/memories/{i}", main) for i in ids]
        queries = tuple(world.corpus.query() for _ in range(500))
        searches = [request("POST", "/v1/search", main, json.dumps(q).encode()) for q in queries]
        file = world.paths(MAIN_TENANT).database
        cases = [
            Case("bare", "bare", [request("GET", "/bare", main)]),
            Case("bare in turn", "bare-in-turn", [request("GET", "/bare", main)]),
            Case("edge", "edge", gets),
            Case("get", "gateway", gets),
            Case("get usual", "usual", gets),
            Case("search", "gateway", searches),
            Case("search sql", None, [], file, queries),
            Case("search usual", "usual", searches),
        ]
        bodies = tuple(world.corpus.memory() for _ in range(1_000))
        for name, server in (("", "gateway"), (" single", "single"), (" usual", "usual"), (" sql", None)):
            tenant_id = "writes" + name.strip()
            world.tenant(tenant_id)
            fill(world.paths(tenant_id), world.corpus, MAIN_MEMORIES)
            headers = world.headers(tenant_id)
            creates = [request("POST", "/v1/memories", headers, json.dumps(b).encode()) for b in bodies]
            cases.append(Case(f"create{name}", server, creates, world.paths(tenant_id).database, bodies))
        for name, server in (("mix", "gateway"), ("mix usual", "usual")):
            names = world.small_tenants(MIX_TENANTS, name.replace(" ", "-"), MIX_MEMORIES)
            requests = mixed(world, names, world.small_ids(MIX_MEMORIES), 5_000)
            cases.append(Case(name, server, requests))
        return cases


def _summary(results: list[tuple[Result, float]]) -> Measured:
    rates = [r.rate for r, _ in results]
    return Measured(
        rate=median(rates),
        rates=rates,
        cpu_us=median(cpu for _, cpu in results),
        p50_ms=median(r.percentile_ms(0.5) for r, _ in results),
        p95_ms=median(r.percentile_ms(0.95) for r, _ in results),
        bad=sum(r.bad for r, _ in results),
        client_busy=max(r.busy for r, _ in results),
    )
