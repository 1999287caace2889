"""A client that does not read its answer keeps neither the connection nor the answer."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import httpx
import psutil

from tests.gateway_stack import Gateway, Stack, eventually, gateway, stack  # noqa: F401


def test_who_does_not_read_is_cut_off_and_who_reads_slowly_is_not(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Nothing read for longer than the limit ends the connection; a little now and then, for longer, does not."""
    tenant = stack.tenant()
    (tmp_path / "tenants").symlink_to(stack.settings.tenants_dir)
    with gateway(tmp_path, stack.control_plane_url, stack.issuer, gateway_workers=1, answer_stall_seconds=2) as served:
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
        read, began = 0, time.monotonic()
        while of_silent in (still_open := _open_to(served)) or time.monotonic() - began < 4:
            assert read < whole, "it was open until the slow one had read all"
            read += len(slow.recv(32_768))
            time.sleep(0.25)
        assert of_slow in still_open
        while read < whole:
            piece = slow.recv(65_536)
            assert piece, read
            read += len(piece)
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
