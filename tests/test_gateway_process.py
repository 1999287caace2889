"""The processes: workers die and come back, a supervisor dies and nothing is left, SIGTERM ends in 0."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import psutil
import pytest

from gateway.supervisor import Supervisor
from shared import limits, spool, workers
from shared.limits import set_limit
from tests.gateway_stack import Gateway, Stack, eventually, gateway, stack  # noqa: F401
from tests.ports import free_port


def _listening(url: str) -> bool:
    where = urlsplit(url)
    try:
        socket.create_connection((where.hostname, where.port), timeout=1).close()
    except OSError:
        return False
    return True


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


class Load:
    """Clients that create memories, one 5 ms after another was answered, each over a connection that it keeps."""

    def __init__(self, served: Gateway, headers: dict[str, str], clients: int) -> None:
        self.acknowledged: dict[str, str] = {}  # request id → memory id
        self.statuses: Counter[int] = Counter()
        self.failures: Counter[int] = Counter()  # by client
        self._stop = threading.Event()
        self._served, self._headers = served, headers
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._served.url, headers=self._headers, timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                self._stop.wait(0.005)
                try:
                    answer = client.post("/v1/memories", json={"content": "x"})
                except httpx.HTTPError:
                    self.failures[number] += 1
                    self._stop.wait(0.02)
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 201:
                    self.acknowledged[answer.headers["x-request-id"]] = answer.json()["id"]


def _stored(stack: Stack, tenant: str) -> set[str]:  # noqa: F811
    with stack.client(tenant) as client:
        found, cursor = set(), None
        while True:
            page = client.get("/v1/memories", params={"limit": 200} | ({"cursor": cursor} if cursor else {})).json()
            found |= {memory["id"] for memory in page["memories"]}
            cursor = page["next_cursor"]
            if cursor is None:
                return found


def _kill(served: Gateway, victim: psutil.Process) -> psutil.Process:
    """The worker that took the victim's place, once it serves."""
    known = {worker.pid for worker in served.workers()}
    victim.kill()
    found: psutil.Process = eventually(lambda: next((w for w in served.workers() if w.pid not in known), None), 60)
    return found


