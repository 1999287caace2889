"""Broken parts: maintenance, swaps, corrupt and full databases, a spool that cannot write, no control plane."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from shared import registry, tally
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.disk_fixtures import file_system, fill
from tests.gateway_stack import (  # noqa: F401
    Stack,
    assert_problem,
    control_plane_url,
    eventually,
    gateway,
    stack,
)
from tests.ports import free_port
from tests.silent_proxy import SilentProxy


def paths_of(stack: Stack, tenant: str) -> TenantPaths:  # noqa: F811
    return TenantPaths.of(stack.settings.tenants_dir, tenant)


def test_under_a_maintenance_mark_writes_wait_and_reads_go_on(stack: Stack) -> None:  # noqa: F811
    """503 with the reason for POST, PATCH and DELETE; GET and search answer; afterwards everything works."""
    tenant = stack.tenant()
    with stack.client(tenant) as api:
        path = f"/v1/memories/{api.post('/v1/memories', json={'content': 'before'}).json()['id']}"
        mark = paths_of(stack, tenant).mark
        mark.write_text("test")
        for refused in (
            api.post("/v1/memories", json={"content": "x"}),
            api.patch(path, json={"content": "x"}),
            api.delete(path),
        ):
            assert assert_problem(refused, 503)["reason"] == "maintenance"
        assert api.get(path).json()["content"] == "before"
        assert api.get("/v1/memories").status_code == 200
        assert api.post("/v1/search", json={"query": "before"}).json()["count"] == 1
        mark.unlink()
        assert api.patch(path, json={"content": "after"}).json()["content"] == "after"
    refused_events = [e for e in stack.gateway.events(tenant) if e.status == 503]
    assert len(refused_events) == 3 and not any(e.api_calls for e in refused_events)


def test_a_lookup_waits_out_a_short_swap_and_reads_the_new_generation(stack: Stack) -> None:  # noqa: F811
    """While the exclusive lock is held nobody reads; then the reader on the event loop has the new file too."""
    tenant = stack.tenant()
    paths = paths_of(stack, tenant)
    with stack.client(tenant) as api:
        kept = api.post("/v1/memories", json={"content": "kept"}).json()["id"]
        # Before the lock is taken, which the request waits for no longer than a second.
        shutil.copytree(paths.generation_dir(1), paths.generation_dir(2))
        link = paths.root / "next"
        link.symlink_to("generations/000002")
        lock = os.open(paths.lock, os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        answers = []
        reading = threading.Thread(target=lambda: answers.append(api.get(f"/v1/memories/{kept}")))
        reading.start()
        link.rename(paths.current)
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
        reading.join()
        assert answers[0].status_code == 200
        shutil.rmtree(paths.generation_dir(1))
        for n in range(5):
            written = api.patch(f"/v1/memories/{kept}", json={"content": f"new {n}"}).json()
            assert api.get(f"/v1/memories/{kept}").json() == written


def test_a_swap_that_takes_too_long_is_503_maintenance_also_for_reads(stack: Stack) -> None:  # noqa: F811
    """A request waits for the fence only so long."""
    tenant = stack.tenant()
    with stack.client(tenant) as api:
        made = api.post("/v1/memories", json={"content": "x"}).json()["id"]
        lock = os.open(paths_of(stack, tenant).lock, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for refused in (api.get(f"/v1/memories/{made}"), api.post("/v1/memories", json={"content": "x"})):
                assert assert_problem(refused, 503)["reason"] == "maintenance"
        finally:
            os.close(lock)
        assert api.get(f"/v1/memories/{made}").status_code == 200


def test_a_missing_or_corrupt_database_is_503_and_counted_and_heals_without_a_restart(stack: Stack) -> None:  # noqa: F811
    """Never 500, never an empty database in its place; the tenant works again when its file is back."""
    missing, corrupt = stack.tenant(), stack.tenant()
    before = stack.gateway.metric("engram_db_open_failures_total")
    hidden = paths_of(stack, missing).current.with_name("hidden")
    paths_of(stack, missing).current.rename(hidden)
    file = paths_of(stack, corrupt).generation_dir(1) / "engram.db"
    good = file.read_bytes()
    file.write_bytes(b"not a database at all" * 1_000)
    for tenant in (missing, corrupt):
        with stack.client(tenant) as api:
            refused = assert_problem(api.get("/v1/memories"), 503)
            assert refused["reason"] == "tenant database unavailable"
            assert "/" not in refused["detail"]
    assert stack.gateway.metric("engram_db_open_failures_total") >= before + 2
    hidden.rename(paths_of(stack, missing).current)
    file.write_bytes(good)
    for tenant in (missing, corrupt):
        with stack.client(tenant) as api:
            assert api.post("/v1/memories", json={"content": "back"}).status_code == 201


@pytest.fixture
def small_disks(tmp_path):
    """Two file systems of two megabytes."""
    with (
        file_system(tmp_path / "disk-tenants", "size=2m") as one,
        file_system(tmp_path / "disk-spool", "size=2m") as two,
    ):
        yield [one, two]


def test_a_full_disk_is_507_for_writes_and_a_full_spool_is_503_and_no_event_is_lost(
    stack: Stack,  # noqa: F811
    tmp_path,
    small_disks,
) -> None:
    """A tenant without space can still read; when usage cannot be recorded nobody is served; then all is there."""
    tenant = stack.tenant()
    tenant_disk, spool_disk = small_disks
    data_dir = tmp_path / "data"
    (data_dir / "tenants").mkdir(parents=True)
    shutil.copytree(stack.settings.tenants_dir / tenant, tenant_disk / tenant, symlinks=True)
    (data_dir / "tenants" / tenant).symlink_to(tenant_disk / tenant)
    (data_dir / "spool").symlink_to(spool_disk)
    with gateway(data_dir, stack.control_plane_url, stack.issuer, gateway_workers=1) as full:
        answered = []
        api = full.client
        api.headers.update(stack.headers(tenant))

        def ask(method: str, **kwargs: object) -> int:
            answered.append(api.request(method, "/v1/memories", **kwargs))
            return answered[-1].status_code

        while ask("POST", json={"content": "word " * 15_000}) == 201:
            pass
        assert_problem(answered[-1], 507)
        assert ask("GET") == 200

        filler = fill(spool_disk / "filler")
        eventually(lambda: ask("GET") == 503)
        assert assert_problem(answered[-1], 503)["reason"] == "spool full"
        assert assert_problem(api.get("/ready"), 503)["failing"] == ["spool"]
        filler.unlink()
        eventually(lambda: ask("GET") == 200)

        assert {r.status_code for r in answered} == {201, 507, 200, 503}
        billed = [r for r in answered if r.status_code != 503]
        eventually(lambda: len(full.events(tenant)) == len(billed))
        assert full.metric("engram_usage_lost_total") == 0
        assert full.metric("engram_usage_flush_failures_total") > 0
        assert full.metric("engram_shed_total", route="/v1/memories") == len(answered) - len(billed)


def test_a_worker_that_dies_on_a_full_disk_has_a_successor_and_no_death_is_for_nothing(
    stack: Stack,  # noqa: F811
    tmp_path,
    small_disks,
) -> None:
    """The new one maps what the dead one had reserved: it used to die of SIGBUS, and so on until the server was given
    up with the worker that was left. Then there is room, and nothing was lost."""
    tenant = stack.tenant()
    data_dir = stack.lend_tenants(tmp_path / "data")
    for name in ("run", "spool", "tally"):
        (small_disks[1] / name).mkdir()
        (data_dir / name).symlink_to(small_disks[1] / name)
    with gateway(data_dir, stack.control_plane_url, stack.issuer) as full:
        full.client.headers.update(stack.headers(tenant))
        for _ in range(20):
            assert full.client.get("/v1/memories").status_code == 200
        filler = fill(small_disks[1] / "filler")
        victim, other = full.workers()
        counted = full.metric("engram_requests_total", route="/v1/memories", status="200")
        victim.kill()
        pids = eventually(lambda: w if len(w := {w.pid for w in full.workers()} - {victim.pid}) == 2 else None, 60)
        assert other.pid in pids and full.process.poll() is None
        connections = [httpx.Client(base_url=full.url, headers=stack.headers(tenant), trust_env=False) for _ in "1234"]
        for client in connections:  # of either worker
            with client:
                assert client.get("/health").status_code == 200
                assert client.get("/metrics").status_code == 200
                eventually(lambda c=client: assert_problem(c.get("/v1/memories"), 503)["reason"] == "spool full")
        assert full.metric("engram_worker_restarts_total") == 1
        assert full.metric("engram_requests_total", route="/v1/memories", status="200") >= counted
        filler.unlink()
        eventually(lambda: full.client.get("/v1/memories").status_code == 200)
        assert sum("Respawning" in line["event"] for line in full.log()) == 1
        assert full.metric("engram_usage_lost_total") == 0


def test_what_a_stop_loses_on_a_full_disk_is_counted_and_goes_on_counting_after_the_next_starts(
    stack: Stack,  # noqa: F811
    tmp_path,
    small_disks,
) -> None:
    """A request was answered and its event waits in memory: when the gateway ends nobody can be told, so the next one
    tells, and the alert sees the counter rise."""
    tenant = stack.tenant()
    data_dir = stack.lend_tenants(tmp_path / "data")
    (data_dir / "spool").symlink_to(small_disks[1])
    port = free_port()

    def started():
        return gateway(data_dir, stack.control_plane_url, stack.issuer, gateway_workers=1, gateway_port=port)

    filler = small_disks[1] / "filler"
    with started() as full:
        full.client.headers.update(stack.headers(tenant))
        fill(filler)
        answers = []
        while not answers or answers[-1] != 503:
            answers.append(full.client.get("/v1/memories").status_code)
        written = len(full.events(tenant))
        assert full.metric("engram_usage_lost_total") == 0
        full.stop()
        said = next(line for line in full.log() if line.get("event") == "usage_events_unwritten")
        lost = answers.count(200) - written
        assert said["lost"] == lost > 0
    assert sum(page.lost.get(tenant, 0) for page in tally.read(Settings(data_dir=data_dir))) == lost
    for _ in range(2):
        with started() as again:
            assert again.metric("engram_usage_lost_total") == lost
    filler.unlink()


def test_without_the_control_plane_known_tenants_are_served(stack: Stack, tmp_path) -> None:  # noqa: F811
    """The last map stands; 503 is only for what must ask PostgreSQL: /v1/usage, and who is no tenant it knows."""
    with contextlib.ExitStack() as postgres:
        url = postgres.enter_context(control_plane_url(tmp_path / "control-plane"))
        settings = Settings(data_dir=tmp_path / "data", control_plane_url=url)
        with ControlPlane(settings) as control_plane:
            control_plane.migrate()
            registry.create(control_plane, settings, "acme")
        with gateway(
            settings.data_dir,
            url,
            stack.issuer,
            gateway_workers=1,
            control_plane_connect_timeout_seconds=1,
        ) as served:
            postgres.close()
            api = served.client
            api.headers.update(stack.headers("acme"))
            assert api.post("/v1/memories", json={"content": "x"}).status_code == 201
            assert api.get("/ready").status_code == 200
            assert assert_problem(api.get("/v1/usage"), 503)["reason"] == "control plane unavailable"
            unknown = assert_problem(api.get("/v1/memories", headers=stack.headers("nobody")), 503)
            assert unknown["reason"] == "control plane unavailable"
            assert len(served.events("acme")) == 2


def test_a_control_plane_that_falls_silent_holds_no_usage_request_for_long(stack: Stack, tmp_path) -> None:  # noqa: F811
    """Its connections are still there, so no time-out of theirs ends; a dozen at once are told in the same time, not
    one after the other."""
    tenant = stack.tenant()
    stack.lend_tenants(tmp_path)
    with (
        contextlib.closing(SilentProxy(stack.control_plane_url)) as proxy,
        gateway(
            tmp_path,
            proxy.url,
            stack.issuer,
            gateway_workers=1,
            control_plane_connect_timeout_seconds=600,
            usage_report_wait_seconds=1,
        ) as served,
    ):
        served.client.headers.update(stack.headers(tenant))
        assert served.client.get("/v1/usage").status_code == 200
        proxy.silent.set()
        with ThreadPoolExecutor(12) as pool:  # of a client that waits 30 s for an answer
            answers = list(pool.map(lambda _: served.client.get("/v1/usage"), range(36)))
        assert {assert_problem(each, 503)["reason"] for each in answers} == {"control plane unavailable"}
        assert served.client.get("/v1/memories").status_code == 200
