"""Real Prometheus and Alertmanager watch the real stack: each of the six alerts is fired by a real fault, and clears.

The rules are the ones of production with their windows shortened (`deployments.monitoring_rules`): a minute is two
seconds, so that an alert that needs ten minutes is there in seconds. Faults run side by side. Whatever is waited for
has a generous limit; how long it took is printed, not asserted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import issuer
from shared import registry
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.acceptance.conftest import Stack
from tests.disk_fixtures import file_system
from tests.gateway_stack import eventually

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
LIMIT_SECONDS = 90.0
WATCHDOG = "EngramWatchdog"
SIX = {
    "EngramHighErrorRate",
    "EngramHighLatency",
    "EngramAuthFailures",
    "EngramUsageFlushFailures",
    "EngramDatabaseOpenFailures",
    "EngramRateLimitAnomaly",
}
SLOW_MACHINE = {"EngramHighLatency", "EngramLatencyBurnFast", "EngramLatencyBurnSlow"}
PROBE_TIMED_OUT = {
    "EngramGatewayDown",
    "EngramGatewayNotReady",
    "EngramAvailabilityBurnFast",
    "EngramAvailabilityBurnSlow",
}


class Traffic:
    """Clients in a thread of their own. Each keeps asking until it is stopped; what they saw is kept."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._clients: dict[str, list[asyncio.Task[None]]] = {}
        self.slowest_seconds = 0.0
        self.statuses: dict[str, Counter[int]] = {}

    def start(self, name: str, token: str, path: str, body: Any, *, per_second: float, clients: int = 1) -> None:
        async def begin() -> None:
            asked = (self._ask(name, token, path, body, clients / per_second) for _ in range(clients))
            self._clients[name] = [asyncio.create_task(one) for one in asked]

        asyncio.run_coroutine_threadsafe(begin(), self._loop).result(10)

    def stop(self, *names: str) -> None:
        async def end() -> None:
            for name in names or tuple(self._clients):
                tasks = self._clients.pop(name)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _ask(self, name: str, token: str, path: str, body: Any, every_seconds: float) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=30, trust_env=False) as client:
            while True:
                began = time.monotonic()
                with contextlib.suppress(httpx.TransportError):  # a worker that is replaced closes connections
                    answer = await client.request("POST" if body else "GET", path, json=body)
                    self.statuses.setdefault(name, Counter())[answer.status_code] += 1
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
                # Whoever asks at even intervals may fall into step with a fault that comes and goes, and never meet it.
                await asyncio.sleep(every_seconds * random.uniform(0.5, 1.5))


@dataclass
class Watched:
    """The stack with its monitoring, tenants with their tokens, and traffic that does no harm."""

    stack: Stack
    settings: Settings
    tokens: dict[str, str]
    traffic: Traffic
    prometheus: httpx.Client
    alertmanager: httpx.Client

    def firing(self) -> set[str]:
        """The names of the alerts Alertmanager knows to be active now, but for the one that always is."""
        found = self.alertmanager.get("/api/v2/alerts", params={"active": True}).raise_for_status().json()
        return {alert["labels"]["alertname"] for alert in found} - {WATCHDOG}

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.prometheus.get("/api/v1/query", params={"query": expression}).raise_for_status().json()
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def file(self, tenant_id: str) -> Path:
        return (self.settings.tenants_dir / tenant_id / "engram.db").resolve(strict=True)

    def await_firing(self, *names: str) -> dict[str, float]:
        """Seconds until each of them was seen."""
        began, seen = time.monotonic(), dict[str, float]()

        def all_seen() -> bool:
            for name in self.firing() & set(names):
                seen.setdefault(name, round(time.monotonic() - began, 1))
            return len(seen) == len(names)

        try:
            eventually(all_seen, LIMIT_SECONDS)
        except AssertionError:
            missing = set(names) - set(seen)
            raise AssertionError(f"{missing} never fired; clients saw {self.traffic.statuses}") from None
        return seen


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
    environment |= {
        "ENGRAM_DATA_DIR": str(tmp_path_factory.mktemp("watched")),
        "ENGRAM_MONITORING_MINUTE_SECONDS": "2",
        "ENGRAM_RATE_LIMIT_RPS": "25",
        "ENGRAM_PREFECT_WORKER_LIMIT": "1",
    }
    stack = Stack(environment, {})
    stack.engram("up", "--detach", "--monitoring")
    with contextlib.ExitStack() as closing:
        closing.callback(stack.engram, "down")
        stack.status = stack.json("status")
        stack.without_the_minutes_sweep()
        settings = Settings(
            data_dir=stack.data_dir,
            control_plane_url=stack.status["control_plane_url"],
            jwt_issuer=stack.status["issuer"],
        )
        tokens = {}
        with ControlPlane(settings) as control_plane:
            for tenant_id in ("well", "broken", "slow", "flood"):
                registry.create(control_plane, settings, tenant_id)
                tokens[tenant_id] = issuer.mint(settings, tenant_id)[0]
        clients = [
            closing.enter_context(httpx.Client(base_url=stack.status[name], timeout=30, trust_env=False))
            for name in ("prometheus_url", "alertmanager_url")
        ]
        traffic = Traffic(stack.status["gateway_url"])
        closing.callback(traffic.close)
        traffic.start("well", tokens["well"], "/v1/memories", None, per_second=5)
        yield Watched(stack, settings, tokens, traffic, *clients)


