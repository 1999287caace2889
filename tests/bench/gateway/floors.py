"""The same SQL in a plain loop, without HTTP, fence or tenant: the floor a request stands on.

Runs as `python -m tests.bench.gateway.floors search|create DATABASE SECONDS [RATE] < requests.json`, pinned like a
server; prints {seconds, latencies, due, cpu}. It calls the functions the gateway calls, so "the same SQL" stays true
when they change. Without a rate one follows the other; with one they are due at fixed times, as in `load.open_loop`:
what a checkpoint or a slow fsync delays pays for it here as there.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.engine import memories
from shared.engine.connection import connect
from shared.engine.full_text import Merging
from shared.engine.memories import NewMemory
from shared.engine.search import search
from tests.bench.gateway.load import Result
from tests.bench.gateway.world import SERVER_CORE


def floor(
    kind: str, file: Path, bodies: list[dict[str, Any]], seconds: float, rate: float | None = None
) -> tuple[Result, float]:
    """Measure in a process of its own on the servers' core; also the CPU µs a request (with a rate it spins between
    them)."""
    how = [kind, str(file), str(seconds), *([] if rate is None else [str(rate)])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gateway.floors", *how],
        input=json.dumps(bodies).encode(),
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    )
    found = json.loads(done.stdout)
    latencies = found["latencies"]
    result = Result(found["seconds"], latencies, {"200": len(latencies)}, 0.0, due=found["due"])
    return result, found["cpu"] / len(latencies) * 1e6


def _main(kind: str, file: Path, seconds: float, rate: float | None) -> None:
    bodies = json.load(sys.stdin)
    connection, merging = connect(file), Merging()

    def search_once(body: dict[str, Any]) -> None:
        search(connection, **body)

    def create_once(body: dict[str, Any]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        merging.begin(connection)
        memories.create(connection, NewMemory(**body))
        merging.step(connection)
        connection.execute("COMMIT")

    once: Callable[[dict[str, Any]], None] = {"search": search_once, "create": create_once}[kind]
    for body in bodies[:100]:
        once(body)
    latencies, dues = [], []
    following = itertools.cycle(bodies)
    cpu = time.process_time()
    began = now = time.perf_counter()
    while now - began < seconds:
        due = now if rate is None else began + len(latencies) / rate
        while time.perf_counter() < due:
            pass
        once(next(following))
        now = time.perf_counter()
        latencies.append(now - due)
        dues.append(due - began)
    took = {"seconds": now - began, "latencies": latencies, "due": dues, "cpu": time.process_time() - cpu}
    json.dump(took, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]) if len(sys.argv) > 4 else None)
