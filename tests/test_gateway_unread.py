"""A client that does not read its answer keeps neither the connection nor the answer."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import psutil

from tests.gateway_stack import Gateway, Stack, eventually, gateway, stack  # noqa: F401

STALL_SECONDS = 3


class _SlowReader(threading.Thread):
    """Reads a little four times a second, whatever else its test is busy with; all that is left once in a `hurry`."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(daemon=True)
        self.connection = connection
        self.read = 0
        self.failed: Exception | None = None
        self.hurry = threading.Event()

    def run(self) -> None:
        try:
            while piece := self.connection.recv(32_768 if not self.hurry.is_set() else 262_144):
                self.read += len(piece)
                self.hurry.wait(0.25)
        except OSError as e:
            self.failed = e


def test_who_does_not_read_is_cut_off_and_who_reads_slowly_is_not(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Nothing read for longer than the limit ends the connection; a little now and then, for longer, does not."""
    tenant = stack.tenant()
    stack.lend_tenants(tmp_path)
    with gateway(
        tmp_path, stack.control_plane_url, stack.issuer, gateway_workers=1, answer_stall_seconds=STALL_SECONDS
    ) as served:
        headers = stack.headers(tenant)
        for _ in range(12):
            assert (
                served.client.post("/v1/memories", json={"content": "x" * 99_000}, headers=headers).status_code == 201
            )
        whole = len(served.client.get("/v1/memories", headers=headers).content)
        assert whole > 900_000
        silent, slow = (_ask(served, headers, room_bytes) for room_bytes in (16_384, 16_384))
        of_silent, of_slow = (connection.getsockname()[1] for connection in (silent, slow))
        eventually(lambda: {of_silent, of_slow} <= _open_to(served))
        reader = _SlowReader(slow)
        reader.start()
        began = time.monotonic()
        while of_silent in (still_open := _open_to(served)) or time.monotonic() - began < 2 * STALL_SECONDS:
            assert reader.read < whole, "it was open until the slow one had read all"
            time.sleep(0.1)
        assert of_slow in still_open
        reader.hurry.set()
        eventually(lambda: reader.failed or reader.read >= whole)
        assert reader.failed is None
        silent.close()
        slow.close()


def _ask(served: Gateway, headers: dict[str, str], room_bytes: int) -> socket.socket:
    """A GET of the list whose client has room for so much of the answer."""
    url = httpx.URL(served.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room_bytes)
    connection.settimeout(20)
    connection.connect((url.host, url.port or 80))
    lines = ["GET /v1/memories HTTP/1.1", f"Host: {url.host}", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


def _open_to(served: Gateway) -> set[int]:
    """The ports of the clients that the gateway has a connection to."""
    connections = [c for worker in served.workers() for c in worker.net_connections("tcp")]
    return {c.raddr.port for c in connections if c.raddr and c.status == psutil.CONN_ESTABLISHED}
