"""An acknowledged write survives the death of the worker that acknowledged it; which writes wait for each other."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from gateway import handles
from gateway.handles import OpenTenant
from shared.engine import database, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.tenant import TenantPaths
from tests.gateway_stack import Stack, eventually, gateway, stack  # noqa: F401

CLIENTS = 32


def test_every_acknowledged_write_of_32_clients_outlives_a_sigkill(stack: Stack) -> None:  # noqa: F811
    """kill -9 under load: each 201 a client saw is in the database, with its content, and metered."""
    tenant = stack.tenant()
    data_dir = stack.settings.data_dir.parent / "killed-writer"
    (data_dir / "tenants").mkdir(parents=True)
    (data_dir / "tenants" / tenant).symlink_to(stack.settings.tenants_dir / tenant)
    acknowledged: dict[str, str] = {}
    request_ids: set[str] = set()
    answers: dict[int, int] = {}
    enough = threading.Event()

    def write(number: int) -> None:
        headers = stack.headers(tenant) | {"Content-Type": "application/json"}
        for n in itertools.count():
            if enough.is_set():
                return
            text = f"client {number} memory {n}"
            try:
                connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=10)
                connection.request("POST", "/v1/memories", json.dumps({"content": text, "tags": ["load"]}), headers)
                answer = connection.getresponse()
                made = json.loads(answer.read())
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)  # its worker was killed
                continue
            finally:
                connection.close()
            answers[answer.status] = answers.get(answer.status, 0) + 1
            if answer.status == 201:
                acknowledged[made["id"]] = text
                request_ids.add(answer.headers["x-request-id"].replace("-", ""))

    with gateway(data_dir, stack.control_plane_url, stack.issuer, gateway_workers=1) as served:
        threads = [threading.Thread(target=write, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: len(acknowledged) >= 150, 60)
            for worker in served.workers():
                worker.kill()  # once: Granian takes a second death within seconds for a crash loop and ends
            goal = len(acknowledged) + 150
            eventually(lambda: len(acknowledged) >= goal, 60)
        finally:
            enough.set()
            for thread in threads:
                thread.join()
        assert set(answers) == {201}
        events = {e.request_id.hex() for e in served.events(tenant) if e.status == 201 and e.memories_created == 1}
    handle = TenantDatabase(TenantPaths.of(stack.settings.tenants_dir, tenant))
    with handle.read() as connection:
        stored = dict(connection.execute("SELECT id, content FROM memories").fetchall())
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    handle.close()
    assert acknowledged.items() <= stored.items()
    assert len(stored) - len(acknowledged) <= CLIENTS, "only what was in flight when a worker died"
    assert request_ids <= events


def test_writes_in_company_come_together_and_a_lone_one_never_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small transactions in a row cost everybody the CPU; for one after the other there is nobody to wait for."""
    clock, slept = SimpleNamespace(now=100.0), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(handles, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    paths = TenantPaths.of(tmp_path, "acme")
    database.create(paths)

    async def run() -> list[bool]:
        tenant = OpenTenant(paths, 5.0, 2.0)
        paced = []
        for count in (1, 1, 2, 1, 1):
            for _ in range(count):
                tenant.writes.put(lambda c: memories.create(c, NewMemory("x")), clock.now)
            slept.clear()
            assert len(handles.write(tenant, [], 64)) == count
            paced.append(slept == [pytest.approx(handles.PACE_SECONDS)])
            assert paced[-1] or not slept
        handles.close_and_fold(tenant)
        return paced

    assert asyncio.run(run()) == [False, False, False, True, False]
