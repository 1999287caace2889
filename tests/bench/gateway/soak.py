"""Minutes at half of saturation, then the books: `python -m tests.bench.gateway.soak --minutes 10`.

A mixed load (60% search, 20% get, 20% create) over 50 tenants, all hot: saturated first by a closed loop, then
half of that rate as an open loop. The gateway is `engram serve` as it is on the servers' core; on the other core
`engram drain` empties its spool into PostgreSQL, beside the load. There is no Prefect: the drain then drains
directly, which is the same code without a visible run (`lag.py` has the visible ones).

While it runs: RSS of the workers, latencies by the minute. At the end the gateway and the drain are stopped as
production stops them, and what the clients were told is compared with what was kept, tenant by tenant:

requests answered, by status   = events in PostgreSQL, by status
requests sent, by tenant       = events, = `api_calls` in the hourly and in the daily rollup
searches, creates, by tenant   = `search_queries`, `memories_created` in both rollups
creates acknowledged, by tenant = memories in that tenant's database

Exit 1 if one of these differs, a request failed or had no answer, a worker died, the spool is not empty, or RSS grew
by more than 0.5 MB a minute: the least-squares slope over the last 70% of the time, from 5 minutes on; a shorter run's
slope is printed and says nothing.

SQLite's page caches (2 MiB a connection, two connections a tenant) would look like a leak for many minutes. With
them cut to 64 KiB RSS stayed within 0.4 MB over two minutes at 710 requests/s; as they are it grew by 3 MB a minute
while they filled. So tenants start with more than a cache holds, and both caches of each are filled before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from deployments.process import catches_sigterm
from tests.bench.gateway.load import Result, closed_loop, open_loop, request
from tests.bench.gateway.soak_books import Books
from tests.bench.gateway.world import Server, World, fill, world
from tests.gateway_stack import eventually

TENANTS = 50
SEED_MEMORIES = 5_000
REQUESTS = 20_000
WARM_EVERY_ID = 4  # a page holds some six memories
WARM_SEARCHES = 50  # a tenant, of 100 results each
WARM_SLICE_SECONDS, WARM_LIMIT_SECONDS = 5.0, 300.0
SATURATE_SECONDS = 5.0
SATURATING_CONNECTIONS = 32
OPEN_CONNECTIONS = 128
SAMPLE_SECONDS = 30.0
LATE_SHARE = 0.7
RSS_JUDGED_MINUTES = 5.0  # a run of that length or more
RSS_SLOPE_BOUND = 0.5  # MB a minute; below it a gateway of 250 MB needs 8 hours to double
DRAIN_START_SECONDS = 120
DRAIN_STOP_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Call:
    tenant_id: str
    kind: str  # get, search or create
    raw: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """Of all workers together, in MB. `anonymous` leaves out mapped files, which the kernel takes back."""

    minutes: float
    rss_mb: float
    anonymous_mb: float


@dataclass(slots=True)
class Minute:
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    bad: int = 0


class Load:
    """The calls in their order, and what came of those that were sent."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._at = 0
        self.statuses: Counter[str] = Counter()
        self.unanswered = 0
        self.sent: Counter[tuple[str, str]] = Counter()  # (tenant, kind)

    def closed(self, port: int, seconds: float) -> Result:
        return self._noted(closed_loop(port, self._following(), connections=SATURATING_CONNECTIONS, seconds=seconds))

    def open(self, port: int, seconds: float, rate: float) -> Result:
        return self._noted(open_loop(port, self._following(), connections=OPEN_CONNECTIONS, seconds=seconds, rate=rate))

    @property
    def bad(self) -> int:
        return sum(n for status, n in self.statuses.items() if not status.startswith("2")) + self.unanswered

    def _following(self) -> list[bytes]:
        """All calls, from the first that was not sent yet: the load tool begins at the first it is given."""
        return [c.raw for c in self._calls[self._at :] + self._calls[: self._at]]

    def _noted(self, result: Result) -> Result:
        self.statuses.update(result.statuses)
        self.unanswered += result.unanswered
        sent = len(result.latencies) + result.unanswered
        for n in range(self._at, self._at + sent):
            call = self._calls[n % len(self._calls)]
            self.sent[call.tenant_id, call.kind] += 1
        self._at = (self._at + sent) % len(self._calls)
        return result


