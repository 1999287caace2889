"""What stands before the Prefect API: a platform's balancer, or one that knows nothing of a path."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.http_fixtures import Handler, Server


@contextmanager
def balancer(ports: list[int]) -> Iterator[int]:
    """A port whose connections go to the first of `ports` where somebody listens, as a platform's proxy does it."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            for port in ports:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as upstream:
                    back = threading.Thread(target=_pump, args=(upstream, self.request), daemon=True)
                    back.start()
                    _pump(self.request, upstream)
                    back.join()
                    return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 128

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def refusing(api: str, path: str) -> Iterator[str]:
    """The API through a proxy that knows no `path`, as when what it names was deleted a moment ago."""

    class Proxy(Handler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(httpx.Response(404, json={"detail": "gone"}) if self.path.endswith(path) else self.ask(body))

        def do_GET(self) -> None:
            self.answer(self.ask(b""))

        def ask(self, body: bytes) -> httpx.Response:
            upstream = api.removesuffix("/api")
            headers = {"Authorization": self.headers.get("Authorization", ""), "Content-Type": "application/json"}
            return httpx.request(self.command, upstream + self.path, content=body, headers=headers, timeout=30)

        def answer(self, found: httpx.Response) -> None:
            self.reply(found.status_code, found.content, [("Content-Type", "application/json")])

    with Server(Proxy) as server:
        yield f"{server.url}/api"
