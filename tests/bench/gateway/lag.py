"""From a request to its row in PostgreSQL, at half of saturation: `python -m tests.bench.gateway.lag --seconds 60`.

The gateway and the load are those of the soak; the resident drain makes its visible runs on a Prefect server of its own
(SQLite, as in `engram up`). All share two cores with PostgreSQL, and the server of Prefect lies on the load's. Beside
the load one request every half second is followed: from when it was sent to when its row is there, looked for ten
times a second. Printed: p50, p95 and max of those, and how many runs there were.

Exit 1 if the longest took more than 10 s, a followed request has no row at the end, or nothing drained visibly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from uuid import UUID

import httpx
import psycopg

from deployments import orchestration
from deployments.process import catches_sigterm
from tests.bench.gateway.load import Requests, closed_loop, open_loop, request
from tests.bench.gateway.world import World, fill, world
from tests.gateway_stack import eventually
from tests.ports import free_port

BOUND_SECONDS = 10.0
TENANTS, MEMORIES = 10, 500
SATURATE_SECONDS, CONNECTIONS, OPEN_CONNECTIONS = 5.0, 32, 128
EVERY_SECONDS, LOOK_SECONDS = 0.5, 0.1
START_SECONDS = 120.0


class Followed:
    """Requests of one thread, their rows looked for by another."""

    def __init__(self, url: str, headers: dict[str, str], control_plane: str) -> None:
        self._url, self._headers, self._control_plane = url, headers, control_plane
        self._sent: dict[UUID, float] = {}
        self._stop = threading.Event()
        self.lags: list[float] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While this is open it asks; it closes when every row was found, or the bound has passed twice."""
        threads = [threading.Thread(target=target) for target in (self._ask, self._look)]
        for thread in threads:
            thread.start()
        yield
        self._stop.set()
        for thread in threads:
            thread.join()

    @property
    def missing(self) -> int:
        return len(self._sent)

    def _ask(self) -> None:
        with httpx.Client(trust_env=False, headers=self._headers) as client:
            while not self._stop.wait(EVERY_SECONDS):
                sent_at = time.monotonic()
                answer = client.get(f"{self._url}/v1/memories", params={"limit": 1})
                answer.raise_for_status()
                self._sent[UUID(answer.headers["x-request-id"])] = sent_at

    def _look(self) -> None:
        with psycopg.connect(self._control_plane, autocommit=True) as connection:
            ended_at = None
            while ended_at is None or (self._sent and time.monotonic() - ended_at < 2 * BOUND_SECONDS):
                time.sleep(LOOK_SECONDS)
                waiting = list(self._sent)
                sql = "SELECT request_id FROM usage_events WHERE request_id = ANY (%s)"
                for (request_id,) in connection.execute(sql, (waiting,)).fetchall():
                    self.lags.append(time.monotonic() - self._sent.pop(request_id))
                if ended_at is None and self._stop.is_set():
                    ended_at = time.monotonic()


@contextlib.contextmanager
def prefect(made: World) -> Iterator[dict[str, str]]:
    """A server of its own; what its clients are told."""
    port = free_port()
    settings = made.settings.model_copy(update={"prefect_api_url": f"http://127.0.0.1:{port}/api"})
    environment = made.environment() | orchestration.server_environment(settings, "")
    with child(made, "prefect", orchestration.server_argv(port), environment):
        eventually(lambda: orchestration.http_ok(f"{settings.prefect_api_url}/health"), START_SECONDS)
        yield orchestration.client_environment(settings)


@contextlib.contextmanager
def child(made: World, name: str, argv: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (made.directory / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def runs(api: str) -> int:
    """Visible runs of the drain that the server knows."""
    asked = httpx.post(f"{api}/flow_runs/count", json={"flows": {"name": {"any_": ["metering"]}}}, trust_env=False)
    asked.raise_for_status()
    return int(asked.json())


def mixed(made: World) -> Requests:
    """60% search, 20% get, 20% create, as the soak."""
    chance, calls = random.Random(4), []
    tenants = [f"lag-{n}" for n in range(TENANTS)]
    ids = {}
    for tenant_id in tenants:
        made.tenant(tenant_id)
        ids[tenant_id] = fill(made.paths(tenant_id), made.corpus, MEMORIES)
    headers = {tenant_id: made.headers(tenant_id) for tenant_id in tenants}
    for _ in range(5_000):
        tenant_id = chance.choice(tenants)
        kind = chance.choices(("search", "get", "create"), (60, 20, 20))[0]
        if kind == "get":
            calls.append(request("GET", f"/v1/memories/{chance.choice(ids[tenant_id])}", headers[tenant_id]))
        else:
            path, body = (
                ("/v1/search", made.corpus.query()) if kind == "search" else ("/v1/memories", made.corpus.memory())
            )
            calls.append(request("POST", path, headers[tenant_id], json.dumps(body).encode()))
    return calls


def measure(made: World, seconds: float) -> bool:
    """Whether it held."""
    calls = mixed(made)
    control_plane = made.settings.control_plane_url.get_secret_value()
    drain_argv = [sys.executable, "-m", "deployments.cli", "drain"]
    with prefect(made) as told, child(made, "drain", drain_argv, made.environment() | told) as drain:
        eventually(lambda: catches_sigterm(drain.pid), START_SECONDS)
        with made.server("gateway", gateway_workers=1) as server:
            closed_loop(server.port, calls, connections=CONNECTIONS, seconds=SATURATE_SECONDS)
            saturation = closed_loop(server.port, calls, connections=CONNECTIONS, seconds=SATURATE_SECONDS).rate
            followed = Followed(f"http://127.0.0.1:{server.port}", made.headers("lag-0"), control_plane)
            print(f"saturated at {saturation:,.0f} requests/s; now {saturation / 2:,.0f} for {seconds:g} s", flush=True)
            with followed.running():
                loaded = open_loop(
                    server.port, calls, connections=OPEN_CONNECTIONS, seconds=seconds, rate=saturation / 2
                )
        visible = runs(told["PREFECT_API_URL"])
    lags, directly = sorted(followed.lags), (made.directory / "drain.log").read_text().count("segments_drained")
    if len(lags) < 2:
        print("FAILED: no followed request reached PostgreSQL")
        return False
    held = lags[-1] <= BOUND_SECONDS and not followed.missing and visible > 0
    print(
        f"{len(loaded.latencies):,} requests, {loaded.bad} failed; {len(lags)} followed: row after"
        f" p50 {statistics.median(lags):.2f} s, p95 {lags[int(len(lags) * 0.95)]:.2f} s, max {lags[-1]:.2f} s;"
        f" {followed.missing} without a row; {visible} visible runs, {directly} drains beside them\n"
        f"{BOUND_SECONDS:g} s {'held' if held else 'DID NOT HOLD'}"
    )
    return held


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway.lag", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with world() as made:
        held = measure(made, options.seconds)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