class Soak:
    def __init__(self, made: World, minutes: float, workers: int) -> None:
        self._world = made
        self._minutes = minutes
        self._workers = workers
        self._tenants = [f"soak-{n}" for n in range(TENANTS)]
        self._loads: list[Load] = []
        self.saturation = 0.0
        self.samples: list[Sample] = []
        self.minutes: list[Minute] = []
        self.failures: list[str] = []
        self.books: list[dict[str, Any]] = []

    def run(self) -> None:
        ids = {}
        for tenant_id in self._tenants:
            self._world.tenant(tenant_id)
            ids[tenant_id] = fill(self._world.paths(tenant_id), self._world.corpus, SEED_MEMORIES)
        filling = self._filling(ids)
        warming, load = self._loads = [Load(filling), Load(self._mixed(ids))]
        with self._drain(), self._world.server("gateway", gateway_workers=self._workers) as server:
            began = time.monotonic()
            while warming.sent.total() < len(filling) and time.monotonic() - began < WARM_LIMIT_SECONDS:
                warming.closed(server.port, WARM_SLICE_SECONDS)
            print(f"page caches: {min(1, warming.sent.total() / len(filling)):.0%} of {len(filling):,} requests made")
            load.closed(server.port, SATURATE_SECONDS)
            self.saturation = load.closed(server.port, SATURATE_SECONDS).rate
            print(f"saturated at {self.saturation:,.0f} requests/s; now {self.saturation / 2:,.0f} requests/s")
            workers = {p.pid for p in _workers(server)}
            if len(workers) != self._workers:
                self.failures.append(f"{len(workers)} workers instead of {self._workers}")
            broken = False
            try:
                self._hold(server, load)
            except (OSError, psutil.Error) as e:
                broken = True  # the load tool ends with the first connection that breaks, and its counts with it
                self.failures.append(f"a connection broke, so the books cannot be compared: {e}")
            if {p.pid for p in _workers(server)} != workers:
                self.failures.append("a worker died and was started again")
        if not broken:
            self._compare()
        if self._minutes >= RSS_JUDGED_MINUTES and self.slope("rss_mb") > RSS_SLOPE_BOUND:
            self.failures.append(f"RSS grew by {self.slope('rss_mb'):.2f} MB a minute, bound {RSS_SLOPE_BOUND}")
        if self.failures:
            self.failures += [f"the gateway's log: {line}" for line in _complaints(server.log_path)]

    def _hold(self, server: Server, load: Load) -> None:
        """The open loop in slices of one sample; each takes up the calls where the one before stopped."""
        seconds = self._minutes * 60
        slice_seconds = min(SAMPLE_SECONDS, seconds / 12)
        began = time.monotonic()
        self._sample(server, 0.0)
        for n in range(round(seconds / slice_seconds)):
            result = load.open(server.port, slice_seconds, self.saturation / 2)
            at = int(n * slice_seconds // 60)
            if at == len(self.minutes):
                self.minutes.append(Minute())
            minute = self.minutes[at]
            minute.seconds += result.seconds
            minute.latencies += result.latencies
            minute.bad += result.bad
            self._sample(server, (time.monotonic() - began) / 60)

    def _sample(self, server: Server, minutes: float) -> None:
        workers = _workers(server)
        rss = sum(p.memory_info().rss for p in workers) / 1e6
        self.samples.append(Sample(minutes, rss, sum(_anonymous_bytes(p) for p in workers) / 1e6))
        sample = self.samples[-1]
        print(f"{minutes:6.2f} min: RSS {sample.rss_mb:.1f} MB, anonymous {sample.anonymous_mb:.1f} MB", flush=True)

    def slope(self, of: str) -> float:
        """MB a minute over the last 70% of the time, least squares; NaN when the run broke off."""
        late = [s for s in self.samples if s.minutes >= self.samples[-1].minutes * (1 - LATE_SHARE)]
        if len(late) < 2:
            return float("nan")
        xs, ys = [s.minutes for s in late], [float(getattr(s, of)) for s in late]
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        over = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        return over / sum((x - mean_x) ** 2 for x in xs)

    @contextlib.contextmanager
    def _drain(self) -> Iterator[None]:
        """`engram drain`, stopped after the gateway: its last pass takes what the gateway's stop sealed."""
        log_path = self._world.directory / "drain.log"
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "deployments.cli", "drain"],
                env=self._world.environment(),
                stdout=log,
                stderr=log,
            )
        try:
            eventually(lambda: catches_sigterm(child.pid), DRAIN_START_SECONDS)
            yield
            if child.poll() is not None:
                self.failures.append(f"the drain died: {log_path.read_text()[-1_000:]}")
                return
            child.send_signal(signal.SIGTERM)
            code = child.wait(DRAIN_STOP_SECONDS)
            if code != 0:
                self.failures.append(f"the drain left with {code}: {log_path.read_text()[-1_000:]}")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _filling(self, ids: dict[str, list[str]]) -> list[Call]:
        """What fills both page caches of a tenant: lookups go to its reader, searches to its other connection."""
        corpus = self._world.corpus
        headers = {t: self._world.headers(t) for t in self._tenants}
        calls = []
        for t in self._tenants:
            for memory_id in ids[t][::WARM_EVERY_ID]:
                calls.append(Call(t, "get", request("GET", f"/v1/memories/{memory_id}", headers[t])))
            for _ in range(WARM_SEARCHES):
                body = json.dumps(corpus.query() | {"limit": 100}).encode()
                calls.append(Call(t, "search", request("POST", "/v1/search", headers[t], body)))
        random.Random(3).shuffle(calls)
        return calls

    def _mixed(self, ids: dict[str, list[str]]) -> list[Call]:
        random_ = random.Random(4)
        corpus = self._world.corpus
        headers = {t: self._world.headers(t) for t in self._tenants}
        calls = []
        for _ in range(REQUESTS):
            tenant_id = random_.choice(self._tenants)
            kind = random_.choices(("search", "get", "create"), (60, 20, 20))[0]
            match kind:
                case "search":
                    raw = request("POST", "/v1/search", headers[tenant_id], json.dumps(corpus.query()).encode())
                case "get":
                    raw = request("GET", f"/v1/memories/{random_.choice(ids[tenant_id])}", headers[tenant_id])
                case _:
                    raw = request("POST", "/v1/memories", headers[tenant_id], json.dumps(corpus.memory()).encode())
            calls.append(Call(tenant_id, kind, raw))
        return calls

    def _compare(self) -> None:
        statuses = sum((load.statuses for load in self._loads), Counter[str]())
        if bad := sum(load.bad for load in self._loads):
            self.failures.append(f"{bad} requests failed or had no answer: {dict(statuses)}")
        sent = sum((load.sent for load in self._loads), Counter[tuple[str, str]]())
        books = Books(self._world)
        books.compare(self._tenants, statuses, sent, SEED_MEMORIES)
        self.books = books.lines
        self.failures += books.failures

    def show(self) -> None:
        console = Console(width=110)
        latencies = Table("minute", "requests/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "failed")
        for n, minute in enumerate(self.minutes, 1):
            whole = Result(minute.seconds, minute.latencies, {}, 0.0)
            parts = (f"{whole.percentile_ms(share):.2f}" for share in (0.5, 0.95, 0.99, 1.0))
            rate = f"{len(minute.latencies) / minute.seconds:,.0f}"
            latencies.add_row(str(n), rate, *parts, str(minute.bad))
        books = Table("told | kept", "told", "kept", "equal")
        for line in self.books:
            equal = "NO" if line["differing"] else "yes"
            books.add_row(line["line"], f"{line['told']:,}", f"{line['kept']:,}", equal)
        console.print(latencies, books)
        slope, first, last = self.slope("rss_mb"), self.samples[0].rss_mb, self.samples[-1].rss_mb
        verdict = "no growth" if slope <= RSS_SLOPE_BOUND else "GROWING"
        print(
            f"RSS {first:.1f} → {last:.1f} MB; over the last {LATE_SHARE:.0%}: {slope:+.2f} MB/min"
            f" (anonymous {self.slope('anonymous_mb'):+.2f}), bound {RSS_SLOPE_BOUND} MB/min: {verdict}"
        )
        for failure in self.failures:
            print(f"FAILED: {failure}")

    def document(self) -> dict[str, Any]:
        return {
            "saturation": self.saturation,
            "rate": self.saturation / 2,
            "workers": self._workers,
            "tenants": TENANTS,
            "seed_memories": SEED_MEMORIES,
            "samples": [
                {"minutes": s.minutes, "rss_mb": s.rss_mb, "anonymous_mb": s.anonymous_mb} for s in self.samples
            ],
            "rss_slope_mb_per_minute": self.slope("rss_mb"),
            "anonymous_slope_mb_per_minute": self.slope("anonymous_mb"),
            "minutes": [
                {
                    "requests": len(m.latencies),
                    "failed": m.bad,
                    **{
                        f"p{int(share * 100)}_ms": Result(m.seconds, m.latencies, {}, 0.0).percentile_ms(share)
                        for share in (0.5, 0.95, 0.99)
                    },
                }
                for m in self.minutes
            ],
            "books": self.books,
            "failures": self.failures,
        }


def _workers(server: Server) -> list[psutil.Process]:
    """The children that listen; the rest is the supervisor and multiprocessing's helper."""
    children = server.process.children(recursive=True)
    return [p for p in children if any(c.status == psutil.CONN_LISTEN for c in p.net_connections("tcp"))]


def _complaints(log_path: Path) -> list[str]:
    """The first lines that are not of everyday work, and the first access lines of requests that failed."""
    lines = [line for line in log_path.read_text().splitlines() if '"route":"/ready"' not in line]
    failed = [line for line in lines if '"component":"access"' in line and '"status":5' in line]
    said = [line for line in lines if '"level": "error"' in line or '"level": "warning"' in line]
    return [*said[:5], *failed[:5]]


def _anonymous_bytes(process: psutil.Process) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1_024
    raise SystemExit("this kernel does not tell RssAnon")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=10.0, help="at most 100: the tokens last two hours")
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2), help="of the gateway, all on its one core")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "engram-bench-soak.json")
    options = parser.parse_args()
    if not 0 < options.minutes <= 100:
        parser.error("--minutes must be above 0 and at most 100")
    with world() as made:
        soak = Soak(made, options.minutes, options.workers)
        soak.run()
    soak.show()
    options.out.write_text(json.dumps(soak.document(), indent=2))
    print(f"JSON: {options.out}")
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
