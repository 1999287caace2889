"""Everything between a request and its bill, killed at random under load: what was answered is what is billed.

A real gateway with two workers, two resident drains (`flows.drain`), a PostgreSQL of its own behind a wire that can
lose the answer to COMMIT. `ENGRAM_CHAOS_SECONDS` sets how long it goes on (CI: 12; one minute takes about 90 s).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import psutil
import psycopg
import pytest
from pydantic import SecretStr

from deployments.postgres import EmbeddedPostgres
from gateway.supervisor import DEATHS, DEATHS_SECONDS
from shared import metering, reconcile, registry
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.core_fixtures import start_child
from tests.gateway_stack import Gateway, Issuer, eventually, gateway
from tests.ledger import Ledger, check_billed
from tests.pgbouncer_fixtures import CommitCutter
from tests.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = float(os.environ.get("ENGRAM_CHAOS_SECONDS", "12"))
CLIENTS, DRAINS, WORKERS = 6, 2, 2
CLIENT_REQUEST_ID = "the-same-every-time"

# A parent that has imported everything once and forks a drain for every line it reads.
DRAINS_ON_DEMAND = """
    import os, signal, sys
    from flows.drain import main
    from shared.orphan import end_with_parent
    from shared.settings import settings
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getpid()
    print("ready", flush=True)
    while sys.stdin.readline():
        if (pid := os.fork()) == 0:
            end_with_parent(parent, signal.SIGKILL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            main(settings())
            os._exit(0)
        print(pid, flush=True)
"""


@dataclass
class Place:
    postgres: EmbeddedPostgres
    cutter: CommitCutter
    gateway: Gateway
    issuer: Issuer
    control_plane: ControlPlane  # of the test: straight to PostgreSQL
    settings: Settings  # of the processes: through the wire


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("chaos")
    with contextlib.ExitStack() as closing:
        [port] = free_ports(1)
        postgres = closing.enter_context(EmbeddedPostgres(directory / "control-plane", port))
        cutter = closing.enter_context(CommitCutter(port).running())
        issuer = Issuer()
        closing.callback(issuer.close)
        settings = Settings(
            data_dir=directory / "data",
            control_plane_url=SecretStr(cutter.url(postgres.url())),
            control_plane_connect_timeout_seconds=2,
            drain_poll_seconds=0.1,
        )
        direct = settings.model_copy(update={"control_plane_url": SecretStr(postgres.url())})
        control_plane = closing.enter_context(ControlPlane(direct))
        control_plane.migrate()
        running = closing.enter_context(gateway(settings.data_dir, cutter.url(postgres.url()), issuer))
        yield Place(postgres, cutter, running, issuer, control_plane, settings)


class Drains:
    """Resident drains that can be killed and replaced at once."""

    def __init__(self, settings: Settings) -> None:
        log = settings.data_dir / "drains.log"
        environment = {
            "ENGRAM_DATA_DIR": str(settings.data_dir),
            "ENGRAM_CONTROL_PLANE_URL": settings.control_plane_url.get_secret_value(),
            "ENGRAM_CONTROL_PLANE_CONNECT_TIMEOUT_SECONDS": "2",
            "ENGRAM_DRAIN_POLL_SECONDS": "0.1",
        }
        with pytest.MonkeyPatch.context() as patch, log.open("ab") as stderr:
            for name, value in environment.items():
                patch.setenv(name, value)
            self._parent = start_child(DRAINS_ON_DEMAND, stdin=subprocess.PIPE, stderr=stderr)
        assert self._parent.stdout is not None
        assert self._parent.stdout.readline() == "ready\n", log.read_text()
        self.running: list[psutil.Process] = []

    def start(self) -> None:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write("\n")
        self._parent.stdin.flush()
        self.running.append(psutil.Process(int(self._parent.stdout.readline())))

    def kill(self, one: psutil.Process) -> None:
        one.kill()
        self.running.remove(one)

    def end(self) -> None:
        """As production stops them: each drains once more."""
        for one in self.running:
            one.terminate()
        _, left = psutil.wait_procs(self.running, timeout=60)
        for one in left:
            one.kill()
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.kill()  # it has nothing to end, and taking Prefect's modules apart took ten seconds once
        self._parent.wait()
        assert not left, "a drain did not stop"


def requests_of(place: Place, tenants: list[str], seed: int) -> Iterator[tuple[str, str, str, str, str | None]]:
    """An endless mix: tenant, route as billed, method, path, body."""
    chance = random.Random(seed)
    while True:
        tenant = chance.choice(tenants)
        match chance.randrange(10):
            case 0 | 1 | 2 | 3 | 4:
                yield tenant, "/v1/search", "POST", "/v1/search", json.dumps({"query": "sesame"})
            case 5 | 6 | 7:
                yield tenant, "/v1/memories", "POST", "/v1/memories", json.dumps({"content": f"sesame {seed}"})
            case 8:
                unknown = "/v1/memories/00000000-0000-7000-8000-000000000000"
                yield tenant, "/v1/memories/{id}", "GET", unknown, None
            case 9:
                yield tenant, "/v1/memories", "GET", "/v1/memories?limit=2", None


def load(place: Place, tenants: list[str], seed: int, stop: threading.Event) -> dict[str, Ledger]:
    """One client: a request after the other over a connection that is made again when it breaks."""
    ledgers = {tenant: Ledger() for tenant in tenants}
    tokens = {tenant: place.issuer.token(tenant) for tenant in tenants}
    address = place.gateway.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=30)
    for tenant, route, method, path, body in requests_of(place, tenants, seed):
        if stop.is_set():
            break
        headers = {
            "Authorization": f"Bearer {tokens[tenant]}",
            "Content-Type": "application/json",
            "X-Request-Id": CLIENT_REQUEST_ID,
        }
        try:
            if connection.sock is None:
                connection.connect()
        except OSError:  # nothing was sent
            time.sleep(0.05)
            continue
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            ledgers[tenant].unanswered += 1
            connection.close()
            continue
        ledgers[tenant].answers[UUID(answer.headers["x-request-id"])] = (route, answer.status)
    connection.close()
    return ledgers


def rage(place: Place, drains: Drains, seconds: float, seed: int) -> Counter[str]:
    """Kill at random; how often each. Workers not more often than a supervisor takes for an accident."""
    chance, done = random.Random(seed), Counter[str]()
    deaths: deque[float] = deque(maxlen=DEATHS * WORKERS)
    kinds, first = ("commit", "drain", "worker", "postgres"), ["commit", "drain", "worker", "postgres"]
    chance.shuffle(first)  # each at least once
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(chance.uniform(0.05, 0.5))
        match first.pop() if first else chance.choices(kinds, (8, 6, 2, 2))[0]:
            case "commit":
                place.cutter.cuts += 1
            case "drain":
                drains.kill(chance.choice(drains.running))
                drains.start()
                done["drains killed"] += 1
            case "worker" if len(deaths) < DEATHS * WORKERS or time.monotonic() - deaths[0] > DEATHS_SECONDS:
                with contextlib.suppress(psutil.Error):
                    for worker in place.gateway.workers()[:1]:  # none while both are being replaced
                        worker.kill()
                        deaths.append(time.monotonic())
                        done["gateway workers killed"] += 1
            case "postgres":
                family = psutil.Process(place.postgres.child.pid)
                for process in [family, *family.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                done["PostgreSQL killed"] += 1
                time.sleep(chance.uniform(0.0, 1.0))
                place.postgres.child.start()  # in this thread: its parent-death signal is the thread's
                place.postgres.child.wait_ready(60)
    done["COMMIT answers lost"] = place.cutter.cut
    return done


def spool_of(place: Place) -> list[str]:
    directory = place.settings.spool_dir
    return [p.name for p in directory.rglob("*") if p.is_file()]


def drained(place: Place) -> bool:
    """What is sealed by now; whether that was all there is."""
    list(metering.drain_all(place.control_plane, place.settings))
    return not spool_of(place)


def books_of(place: Place) -> reconcile.Books:
    """What an operator is told: the gateway's own counters included, which survive its workers."""
    settings = place.settings.model_copy(update={"gateway_port": int(place.gateway.url.rpartition(":")[2])})
    today = datetime.now(UTC).date()
    return reconcile.reconcile(place.control_plane, settings, today - timedelta(days=1), today)


def at_work(work: list[Callable[[], dict[str, Ledger]]]) -> tuple[list[threading.Thread], list[dict[str, Ledger]]]:
    results: list[dict[str, Ledger]] = []
    threads = [threading.Thread(target=lambda w=w: results.append(w())) for w in work]
    for thread in threads:
        thread.start()
    return threads, results


def test_a_client_request_id_sent_a_thousand_times_by_two_tenants_is_two_thousand_calls(place: Place) -> None:
    """A key of the client's choosing would be lost usage: billed is what the edge minted."""
    tenants = ["same-id-a", "same-id-b"]
    for tenant in tenants:
        registry.create(place.control_plane, place.settings, tenant)

    def call(tenant: str) -> dict[str, Ledger]:
        headers = {"Authorization": f"Bearer {place.issuer.token(tenant)}", "X-Request-Id": CLIENT_REQUEST_ID}
        ledger = Ledger()
        connection = http.client.HTTPConnection(place.gateway.url.removeprefix("http://"), timeout=30)
        for _ in range(1_000):
            connection.request("GET", "/v1/memories?limit=1", headers=headers)
            answer = connection.getresponse()
            answer.read()
            ledger.answers[UUID(answer.headers["x-request-id"])] = ("/v1/memories", answer.status)
        connection.close()
        return {tenant: ledger}

    threads, results = at_work([lambda t=t: call(t) for t in tenants])  # type: ignore[misc]
    for thread in threads:
        thread.join()

    eventually(lambda: drained(place))
    totals = check_billed(
        place.postgres.url(), {tenant: [ledger] for result in results for tenant, ledger in result.items()}
    )
    assert (totals["rows"], totals["2xx"]) == (2_000, 2_000)


def asked_everywhere(place: Place, tenant: str) -> Ledger:
    """Requests over connections of their own: whichever worker does not know the tenant yet reads of it."""
    ledger = Ledger()
    for _ in range(24):
        connection = http.client.HTTPConnection(place.gateway.url.removeprefix("http://"), timeout=30)
        headers = {"Authorization": f"Bearer {place.issuer.token(tenant)}"}
        connection.request("GET", "/v1/memories?limit=1", headers=headers)
        answer = connection.getresponse()
        answer.read()
        ledger.answers[UUID(answer.headers["x-request-id"])] = ("/v1/memories", answer.status)
        connection.close()
    return ledger


def test_while_postgresql_is_down_requests_are_served_and_their_usage_arrives_afterwards(place: Place) -> None:
    """Usage waits on disk, the age gauge tells, and nobody has to do anything."""
    tenant = "outage"
    registry.create(place.control_plane, place.settings, tenant)
    known = asked_everywhere(place, tenant)
    eventually(lambda: drained(place))
    stop, drains = threading.Event(), Drains(place.settings)
    try:
        drains.start()
        place.postgres.child.stop(10)
        threads, results = at_work([lambda n=n: load(place, [tenant], n, stop) for n in range(2)])  # type: ignore[misc]
        eventually(lambda: place.gateway.metric("engram_usage_oldest_unflushed_seconds") > 3)
        stop.set()
        for thread in threads:
            thread.join(60)
        place.postgres.child.start()
        place.postgres.child.wait_ready(60)
        eventually(lambda: not spool_of(place), 60)
    finally:
        stop.set()
        drains.end()
    totals = check_billed(place.postgres.url(), {tenant: [known, *(ledgers[tenant] for ledgers in results)]})
    assert totals["5xx"] == totals["requests without an answer"] == 0 and totals["2xx"] > len(known.answers) + 50


def test_producers_drains_and_postgresql_killed_at_random_leave_a_bill_that_is_exact(place: Place) -> None:
    """Acknowledged = rows in PostgreSQL = rollups, per tenant; a request without an answer is there once or not."""
    tenants = [f"chaos-{n}" for n in range(5)]
    for tenant in tenants:
        registry.create(place.control_plane, place.settings, tenant)
    stop, drains = threading.Event(), Drains(place.settings)
    threads, results = at_work([lambda n=n: load(place, tenants, n, stop) for n in range(CLIENTS)])  # type: ignore[misc]
    try:
        for _ in range(DRAINS):
            drains.start()
        done = rage(place, drains, SECONDS, seed=int(os.environ.get("ENGRAM_CHAOS_SEED", "7")))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        place.cutter.cuts = 0
        stopped = place.gateway.stop()
        try:
            eventually(lambda: not spool_of(place), 90)
        finally:
            drains.end()
    assert stopped == 0
    assert len(results) == CLIENTS  # no client ended by an exception
    totals = check_billed(place.postgres.url(), {t: [ledgers[t] for ledgers in results] for t in tenants})
    with psycopg.connect(place.postgres.url()) as connection:
        audited = connection.execute("SELECT sum(inserted), sum(quarantined), sum(corrupt_bytes) FROM usage_segments")
        [stored] = connection.execute("SELECT count(*) FROM usage_events").fetchall()
        assert audited.fetchall() == [(*stored, 0, 0)]
    books = books_of(place)
    assert books.agree and books.gateway is not None, books.where()
    assert not books.waiting
    print(f"\n{SECONDS:g} s: {dict(done)}\n{dict(totals)}")
    assert all(done[kind] for kind in ("drains killed", "gateway workers killed", "PostgreSQL killed"))
    assert done["COMMIT answers lost"]
    assert totals["2xx"] > 30 * CLIENTS
