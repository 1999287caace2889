"""The embedded PostgreSQL: what a caller gets, and what a crash leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest

from deployments.postgres import EmbeddedPostgres, stop_leftover
from deployments.process import StartFailed
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.ports import free_port

# A parent that starts a server, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from deployments.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), int(sys.argv[2])).__enter__()
print(server.child.pid, flush=True)
time.sleep(600)
"""


def running_in(pgdata: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] == "postgres" and process.cwd() == str(pgdata):
                found.append(process)
        except psutil.Error:
            continue
    return found


def killed_parent(data_dir: Path, port: int) -> int:
    """Start a server below another process and SIGKILL that one; the postmaster's pid."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(data_dir), str(port)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    postmaster = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    holder.stdout.close()
    return postmaster


def test_it_has_both_databases_and_what_prefect_needs_in_its_own(postgres: EmbeddedPostgres) -> None:
    """Prefect's migrations fail without pg_trgm."""
    with psycopg.connect(postgres.url("prefect")) as connection:
        assert connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'pg_trgm'").fetchone()
    with psycopg.connect(postgres.url("engram")) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_it_wants_its_password_and_listens_on_the_loopback_alone(postgres: EmbeddedPostgres) -> None:
    """Other people of the machine must not reach the control plane."""
    wrong = postgres.url().replace(postgres.password(), "guess")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)
    assert os.stat(postgres.data_dir / "postgres.password").st_mode & 0o777 == 0o600
    assert os.stat(postgres.pgdata).st_mode & 0o777 == 0o700
    listening = psutil.net_connections("inet")
    assert {c.laddr.ip for c in listening if c.laddr.port == postgres.port and c.status == "LISTEN"} == {"127.0.0.1"}


def test_what_a_committed_transaction_wrote_survives_a_restart(tmp_path: Path) -> None:
    """Stopping is the fast shutdown; starting again runs neither initdb nor a new password."""
    port = free_port()
    with EmbeddedPostgres(tmp_path, port) as first, psycopg.connect(first.url()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    assert not running_in(tmp_path / "postgres")
    with EmbeddedPostgres(tmp_path, port) as second, psycopg.connect(second.url()) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_it_works_below_a_directory_only_its_owner_may_enter(tmp_path: Path) -> None:
    """Root's home and pytest's temporary directories are 0700, and root's server runs as nobody."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedPostgres(closed / "data", free_port()) as server:
        assert server.accepts_connections()
    assert os.stat(closed).st_mode & 0o777 == 0o700


def test_a_server_whose_parent_was_killed_stops_by_itself(tmp_path: Path) -> None:
    """The parent-death signal survives the change of user."""
    postmaster = killed_parent(tmp_path, free_port())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(postmaster).wait(timeout=30)
    assert not psutil.pid_exists(postmaster)
    assert not (tmp_path / "postgres" / "postmaster.pid").exists()


def test_a_server_nobody_supervises_is_stopped_before_the_next_start(
    tmp_path: Path,
) -> None:
    """Two servers on one data directory would destroy it; a refused start would block the next `up`."""
    first = EmbeddedPostgres(tmp_path, free_port()).__enter__()
    for process in running_in(first.pgdata):
        process.suspend()  # it cannot answer a polite signal, and its children notice nothing
    assert stop_leftover(first.pgdata, timeout_seconds=0.2)
    assert not running_in(first.pgdata)
    with EmbeddedPostgres(tmp_path, first.port) as second:
        assert second.accepts_connections()


def test_a_pid_file_that_names_a_stranger_does_not_block_the_start(tmp_path: Path) -> None:
    """After a reboot, or in a new container, the pid belongs to somebody else."""
    port = free_port()
    with EmbeddedPostgres(tmp_path, port) as server:
        pass
    (server.pgdata / "postmaster.pid").write_text(f"{os.getpid()}\n{server.pgdata}\n0\n{port}\n")
    with EmbeddedPostgres(tmp_path, port) as again:
        assert again.accepts_connections()


def test_an_initdb_cut_short_is_done_again(tmp_path: Path) -> None:
    """Half a cluster must never be taken for a whole one."""
    unfinished = tmp_path / "postgres.new"
    unfinished.mkdir()
    (unfinished / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(tmp_path, free_port()) as server:
        assert server.accepts_connections()
    assert not unfinished.exists()


def test_a_lost_password_is_named_instead_of_a_new_one_made(tmp_path: Path) -> None:
    """A new password would not open the old cluster, and the error would be a puzzle."""
    (tmp_path / "postgres").mkdir()
    with pytest.raises(StartFailed, match=r"postgres\.password"):
        EmbeddedPostgres(tmp_path, free_port()).prepare()


def test_a_busy_port_fails_with_the_servers_own_words(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    with (
        pytest.raises(StartFailed, match="could not create any TCP/IP sockets"),
        EmbeddedPostgres(tmp_path, postgres.port),
    ):
        pass
    assert not running_in(tmp_path / "postgres")


def test_every_database_of_a_test_is_migrated(control_plane_url: str) -> None:
    """The template is a real migration, not a copy of the schema."""
    with ControlPlane(Settings.model_validate({"control_plane_url": control_plane_url})) as control_plane:
        assert control_plane.migrate() == []
        control_plane.ping()


def test_the_postmaster_gets_sigint_which_is_the_fast_shutdown(tmp_path: Path) -> None:
    """SIGTERM would wait for every client to leave."""
    server = EmbeddedPostgres(tmp_path, free_port()).__enter__()
    with psycopg.connect(server.url()):
        os.kill(server.child.pid, signal.SIGINT)
        server.child.stop(30)
    assert "shutdown" in server.log_path.read_text()
    assert "was not properly shut down" not in server.log_path.read_text()
