"""What many tenants cost one worker whose pool of open databases stays at its cap.

Mixed load (60% search, 20% get, 20% create) over small databases, two ways: `evenly`, where every tenant is as likely
as the other (the worst case: at 5,000 over 1,024 places four of five requests open a database and close another), and
`skewed`, where the n-th tenant gets 1/n of the first one's requests, as real ones do. Each point is measured in
`rounds` of a server of its own, old and new code taking turns, over tenants of their own: what one leaves beside the
databases must not be the other's to clear away.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

from tests.bench.gateway.load import closed_loop, open_loop, request
from tests.bench.gateway.world import World

CONNECTIONS = 32
TENANTS = (1, 100, 1_000, 5_000)
REQUESTS = 20_000
WARM_UP_SECONDS = 1.0


@dataclass
class Point:
    """`code` says whose: "here" or "against"."""

    tenants: int
    used: str
    code: str
    rate: float
    rates: list[float]
    cpu_us: float
    p95_ms: float
    half_p95_ms: float
    bad: int
    rss_mb: float


def curve(world: World, seconds: float, rounds: int, against: Path | None) -> list[Point]:
    shapes = [(count, "evenly") for count in TENANTS] + [(TENANTS[-1], "skewed")]
    codes = {"here": None} if against is None else {"here": None, "against": against}
    points = []
    for count, used in shapes:
        names = {code: world.small_tenants(count, code) for code in codes}
        bursts: dict[str, list[tuple[float, ...]]] = {code: [] for code in codes}
        for _ in range(rounds):
            for code, checkout in codes.items():
                bursts[code].append(_burst(world, checkout, names[code], used, seconds))
        for code in codes:
            rates, cpu_us, p95_ms, half_ms, bad, rss_mb = (list(c) for c in zip(*bursts[code], strict=True))
            medians = (median(rates), rates, median(cpu_us), median(p95_ms), median(half_ms))
            figures = (*medians, int(sum(bad)), max(rss_mb))
            points.append(Point(count, used, code, *figures))
    return points


def _burst(world: World, checkout: Path | None, names: list[str], used: str, seconds: float) -> tuple[float, ...]:
    path = f"/v1/memories/{world.small_ids()[0]}"
    first = [request("GET", path, world.headers(name)) for name in names]
    requests = mixed(world, names, world.small_ids(), REQUESTS, used)
    with world.server("gateway", checkout) as server:
        while first:  # every tenant has been there once: its token is known
            done = closed_loop(server.port, first, connections=CONNECTIONS, seconds=0.5)
            first = first[len(done.latencies) :]
        closed_loop(server.port, requests, connections=CONNECTIONS, seconds=WARM_UP_SECONDS)
        before = server.cpu_seconds()
        result = closed_loop(server.port, requests[::-1], connections=CONNECTIONS, seconds=seconds)
        cpu_us = (server.cpu_seconds() - before) / max(1, len(result.latencies)) * 1e6
        half = open_loop(server.port, requests, connections=128, seconds=seconds, rate=result.rate / 2)
        p95_ms, half_p95_ms = result.percentile_ms(0.95), half.percentile_ms(0.95)
        return result.rate, cpu_us, p95_ms, half_p95_ms, result.bad + half.bad, server.rss_bytes() / 1e6


def mixed(world: World, names: list[str], ids: list[str], count: int, used: str = "evenly") -> list[bytes]:
    """`count` requests of the mix over the tenants `names`, which all have the memories `ids`."""
    chance = random.Random(len(names))
    headers = [world.headers(name) for name in names]
    weights = list(accumulate(1.0 if used == "evenly" else 1 / (n + 1) for n in range(len(names))))
    requests = []
    for by in chance.choices(headers, cum_weights=weights, k=count):
        kind = chance.random()
        if kind < 0.6:
            requests.append(request("POST", "/v1/search", by, json.dumps(world.corpus.query()).encode()))
        elif kind < 0.8:
            requests.append(request("GET", f"/v1/memories/{chance.choice(ids)}", by))
        else:
            requests.append(request("POST", "/v1/memories", by, json.dumps(world.corpus.memory()).encode()))
    return requests