def test_killed_workers_cost_only_what_they_had_in_hand(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """One is killed, and its successor as soon as it serves: the other goes on serving, each client loses at most
    the request it had in flight, no acknowledged write or event is lost, the rate limit holds."""
    tenant, limited, data_dir = stack.tenant(), stack.tenant(), stack.lend_tenants(tmp_path)
    kills, clients, rps, burst = 2, 4, 4, 10  # a rate that clients on a busy machine are above, too
    with gateway(data_dir, stack.control_plane_url, stack.issuer) as served:
        settings = stack.settings.model_copy(update={"data_dir": data_dir})
        set_limit(settings, f"rate_limit:{limited}", {"rps": rps, "burst": burst}, ttl_seconds=600, reason="test")
        obeyed = workers.wait_until_obeyed(settings, limits.version_of(limits.active(settings)), 60)
        assert len(obeyed) == 2 and all(obeyed.values()), "both, or one serves on as before for a poll"
        began = time.monotonic()
        with Load(served, stack.headers(tenant), clients) as load, Load(served, stack.headers(limited), 2) as bounded:
            eventually(lambda: len(load.acknowledged) > 20 and bounded.statuses[429])
            victim, back_in = served.workers()[0], []
            for _ in range(kills):
                before, killed_at = len(load.acknowledged), time.monotonic()
                victim = _kill(served, victim)
                back_in.append(round(time.monotonic() - killed_at, 2))
                assert len(load.acknowledged) > before, "the other worker serves on"
            settled = len(load.acknowledged)
            eventually(lambda: len(load.acknowledged) > settled + 20)
        elapsed = time.monotonic() - began
        print(f"a killed worker was back in {back_in} s")
        assert load.statuses.keys() == {201}, load.statuses
        assert max(load.failures.values(), default=0) <= kills, load.failures
        assert bounded.statuses[429] > 0 and bounded.statuses[201] <= (burst + rps * elapsed) * 1.05
        failed = sum(load.failures.values())
        events = {str(UUID(bytes=event.request_id)) for event in served.events(tenant)}
        assert load.acknowledged.keys() <= events and len(events) <= len(load.acknowledged) + failed
        counted = served.metric("engram_requests_total", route="/v1/memories", method="POST", status="201")
        made = len(load.acknowledged) + bounded.statuses[201]
        assert made <= counted <= made + failed + sum(bounded.failures.values())
        assert served.metric("engram_worker_restarts_total") == kills
        assert set(load.acknowledged.values()) <= _stored(stack, tenant)
        assert served.process.poll() is None and served.stop() == 0
        assert len(list((data_dir / "spool").glob("*.open"))) <= kills, "left by the killed, for the drainer"
        spool.adopt(data_dir / "spool")
        sealed = [e for p in spool.sealed(data_dir / "spool") for e in spool.read(p).events if e.tenant_id == tenant]
        assert {str(UUID(bytes=e.request_id)) for e in sealed} == events and len(sealed) == len(events)


def test_a_frozen_worker_is_replaced(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """A stopped process keeps its share of the connections: it is killed once its heartbeat stands still."""
    data_dir = stack.lend_tenants(tmp_path)
    with gateway(data_dir, stack.control_plane_url, stack.issuer, worker_silence_seconds=4) as served:
        assert served.metric("engram_worker_oldest_beat_seconds") < 60
        frozen, other = served.workers()
        frozen.suspend()
        eventually(lambda: len(w := served.workers()) == 2 and frozen.pid not in {x.pid for x in w}, 60)
        assert other.pid in {w.pid for w in served.workers()}
        assert eventually(lambda: served.metric("engram_worker_restarts_total")) == 1
        assert any("silent" in line["event"] for line in served.log())


def test_successors_that_keep_dying_do_not_take_a_worker_that_serves_with_them(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """More deaths than would end the server: it goes on answering, tries again with pauses, and is whole once what
    killed them is gone. When the last one dies too there is nobody to spare."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path)
    fatal = tmp_path / "fatal"
    dying = {"module": "tests.gateway_dying", "variables": {"FATAL": str(fatal)}}
    with gateway(data_dir, stack.control_plane_url, stack.issuer, **dying) as served:

        def spawned() -> int:
            return sum("Respawning" in line["event"] for line in served.log())

        fatal.touch()
        victim, other = served.workers()
        victim.kill()
        eventually(lambda: spawned() >= 4, 120)
        assert served.process.poll() is None and _alive(other)
        assert served.client.get("/v1/memories", headers=stack.headers(tenant)).status_code == 200
        assert any("another serves" in line["event"] for line in served.log())
        fatal.unlink()
        eventually(lambda: len(served.workers()) == 2, 120)
        assert _alive(other)
        fatal.touch()
        for worker in served.workers():
            worker.kill()
        assert served.process.wait(60) == 1


def test_a_graceful_stop_finishes_what_it_began_and_loses_nothing(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """SIGTERM under load, to the workers too, as a terminal or a process group's owner sends it (one that got two used
    to hang): no new connections, a request that is still being sent is answered, the process ends with 0, and every
    acknowledged write and every event is on disk, in sealed segments."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path)
    # A stop has a quarter of its time for what is still being sent, which here is until it is seen to have begun.
    with gateway(data_dir, stack.control_plane_url, stack.issuer, gateway_kill_timeout_seconds=80) as served:
        where = urlsplit(served.url)
        body = b'{"content": "slow"}'
        head = f"POST /v1/memories HTTP/1.1\r\nHost: x\r\nAuthorization: {stack.headers(tenant)['Authorization']}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with (
            Load(served, stack.headers(tenant), 4) as load,
            socket.create_connection((where.hostname, where.port)) as slow,
        ):
            slow.settimeout(60)
            slow.sendall(head.encode() + body[:5])
            eventually(lambda: len(load.acknowledged) > 50)
            for pid in [served.process.pid, *(worker.pid for worker in served.workers())]:
                os.kill(pid, signal.SIGTERM)
            eventually(lambda: not _listening(served.url))
            assert served.process.poll() is None, "it waits for the slow one"
            slow.sendall(body[5:])
            answer = slow.recv(65_536)
            assert served.process.wait(90) == 0
        assert answer.startswith(b"HTTP/1.1 201"), answer
        assert load.statuses.keys() == {201}, load.statuses
        assert not list((data_dir / "spool").glob("*.open")), "every segment was sealed"
        events = [e for p in spool.sealed(data_dir / "spool") for e in spool.read(p).events if e.tenant_id == tenant]
        ids = {str(UUID(bytes=event.request_id)) for event in events}
        assert load.acknowledged.keys() <= ids and len(ids) == len(events)
        assert set(load.acknowledged.values()) | {json.loads(answer.partition(b"\r\n\r\n")[2])["id"]} <= _stored(
            stack, tenant
        )


def test_a_client_that_never_ends_its_request_does_not_hold_up_the_stop(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """A body may take longer than whoever stops the gateway waits: a worker that is killed for it seals nothing."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path)
    slow_limits = {"body_timeout_seconds": 300, "gateway_kill_timeout_seconds": 8, "gateway_workers": 1}
    with gateway(data_dir, stack.control_plane_url, stack.issuer, **slow_limits) as served:
        where = urlsplit(served.url)
        head = f"POST /v1/memories HTTP/1.1\r\nHost: x\r\nAuthorization: {stack.headers(tenant)['Authorization']}\r\n"
        with socket.create_connection((where.hostname, where.port), timeout=60) as slow:
            slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{{".encode())
            eventually(lambda: served.client.get("/v1/memories", headers=stack.headers(tenant)).status_code == 200)
            served.process.terminate()
            answer = slow.recv(65_536)
            assert served.process.wait(30) == 0
        assert answer.startswith(b"HTTP/1.1 408") and b"stopped" in answer, answer
        assert any(line["event"] == "worker_stopped" for line in served.log())
        assert not list((data_dir / "spool").glob("*.open")), "every segment was sealed"


@pytest.mark.parametrize(("told_to_stop", "code"), [(True, 0), (False, 1)])
def test_a_worker_that_died_as_the_gateway_is_stopped_is_no_failure_of_the_stop(told_to_stop: bool, code: int) -> None:
    """Granian exits 1 for every death it has not dealt with; whoever runs the gateway would start it again."""
    supervisor = Supervisor("unused:app", silence_seconds=0, restart_asked=lambda: ("", 0), port=0)
    supervisor._init_shared_socket()
    supervisor._start_ipc()
    supervisor.interrupt_signal, supervisor.interrupt_children = told_to_stop, [0]
    exits = contextlib.nullcontext() if code == 0 else pytest.raises(SystemExit, match=str(code))
    with exits:
        supervisor.shutdown()


def test_after_a_sigkilled_supervisor_the_next_one_starts_at_once(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """The workers go with it, seal their spools and free the port, which the next gateway takes."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path)
    with gateway(data_dir, stack.control_plane_url, stack.issuer) as served:
        with httpx.Client(base_url=served.url, headers=stack.headers(tenant), trust_env=False) as client:
            assert client.post("/v1/memories", json={"content": "x"}).status_code == 201
        workers = served.workers()
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
        with gateway(
            data_dir, stack.control_plane_url, stack.issuer, gateway_port=urlsplit(served.url).port, gateway_workers=1
        ) as following:
            assert following.client.get("/health").status_code == 200
            eventually(lambda: not any(_alive(w) for w in workers))
        assert not list((data_dir / "spool").glob("*.open"))
        assert sum(len(spool.read(p).events) for p in spool.sealed(data_dir / "spool")) == 1


def test_workers_that_cannot_start_end_the_gateway_with_1(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Its supervisor must see that; trying again for ever would look like a gateway that is starting."""
    (tmp_path / "spool").write_text("not a directory")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PROMETHEUS_"))}
    environment |= {"ENGRAM_DATA_DIR": str(tmp_path), "ENGRAM_CONTROL_PLANE_URL": stack.control_plane_url}
    environment |= {
        "ENGRAM_JWKS_URL": stack.issuer.url,
        "ENGRAM_JWT_ISSUER": "x",
        "ENGRAM_GATEWAY_PORT": str(free_port()),
        "ENGRAM_GATEWAY_WORKERS": "1",  # which is started twice
    }
    done = subprocess.run(
        [sys.executable, "-m", "gateway.serve"], env=environment, stderr=subprocess.PIPE, check=False, timeout=120
    )
    assert done.returncode == 1 and b"keep dying before any has served" in done.stderr


@pytest.mark.parametrize("delay_seconds", [0.1, 0.4, 0.8])
def test_a_sigterm_while_starting_ends_it_too(stack: Stack, tmp_path, delay_seconds: float) -> None:  # noqa: F811
    """FACTS: a SIGTERM shortly after the start hung a forking supervisor for good."""
    code = (
        "from gateway.serve import serve; from shared.settings import Settings;"
        f"serve(Settings(data_dir={str(tmp_path)!r}, control_plane_url={stack.control_plane_url!r},"
        f" jwks_url={stack.issuer.url!r}, jwt_issuer='x', gateway_port=0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        process.wait(delay_seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
    assert process.wait(15) in (0, -signal.SIGTERM)


def test_connections_over_which_nobody_speaks_shut_out_nobody(stack: Stack) -> None:  # noqa: F811
    """Clients keep connections for later and strangers open them for nothing: more of them than ever are at work at
    once, and than the queue of the socket holds."""
    data_dir = stack.settings.data_dir.parent / "idle"
    small = {"gateway_workers": 1, "gateway_backlog": 128, "header_timeout_seconds": 300}
    with (
        gateway(data_dir, stack.control_plane_url, stack.issuer, **small) as served,
        contextlib.ExitStack() as open_connections,
    ):
        where = urlsplit(served.url)
        for _ in range(200):
            open_connections.enter_context(socket.create_connection((where.hostname, where.port), timeout=20))
        assert httpx.get(f"{served.url}/health", trust_env=False, timeout=20).status_code == 200


def test_a_port_that_is_taken_is_refused_not_shared(stack: Stack, tmp_path) -> None:  # noqa: F811
    """SO_REUSEPORT would let a second gateway take half of the first one's requests."""
    port = urlsplit(stack.gateway.url).port
    code = (
        "import gateway.serve as s; from shared.settings import Settings; s.PORT_WAIT_SECONDS = 0;"
        f"s.serve(Settings(data_dir={str(tmp_path)!r}, control_plane_url='x', jwks_url='x', jwt_issuer='x',"
        f" gateway_port={port}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == 1 and b"cannot listen" in done.stderr