def test_a_clean_run_fires_none(watched: Watched) -> None:
    """An alert that cries without a fault is switched off by the people it wakes; a slow machine is a fault here."""
    # Prometheus learns of its targets five seconds after its start, which are minutes here.
    eventually(lambda: watched.query("engram:probe:success and engram:requests:rate5m > 1"), LIMIT_SECONDS)
    eventually(lambda: not watched.firing(), LIMIT_SECONDS)
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began > 6 and watched.query("engram:auth_failures:baseline1d"), LIMIT_SECONDS)
    looked_ms = round((time.monotonic() - began) * 1_000)
    firing = f'max_over_time(ALERTS{{alertstate="firing"}}[{looked_ms}ms])'
    fired = {found["metric"]["alertname"] for found in watched.query(firing)}
    assert WATCHDOG in fired
    fired.remove(WATCHDOG)
    if watched.traffic.slowest_seconds > 0.2:
        fired -= SLOW_MACHINE
    if watched.query("min_over_time(probe_success[5m]) == 0"):
        fired -= PROBE_TIMED_OUT
    assert fired == set()
    health = [rule for group in _rules(watched) for rule in group["rules"] if rule["health"] != "ok"]
    assert health == [], "a rule that cannot be evaluated never fires"


def test_each_of_the_six_is_fired_by_its_fault_and_clears(watched: Watched) -> None:
    """A rule is only known to work once the thing it is for has happened, on the real parts, from end to end."""
    traffic, tokens = watched.traffic, watched.tokens
    memory = {"content": "written while somebody else holds the database"}
    with _broken(watched.file("broken")), _held(watched.file("slow"), seconds=1.3):
        traffic.start("broken", tokens["broken"], "/v1/memories", None, per_second=5)
        traffic.start("slow", tokens["slow"], "/v1/memories", memory, per_second=30, clients=20)
        traffic.start("bad tokens", "not.a.token", "/v1/memories", None, per_second=10)
        traffic.start("flood", tokens["flood"], "/v1/memories", None, per_second=35, clients=4)
        took = watched.await_firing(*(SIX - {"EngramUsageFlushFailures"}))
        traffic.stop("broken", "slow", "bad tokens", "flood")
    assert set(traffic.statuses["broken"]) == {503} and 401 in traffic.statuses["bad tokens"]
    assert 429 in traffic.statuses["flood"]
    with file_system(watched.settings.spool_dir, "ro"):  # the disk turns read-only
        took |= watched.await_firing("EngramUsageFlushFailures")
    began = time.monotonic()
    eventually(lambda: not watched.firing() & SIX, LIMIT_SECONDS)
    print(f"seconds from fault to alert: {took}; all clear after {time.monotonic() - began:.1f}")
    print(f"clients saw {traffic.statuses}")
    assert not watched.query("engram_usage_lost_total > 0"), "what could not be written was kept"


def test_alertmanager_reaches_the_bridge_and_restarts_like_other_parts(watched: Watched) -> None:
    """An alert nobody is told of is none; and what watches must come back by itself."""

    def notified(outcome: str) -> float:
        name = f'alertmanager_{outcome}{{integration="webhook"'
        lines = watched.alertmanager.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    assert eventually(lambda: notified("notifications_total"))
    assert notified("notifications_failed_total") == 0
    before = {p["name"]: p["pid"] for p in watched.stack.json("status")["processes"]}
    os.kill(before["alertmanager"], 9)

    def back() -> bool:
        now = json.loads((watched.settings.run_dir / "stack.json").read_text())["processes"]
        found = next(p for p in now if p["name"] == "alertmanager")
        return found["state"] == "running" and found["pid"] != before["alertmanager"]

    eventually(back, LIMIT_SECONDS)
    assert watched.alertmanager.get("/-/ready").status_code == 200


@contextlib.contextmanager
def _broken(path: Path) -> Iterator[None]:
    """The tenant's database is no database while this lasts."""
    whole = path.read_bytes()
    path.write_bytes(b"this was a database".ljust(len(whole), b"\0"))
    try:
        yield
    finally:
        path.write_bytes(whole)


@contextlib.contextmanager
def _held(path: Path, *, seconds: float) -> Iterator[None]:
    """Somebody holds the tenant's write lock, again and again, for this long."""
    stop = threading.Event()

    def hold() -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
            while not stop.is_set():
                connection.execute("BEGIN IMMEDIATE")
                stop.wait(seconds)
                connection.execute("ROLLBACK")
                stop.wait(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _rules(watched: Watched) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = watched.prometheus.get("/api/v1/rules").raise_for_status().json()["data"]["groups"]
    return groups
