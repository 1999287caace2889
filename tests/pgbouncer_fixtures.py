"""A real PgBouncer in transaction mode before the session's PostgreSQL, as Neon's pooler is; and a wire that loses the
answer to COMMIT.

A test module takes it in with `pytest_plugins = ("tests.core_fixtures", "tests.pgbouncer_fixtures")`.
(PYTEST_DONT_REWRITE: it is imported before pytest could rewrite its assertions.)
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.rows import dict_row

from deployments.postgres import USER, EmbeddedPostgres
from tests.core_fixtures import wait_until
from tests.ports import free_ports
from tests.silent_proxy import by_way_of

# 2: a detach CONCURRENTLY holds one server connection while the transaction that ordered it holds another.
POOL_SIZE = 2


class PgBouncer:
    """`url(direct)` is the same database through the pooler; `connections(direct)` how many it has to the server."""

    def __init__(self, server: EmbeddedPostgres, directory: Path) -> None:
        self._server = server
        self._directory = directory
        [self.port] = free_ports(1)

    @contextmanager
    def running(self) -> Iterator[PgBouncer]:
        program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            pytest.fail("pgbouncer is not installed (Debian: apt-get install pgbouncer); .ci/run does it")
        (self._directory / "users.txt").write_text(f'"{USER}" "{self._server.password()}"\n')
        (self._directory / "pgbouncer.ini").write_text(
            f"""[databases]
* = host=127.0.0.1 port={self._server.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {self._directory}/users.txt
admin_users = {USER}
pool_mode = transaction
default_pool_size = {POOL_SIZE}
max_client_conn = 100
query_wait_timeout = 30
"""
        )
        command = [program, str(self._directory / "pgbouncer.ini")]
        if os.geteuid() == 0:  # it refuses to run as root, and must reach a directory only root can
            command = [shutil.which("setpriv") or "setpriv", *_AS_NOBODY, "--", *command]
        with (self._directory / "pgbouncer.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or self._answers())
            assert process.poll() is None, (self._directory / "pgbouncer.log").read_text()
            yield self
        finally:
            process.send_signal(signal.SIGTERM)  # at once; SIGINT would wait for clients
            process.wait(10)

    def url(self, direct: str) -> str:
        return by_way_of(self.port, direct)

    def connections(self, direct: str) -> int:
        name = urlsplit(direct).path.strip("/")
        return sum(row["database"] == name for row in self._show("SERVERS"))

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            return bool(self._show("VERSION"))
        return False

    def _show(self, what: str) -> list[dict[str, object]]:
        url = f"postgresql://{USER}:{self._server.password()}@127.0.0.1:{self.port}/pgbouncer"
        with (
            psycopg.connect(url, autocommit=True, connect_timeout=2, row_factory=dict_row) as connection,
            psycopg.ClientCursor(connection, row_factory=dict_row) as cursor,  # its console knows the simple protocol
        ):
            return cursor.execute(f"SHOW {what}").fetchall()  # type: ignore[arg-type]


_AS_NOBODY = (
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
    "--pdeathsig=TERM",
)


@pytest.fixture(scope="session")
def pgbouncer(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PgBouncer]:
    with PgBouncer(postgres, tmp_path_factory.mktemp("pgbouncer")).running() as pooler:
        yield pooler


class CommitCutter:
    """A TCP proxy before PostgreSQL. While `cuts` is above 0, the answer to a client's COMMIT is thrown away and the
    connection with it, once the server has given it: the client cannot know what it said."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        self.cut = 0

    @contextmanager
    def running(self) -> Iterator[CommitCutter]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._listener.close()

    def url(self, direct: str) -> str:
        return by_way_of(self.port, direct)

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the end
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # PostgreSQL is down, as it is without a proxy
                    client.close()
                    continue
                wire = _Wire(self, client, server)
                for work in (wire.forth, wire.back):
                    threading.Thread(target=work, daemon=True).start()


class _Wire:
    """One connection. Messages are small here, and psycopg sends COMMIT in one of its own."""

    def __init__(self, cutter: CommitCutter, client: socket.socket, server: socket.socket) -> None:
        self._cutter, self._client, self._server = cutter, client, server
        self._losing = False

    def forth(self) -> None:
        with suppress(OSError):
            while data := self._client.recv(65_536):
                if self._cutter.cuts > 0 and b"COMMIT\0" in data:
                    self._cutter.cuts -= 1
                    self._losing = True
                self._server.sendall(data)
        self._close()

    def back(self) -> None:
        with suppress(OSError):
            while data := self._server.recv(65_536):
                if self._losing:
                    self._cutter.cut += b"COMMIT\0" in data  # the server's CommandComplete: it is committed
                    break
                self._client.sendall(data)
        self._close()

    def _close(self) -> None:
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
