"""A tenant moves to another machine and back while clients write to it through both machines' gateways."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Self

import httpx
import pytest

from shared import metering
from shared.control_plane import ControlPlane
from shared.reconcile import reconcile
from tests.core_fixtures import contents_of, settings_in, wait_until
from tests.gateway_stack import Gateway, Issuer, eventually, gateway
from tests.move_fixtures import A, B, Pair, new_pair, perform
from tests.ports import free_port

pytest_plugins = ("tests.core_fixtures", "tests.move_fixtures")


class Client:
    """Writes one memory after the other through one gateway, and notes what became of each."""

    def __init__(self, url: str, token: str, name: str) -> None:
        self.acknowledged: dict[str, str] = {}
        self.unknown: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._name = name
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            content = f"{self._name}{number}"
            number += 1
            answer = self._http.post("/v1/memories", json={"content": content})
            self.statuses[answer.status_code] += 1
            if answer.status_code == 201:
                self.acknowledged[content] = answer.json()["id"]
                continue
            problem = answer.json()
            self.reasons[problem.get("reason", problem["title"])] += 1
            if answer.status_code == 502:
                self.unknown.append(content)
            time.sleep(0.02)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._http.close()


class Running(NamedTuple):
    pair: Pair
    issuer: Issuer
    gateways: list[Gateway]


@pytest.fixture
def running(tmp_path: Path, control_plane_url: str, quick_looks: None) -> Iterator[Running]:
    ports = {A: free_port(), B: free_port()}
    urls = ",".join(f"{machine_id}=http://127.0.0.1:{port}" for machine_id, port in ports.items())
    with ExitStack() as stack:
        control_plane = stack.enter_context(ControlPlane(settings_in(tmp_path, control_plane_url)))
        pair = new_pair(tmp_path, control_plane_url, control_plane, f"t{secrets.token_hex(6)}")
        issuer = Issuer()
        stack.callback(issuer.close)
        gateways = [
            stack.enter_context(
                gateway(
                    pair.world(machine_id).settings.data_dir,
                    control_plane_url,
                    issuer,
                    machine_id=machine_id,
                    gateway_port=port,
                    gateway_workers=1,
                    routing="forward",
                    routing_urls=urls,
                )
            )
            for machine_id, port in ports.items()
        ]
        yield Running(pair, issuer, gateways)


def test_a_tenant_moved_there_and_back_under_load_loses_nothing_and_is_billed_once(running: Running) -> None:
    """What a client was told is stored is in the one database that is served, once; what it was refused is not there;
    and the books of both machines agree with the clients."""
    pair, token = running.pair, running.issuer.token(running.pair.tenant_id)
    with Client(running.gateways[0].url, token, "a") as one, Client(running.gateways[1].url, token, "b") as two:
        moves = []
        for target in (pair.b, pair.a):
            counts = [len(c.acknowledged) for c in (one, two)]
            wait_until(lambda: all(len(c.acknowledged) > n + 20 for c, n in zip((one, two), counts, strict=True)))  # noqa: B023
            moves.append(perform(pair))
            assert pair.serving() is target
        counts = [len(c.acknowledged) for c in (one, two)]
        wait_until(lambda: all(len(c.acknowledged) > n + 20 for c, n in zip((one, two), counts, strict=True)))
    acknowledged = one.acknowledged | two.acknowledged
    contents = contents_of(pair.a.paths.database)
    assert len(contents) == len(set(contents))
    assert acknowledged.keys() <= set(contents)
    assert set(contents) - acknowledged.keys() <= {*one.unknown, *two.unknown}
    reasons = one.reasons + two.reasons
    assert reasons.keys() <= {"maintenance", "machines disagree", "machine broke off"}, reasons
    print(
        f"\n{len(acknowledged)} acknowledged, {len(contents)} stored, 0 lost; refused {dict(reasons)};"
        f" held {[m.held_ms for m in moves]} ms; {dict(one.statuses + two.statuses)}"
    )
    assert reasons["maintenance"] > 0

    def billed() -> int:
        for world in (pair.a, pair.b):
            list(metering.drain_all(pair.control_plane, world.settings))
        with pair.control_plane.transaction() as connection:
            row = connection.execute(
                "SELECT coalesce(sum(memories_created), 0)::int AS n FROM usage_events WHERE tenant_id = %s",
                (pair.tenant_id,),
            ).fetchone()
        return int(row["n"]) if row is not None else 0

    eventually(lambda: billed() == len(contents))
    today = datetime.now(UTC).date()
    for world, served in zip((pair.a, pair.b), running.gateways, strict=True):
        settings = world.settings.model_copy(update={"gateway_port": httpx.URL(served.url).port})
        books = reconcile(pair.control_plane, settings, today - timedelta(days=1), today)
        assert books.agree and books.gateway is not None, books.where()
