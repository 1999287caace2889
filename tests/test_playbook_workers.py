"""Restarts on real gateways: one tenant's handles, and all workers one after the other, under load."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from shared import workers
from shared.playbook import workers as playbook_workers
from shared.playbook.workers import NotRestarted
from shared.settings import Settings
from tests.gateway_stack import Gateway, Stack, eventually, gateway, stack  # noqa: F401
from tests.playbook_fixtures import ask, newest, settings, settings_of  # noqa: F401


def databases_open(gateway: Gateway, tenant_id: str) -> set[tuple[int, int]]:
    """(pid, descriptor) of every file of that tenant's database that a worker has open."""
    found = set()
    for worker in gateway.workers():
        for name in Path(f"/proc/{worker.pid}/fd").iterdir():
            with suppress(OSError):
                if f"/tenants/{tenant_id}/" in str(name.readlink()):
                    found.add((worker.pid, int(name.name)))
    return found


def test_a_restarted_tenant_is_closed_in_every_worker_and_serves_at_once(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """Looked for where it cannot be faked: among the descriptors of the workers."""
    tenant = stack.tenant()
    headers = stack.headers(tenant)

    def ask_once() -> int:
        return httpx.get(f"{stack.gateway.url}/v1/memories", headers=headers, trust_env=False, timeout=30).status_code

    eventually(lambda: ask_once() == 200 and len({pid for pid, _ in databases_open(stack.gateway, tenant)}) == 2)
    dry = ask(stack, settings, "restart-tenant", tenant, dry_run=True)
    assert databases_open(stack.gateway, tenant) and dry.verified is None
    done = ask(stack, settings, "restart-tenant", tenant)
    assert done.verified and len(done.workers) == 2
    assert not databases_open(stack.gateway, tenant)
    assert ask_once() == 200


def test_all_workers_are_replaced_and_no_request_is_lost(
    stack: Stack,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients with kept connections and with new ones, reading and writing, while both workers go; asked for over
    HTTP, so one of them goes while it still has that to answer. Before that one try whose new worker dies: those that
    serve are kept."""
    with gateway(tmp_path / "data", stack.control_plane_url, stack.issuer) as running:
        own = settings_of(stack, running)
        tenant = _tenant_of(stack, own)
        headers = stack.headers(tenant)
        stop = threading.Event()
        answers: list[int] = []
        failures: list[str] = []

        def load(kept: bool) -> None:
            limits = httpx.Limits(max_keepalive_connections=1 if kept else 0)
            with httpx.Client(base_url=running.url, headers=headers, trust_env=False, timeout=30, limits=limits) as c:
                while not stop.wait(0.01):
                    try:
                        answers.append(c.post("/v1/memories", json={"content": "x"}).status_code)
                        answers.append(c.get("/v1/memories?limit=1").status_code)
                    except httpx.HTTPError as e:
                        failures.append(f"{'kept' if kept else 'new'}: {type(e).__name__} {e}")

        clients = [threading.Thread(target=load, args=(kept,)) for kept in (True, True, False, False)]
        before = {worker.pid for worker in running.workers()}
        for client in clients:
            client.start()
        try:
            with monkeypatch.context() as patch, ThreadPoolExecutor(1) as aside:
                patch.setattr(playbook_workers, "REPLACED_SECONDS", 3600.0)
                tried = aside.submit(ask, stack, own, "restart-workers")
                eventually(lambda: _newcomers(running, before))[0].kill()
                found = tried.result(60)  # the supervisor's word, not the end of the hour
                assert found.verified is False and found.workers == dict.fromkeys(before, False)
                assert found.summary == (
                    "0 of 2 workers replaced: a new worker died before it served; the workers there are are kept"
                )
            assert {worker.pid for worker in running.workers()} == before
            asked = httpx.post(
                f"{running.url}/v1/admin/actions/restart-workers",
                json={"reason": "test"},
                headers=stack.headers("operators", scope="admin"),
                trust_env=False,
                timeout=120,
            )
            assert asked.status_code == 200, asked.text
            done = asked.json()
        finally:
            eventually(lambda: not before & {pid for pid in before if psutil.pid_exists(pid)})
            stop.set()
            for client in clients:
                client.join()
        after = set(done["after"])
        assert done["verified"] and done["before"] == sorted(before) and not before & after
        eventually(lambda: {worker.pid for worker in running.workers()} == after)
        assert failures == [] and set(answers) <= {200, 201}, failures
        assert sum(status == 201 for status in answers) > 20
        assert set(workers.announced(own)) == after
        assert running.metric("engram_worker_restarts_total") == 0, "nobody died"
        assert newest(stack, action="restart-workers")["after"] == sorted(after)


def test_without_a_gateway_there_are_no_workers_to_restart(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """It says so, and the book says that it failed."""
    alone = Settings(data_dir=tmp_path, control_plane_url=stack.control_plane_url)  # type: ignore[arg-type]
    with pytest.raises(NotRestarted):
        ask(stack, alone, "restart-workers")
    assert newest(stack)["state"] == "failed"


def _newcomers(gateway: Gateway, before: set[int]) -> list[psutil.Process]:
    """Children that are no worker of before; the one that Python's multiprocessing keeps beside them is none either."""
    children = psutil.Process(gateway.process.pid).children()
    return [c for c in children if c.pid not in before and "resource_tracker" not in " ".join(c.cmdline())]


def _tenant_of(stack: Stack, settings: Settings) -> str:  # noqa: F811
    from shared import registry
    from tests.gateway_stack import _numbers

    tenant_id = f"restart-{next(_numbers)}"
    registry.create(stack.control_plane, settings, tenant_id)
    return tenant_id
