"""A proxy before a real PostgreSQL that can fall silent: connections stay open, and nothing comes back."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit, urlunsplit


def by_way_of(port: int, direct: str) -> str:
    """The same database's URL, through what listens on that port here."""
    parts = urlsplit(direct)
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}"))


class SilentProxy:
    """`url` is the server's own, through here. Once `silent` is set no byte is passed on and nobody is told."""

    def __init__(self, upstream: str) -> None:
        there = urlsplit(upstream)
        assert there.hostname and there.port
        self.silent = threading.Event()
        self._there = (there.hostname, there.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.url = by_way_of(self._listener.getsockname()[1], upstream)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                if self.silent.is_set():
                    continue
                server = socket.create_connection(self._there)
                self._sockets.append(server)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65_536)
                if self.silent.is_set():
                    return
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
