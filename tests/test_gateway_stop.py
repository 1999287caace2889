"""A stop in order, whatever a worker's threads wait for: what must not be missing is there, and nobody kills it."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest

from gateway.periodic import Periodic, stop_all
from shared import registry, spool
from shared.settings import Settings
from tests.gateway_stack import ISSUER, Gateway, Stack, eventually, gateway, stack  # noqa: F401
from tests.silent_proxy import SilentProxy
from tests.tls_fixtures import pair

CONNECTIONS = 20  # some to each worker
MEMORY = b'{"content": "slow"}'
REFUSED = "refused to gracefully stop"
LIFE = """
import asyncio, sys

import httpx

from gateway.app import create
from gateway.pool import TenantPool


async def refuse(_: TenantPool) -> None:
    raise OSError("a disk that is gone")


async def live() -> None:
    app, told, said = create(), asyncio.Queue(), asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan", "asgi": {}, "state": {}}, told.get, said.put))
    await told.put({"type": "lifespan.startup"})
    print((await said.get())["type"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        print((await client.get("/v1/memories", headers={"Authorization": sys.argv[1]})).status_code)
    TenantPool.close = refuse
    await told.put({"type": "lifespan.shutdown"})
    print((await said.get())["type"])
    await life


asyncio.run(live())
"""


class Heads(threading.Thread):
    """Connections whose heads never end; over those that drip comes another field three times a second."""

    def __init__(self, served: Gateway, *, drips: bool) -> None:
        super().__init__(daemon=True)
        self._served, self._drips = served, drips
        self._connections: list[socket.socket] = []
        self._ended = threading.Event()

    def __enter__(self) -> Heads:
        self._connections = [self._connect() for _ in range(CONNECTIONS)]
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        for connection in self._connections:
            connection.close()

    def _connect(self) -> socket.socket:
        url = httpx.URL(self._served.url)
        connection = socket.create_connection((url.host, url.port), timeout=20)
        if self._served.ca:
            context = ssl.create_default_context(cafile=self._served.ca)
            connection = context.wrap_socket(connection, server_hostname="localhost")
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" if self._drips else b"G")
        return connection

    def run(self) -> None:
        while self._drips and not self._ended.wait(0.3):
            for connection in self._connections:
                with suppress(OSError):  # the gateway has ended it
                    connection.sendall(b"X: y\r\n")


def _ask(
    served: Gateway, target: str, headers: dict[str, str], body: bytes = b"", sent: bytes | None = None
) -> socket.socket:
    """The request, with all or some of its body, from a client that has room for little of the answer."""
    url = httpx.URL(served.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    connection.settimeout(60)
    connection.connect((url.host, url.port or 80))
    lines = [f"{target} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in headers.items())]
    lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"] if body else []
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + (body if sent is None else sent))
    return connection


def _rest(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_a_control_plane_that_gives_no_answer_does_not_keep_a_worker(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Behind a network that swallows packets the threads that ask PostgreSQL wait for minutes; the spool is sealed
    by then. Restarting the gateway is what an operator does in such a case."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path / "data")
    often = {"quota_refresh_seconds": 1, "tenant_refresh_seconds": 0.1, "gateway_kill_timeout_seconds": 25}
    with (
        closing(SilentProxy(stack.control_plane_url)) as proxy,
        gateway(data_dir, proxy.url, stack.issuer, gateway_workers=1, **often) as served,
    ):
        headers = stack.headers(tenant)
        assert served.client.post("/v1/memories", headers=headers, json={"content": "x"}).status_code == 201
        proxy.silent.set()
        time.sleep(1.5)  # the quotas' turn has come, too
        assert served.client.post("/v1/memories", headers=headers, json={"content": "y"}).status_code == 201
        assert served.stop() == 0
        stopped = [line["event"] for line in served.log()]
    assert "worker_stopped" in stopped and not any(REFUSED in event for event in stopped), stopped
    assert sum(len(spool.read(p).events) for p in spool.sealed(data_dir / "spool")) == 2


@pytest.mark.parametrize(("kill_timeout_seconds", "limits_poll_seconds", "state"), [(60, 6, "done"), (4, 600, "begun")])
def test_an_action_whose_caller_has_left_ends_before_its_worker_does(
    stack: Stack,  # noqa: F811
    tmp_path: Path,
    kill_timeout_seconds: int,
    limits_poll_seconds: float,
    state: str,
) -> None:
    """Within half of the time a worker has; one that is cut off then is not said to be done. This one waits until its
    worker has looked at the limits, but for no more than ten seconds longer than that should take."""
    tenant_id = f"left-after-{kill_timeout_seconds}"
    own = Settings(data_dir=tmp_path, control_plane_url=stack.control_plane_url)  # type: ignore[arg-type]
    registry.create(stack.control_plane, own, tenant_id)

    def states() -> list[str]:
        rows = stack.control_plane.rows("action_history", tenant_id=tenant_id, action=None, limit=5)
        return [row["state"] for row in rows]

    slowly = {"limits_poll_seconds": limits_poll_seconds, "gateway_kill_timeout_seconds": kill_timeout_seconds}
    with gateway(tmp_path, stack.control_plane_url, stack.issuer, gateway_workers=1, **slowly) as served:
        action = json.dumps({"reason": "to leave it", "tenant_id": tenant_id}).encode()
        operator = stack.headers("operators", scope="admin")
        with closing(_ask(served, "POST /v1/admin/actions/restart-tenant", operator, action)):
            eventually(states)
        assert served.stop() == 0
        stopped = [line["event"] for line in served.log()]
    assert "worker_stopped" in stopped and not any(REFUSED in event for event in stopped), stopped
    assert ("actions_cut_off" in stopped) == (state == "begun")
    assert states() == [state]


def test_the_spool_is_sealed_whatever_else_cannot_be_closed(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """What a worker could not seal waits in its file for another to adopt it; nobody is billed for it until then."""
    tenant = stack.tenant()
    stack.lend_tenants(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PROMETHEUS_"))}
    environment |= {
        "ENGRAM_DATA_DIR": str(tmp_path),
        "ENGRAM_CONTROL_PLANE_URL": stack.control_plane_url,
        "ENGRAM_JWKS_URL": stack.issuer.url,
        "ENGRAM_JWT_ISSUER": ISSUER,
        "ENGRAM_USAGE_FLUSH_SECONDS": "600",
    }
    lived = subprocess.run(
        [sys.executable, "-c", LIFE, stack.headers(tenant)["Authorization"]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert lived.stdout.split() == ["lifespan.startup.complete", "200", "lifespan.shutdown.failed"], lived
    assert not list((tmp_path / "spool").glob("*.open"))
    assert [len(spool.read(path).events) for path in spool.sealed(tmp_path / "spool")] == [1]


@pytest.mark.parametrize(
    ("secure", "drips"), [(False, False), (False, True), (True, True)], ids=["silent", "dripping", "dripping-tls"]
)
def test_heads_that_never_end_keep_no_worker(
    stack: Stack,  # noqa: F811
    tmp_path: Path,
    secure: bool,
    drips: bool,
) -> None:
    """A head may take longer than a worker is given to stop; anybody can open as many as there are workers, and each
    one that is killed leaves usage unsealed."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path / "data")
    files = pair(tmp_path) if secure else None
    tls = files.settings() if files else {}
    with gateway(
        data_dir, stack.control_plane_url, stack.issuer, ca=files.ca if files else None, usage_flush_seconds=600, **tls
    ) as served:
        headers = stack.headers(tenant)
        assert served.client.post("/v1/memories", headers=headers, json={"content": "x"}).status_code == 201
        with Heads(served, drips=drips):
            assert served.stop() == 0
        stopped = [line["event"] for line in served.log()]
    assert stopped.count("worker_stopped") == 2 and not any(REFUSED in event for event in stopped), stopped
    assert not list((data_dir / "spool").glob("*.open"))
    assert sum(len(spool.read(p).events) for p in spool.sealed(data_dir / "spool")) == 1


def test_a_worker_that_has_to_be_killed_makes_the_stop_fail(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Else a stop that left usage unsealed looks like any other; the worker beside it stops in order."""
    slow = {"worker_silence_seconds": 0, "gateway_kill_timeout_seconds": 6}  # 0: it is not replaced before
    with gateway(stack.lend_tenants(tmp_path), stack.control_plane_url, stack.issuer, **slow) as served:
        frozen = served.workers()[0]
        frozen.suspend()
        assert served.stop() == 1
        stopped = served.log()
    assert [line["event"] for line in stopped].count("worker_stopped") == 1
    [killed] = [line for line in stopped if REFUSED in line["event"]]
    assert killed["level"] == "error" and str(frozen.pid) in killed["event"] and "sealed" in killed["event"], killed


def test_requests_under_way_are_answered_though_their_clients_are_silent_or_slow(
    stack: Stack,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Who waits for a slow answer, pauses in a body or in reading is no half head: a stop waits for them as long as it
    has time."""
    tenant, data_dir = stack.tenant(), stack.lend_tenants(tmp_path)
    slowly = {"gateway_workers": 1, "gateway_kill_timeout_seconds": 60, "limits_poll_seconds": 6}
    with gateway(data_dir, stack.control_plane_url, stack.issuer, **slowly) as served:
        headers = stack.headers(tenant)
        for _ in range(12):
            made = served.client.post("/v1/memories", headers=headers, json={"content": "x" * 90_000})
            assert made.status_code == 201
        action = json.dumps({"reason": "to wait for it", "tenant_id": tenant}).encode()
        operator = stack.headers("operators", scope="admin")
        with (
            closing(_ask(served, "POST /v1/admin/actions/restart-tenant", operator, action)) as waits,
            closing(_ask(served, "POST /v1/memories", headers, MEMORY, MEMORY[:5])) as writes,
            closing(_ask(served, "GET /v1/memories", headers)) as reads,
        ):
            eventually(lambda: served.metric("engram_requests_total", route="/v1/memories", method="GET") == 1)
            served.process.terminate()
            eventually(lambda: not served.workers())  # it listens no more
            time.sleep(2.5)  # longer than a stop has patience with who is silent for nothing
            writes.sendall(MEMORY[5:])
            answers = [_rest(connection) for connection in (waits, writes, reads)]
            assert served.process.wait(60) == 0
    assert [answer.partition(b"\r\n")[0] for answer in answers] == [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 201 Created",
        b"HTTP/1.1 200 OK",
    ]
    assert len(json.loads(answers[2].partition(b"\r\n\r\n")[2])["memories"]) == 11


def test_work_that_hangs_is_waited_for_together() -> None:
    """Jobs that ask the same silent server would otherwise take so many times as long, while a kill draws near."""
    count = 30
    begun, never = threading.Barrier(count + 1), threading.Event()

    def hang() -> None:
        begun.wait(30)
        never.wait(30)

    work = [Periodic(f"hangs-{n}", 0.01, hang).start() for n in range(count)]
    begun.wait(30)
    began = time.monotonic()
    stop_all(work, 0.5)
    took = time.monotonic() - began
    never.set()
    assert 0.4 < took < count * 0.5


def test_work_does_not_begin_another_turn_once_it_was_stopped() -> None:
    """What it would write to is closed after that; a turn under way ends first."""
    turns: list[str] = []
    began = threading.Event()

    def job() -> None:
        turns.append("began")
        began.set()
        time.sleep(0.2)
        turns.append("ended")

    each = Periodic("turns", 0.01, job).start()
    assert began.wait(30)
    stop_all([each], 30)
    assert turns[-1] == "ended"
    stopped = len(turns)
    time.sleep(0.1)
    assert len(turns) == stopped
