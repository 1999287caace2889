"""`engram up`, `down`, `status` for real: what they promise about starting, stopping and dying."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.leftovers import marked
from deployments.ports import PortBusy, PortReservations
from deployments.process import Child, StartFailed
from deployments.running import StackState, UpLock, status
from shared.settings import Settings

ENGRAM = (sys.executable, "-m", "deployments.cli")
PARTS = ["up", "postgres", "issuer", "prefect", "worker", "drain", "gateway"]


# Writes its pid once SIGTERM no longer ends it.
STUBBORN = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "open(sys.argv[1] + '.new', 'w').write(str(os.getpid())); os.rename(sys.argv[1] + '.new', sys.argv[1]);"
    "time.sleep(600)"
)


class Engram:
    """The command line with a data directory of its own and any free ports."""

    def __init__(self, data_dir: Path, **more: str) -> None:
        self.data_dir = data_dir
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
        ports = {f"ENGRAM_{part}_PORT": "0" for part in ("GATEWAY", "PREFECT", "ISSUER", "POSTGRES")}
        ports["ENGRAM_GATEWAY_WORKERS"] = "1"
        self.env = kept | ports | {"ENGRAM_DATA_DIR": str(data_dir)} | more

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*ENGRAM, *words], env=self.env | env, capture_output=True, text=True, timeout=280, check=False
        )

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*ENGRAM, *words], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def status(self) -> dict[str, Any]:
        """What `engram status` prints, without a process for each look: it is asked again and again."""
        return status(Settings(data_dir=self.data_dir))

    def remains(self) -> list[str]:
        return remains(self.data_dir)


def remains(data_dir: Path) -> list[str]:
    """Everything of a data directory's stack that still runs."""
    found = {" ".join(p.cmdline()) for p in marked(data_dir)}
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "postgres" and process.cwd() == str(data_dir / "postgres"):
                found.add(" ".join(process.cmdline()))
    return sorted(found)


@pytest.fixture
def engram(tmp_path: Path) -> Iterator[Engram]:
    yield from down_afterwards(Engram(tmp_path / "data"))


@pytest.fixture(scope="module")
def old_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack") / "data"


@pytest.fixture
def again(old_data_dir: Path) -> Iterator[Engram]:
    """In one directory, where starts were broken off before: it must start all the same, and sooner than a new one."""
    yield from down_afterwards(Engram(old_data_dir))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engram]:
    """A stack that stays up in its own directory, after an `up` there was killed: it must not block the next."""
    with contextlib.contextmanager(down_afterwards)(Engram(tmp_path_factory.mktemp("whole") / "data")) as found:
        killed_with_prefect(found)
        up = found.run("up", "--detach")
        assert up.returncode == 0, up.stderr
        yield found


@pytest.fixture
def beside(whole: Engram, tmp_path: Path) -> Iterator[Engram]:
    """Another machine, with the Prefect server of the whole stack: to start is what takes that longest."""
    more = {"PREFECT_API_URL": whole.status()["prefect_api_url"], "ENGRAM_MACHINE_ID": "beside"}
    yield from down_afterwards(Engram(tmp_path / "data", **more))


def killed_with_prefect(engram: Engram) -> None:
    """`up` while it waits for Prefect, and SIGKILL."""
    up = engram.start("up")
    wait_until(lambda: any(p["name"] == "prefect" for p in engram.status()["processes"]))
    up.kill()
    up.wait()


def down_afterwards(found: Engram) -> Iterator[Engram]:
    yield found
    if found.remains():
        found.run("down")
    assert found.remains() == []


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def listening(url: str) -> bool:
    host, _, port = url.partition("://")[2].partition("/")[0].rpartition("@")[2].partition(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) == 0


@pytest.mark.slow
def test_down_cleans_up_after_a_killed_up(again: Engram) -> None:
    """The supervisor is gone, so `down` has nobody to ask."""
    killed_with_prefect(again)
    assert again.run("down").returncode == 0
    assert again.remains() == []


@pytest.mark.slow
@pytest.mark.parametrize(("fixture", "part"), [("again", "postgres"), ("again", "prefect"), ("beside", "worker")])
def test_sigterm_during_the_start_leaves_nothing(request: pytest.FixtureRequest, fixture: str, part: str) -> None:
    """A half-started stack is the worst of both."""
    engram: Engram = request.getfixturevalue(fixture)
    up = engram.start("up")
    wait_until(lambda: any(p["name"] == part for p in engram.status()["processes"]))
    up.terminate()
    assert up.wait(120) == 1
    assert engram.remains() == []
    assert engram.status()["state"] == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_part_that_dies_is_started_again_a_killed_up_does_not_block_the_next_and_ctrl_c_is_no_failure(
    beside: Engram,
) -> None:
    """SIGKILL gives nobody a chance to clean up; the next `up` must, and ends itself when it is told to."""
    assert beside.run("up", "--detach").returncode == 0
    before = {p["name"]: p["pid"] for p in beside.status()["processes"]}

    os.kill(before["gateway"], signal.SIGKILL)
    os.kill(before["issuer"], signal.SIGKILL)

    def all_back() -> bool:
        now = {p["name"]: p for p in beside.status()["processes"]}
        changed = all(now[name]["pid"] != before[name] for name in ("gateway", "issuer"))
        return changed and {p["state"] for p in now.values()} == {"running"}

    wait_until(all_back)
    found = beside.status()
    assert httpx.get(f"{found['gateway_url']}/ready").status_code == 200

    os.kill(before["up"], signal.SIGKILL)
    wait_until(lambda: beside.status()["state"] == "stopped")
    up = beside.start("up")
    wait_until(lambda: beside.status()["state"] == "running", 280)
    after = beside.status()
    assert not {p["pid"] for p in found["processes"]} & {p["pid"] for p in after["processes"]}
    alive = [p["pid"] for p in found["processes"] if psutil.pid_exists(p["pid"])]
    assert alive == []

    up.send_signal(signal.SIGINT)
    assert up.wait(120) == 0
    assert beside.remains() == []


@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_a_port_that_was_asked_for_and_is_busy_is_one_line_and_starts_nothing(
    engram: Engram, detach: tuple[str, ...]
) -> None:
    """The person chose that port: another one would be a surprise."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        up = engram.run("up", *detach, ENGRAM_PREFECT_PORT=port)
    assert up.returncode == 1
    assert up.stderr.splitlines() == [f"engram: port {port} is in use: free it or set another ENGRAM_PREFECT_PORT"]
    assert engram.remains() == []
    assert not (engram.data_dir / "postgres").exists()


def test_a_default_port_that_is_busy_gives_way_to_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for the default, so it may move."""
    monkeypatch.delenv("ENGRAM_GATEWAY_PORT", raising=False)
    with socket.socket() as taken, contextlib.closing(Reserved()) as reserved:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        settings = Settings().model_copy()
        settings.__dict__["gateway_port"] = busy
        assert reserved.reserve(settings, "gateway_port", "127.0.0.1") != busy


def test_two_stacks_never_choose_the_same_port_even_after_it_was_handed_to_a_part() -> None:
    """A part takes seconds from its start until it listens."""
    with contextlib.closing(Reserved()) as first, contextlib.closing(Reserved()) as second:
        port = first.reserve(Settings(gateway_port=0), "gateway_port", "127.0.0.1")
        wanted = Settings(gateway_port=port)
        with pytest.raises(PortBusy, match=f"port {port} is in use"):
            second.reserve(wanted, "gateway_port", "127.0.0.1")
        first.release("gateway_port")
        with pytest.raises(PortBusy):
            second.reserve(wanted, "gateway_port", "127.0.0.1")
        first.release_all()
        assert second.reserve(wanted, "gateway_port", "127.0.0.1") == port


def test_looking_at_the_lock_neither_takes_it_nor_blocks_it(tmp_path: Path) -> None:
    """`status` runs at any time, also while an `up` starts."""
    held, other = UpLock(tmp_path), UpLock(tmp_path)
    assert other.holder() == 0
    assert held.acquire()
    assert other.holder() == os.getpid()
    assert not other.acquire()
    held.release()
    assert other.holder() == 0
    assert other.acquire()
    other.release()


def test_a_state_file_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    """It may come from another version, or from a disk that was full."""
    (tmp_path / "run").mkdir()
    assert StackState.read(tmp_path) is None
    (tmp_path / "run" / "stack.json").write_text('{"pid": 1')
    assert StackState.read(tmp_path) is None
    (tmp_path / "run" / "stack.json").write_text('{"unknown": true, "processes": []}')
    assert StackState.read(tmp_path) is None


def child(tmp_path: Path, program: str, ready: Callable[[], bool] = lambda: True) -> Child:
    return Child("part", ["/bin/sh", "-c", program], env=dict(os.environ), log_path=tmp_path / "part.log", ready=ready)


def test_stopping_ends_descendants_that_ignore_sigterm_and_left_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part's own children must not outlive it, whatever they did to be missed."""
    monkeypatch.setattr("deployments.process._SURVIVORS_SECONDS", 1.0)
    stubborn = f'{sys.executable} -c "{STUBBORN}" {tmp_path}/pid'
    part = child(tmp_path, f"setsid {stubborn} & wait", lambda: (tmp_path / "pid").exists())
    part.start()
    part.wait_ready(60)
    grandchild = psutil.Process(int((tmp_path / "pid").read_text()))
    part.stop(5)
    assert not part.alive()
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_a_part_that_will_not_go_is_killed_after_its_time_out(tmp_path: Path) -> None:
    """Granian's master hung on a SIGTERM in its first second (FACTS)."""
    part = child(
        tmp_path, "trap '' TERM; touch ready; while :; do sleep 0.1; done".replace("ready", f"{tmp_path}/ready")
    )
    part.start()
    wait_until((tmp_path / "ready").exists)
    assert part.stop(0.2) is False
    assert not part.alive()


def test_a_part_that_stopped_with_a_code_of_its_own_is_said_to_have(tmp_path: Path) -> None:
    """A gateway that had to kill a worker exits 1: whoever stops the stack must read it there."""
    for code, said in ((0, "stopped"), (1, f"stopped with exit code 1; log {tmp_path}/part.log")):
        ready = tmp_path / f"ready{code}"
        part = child(tmp_path, f"trap 'exit {code}' TERM; touch {ready}; while :; do sleep 0.1; done")
        part.start()
        wait_until(ready.exists)
        assert part.stop(60)
        assert part.ending() == said


def test_a_part_that_dies_while_starting_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The one line of an operator at 3 a.m."""
    part = child(tmp_path, "echo no such database >&2; exit 7", lambda: False)
    part.start()
    with pytest.raises(StartFailed, match=r"part: stopped while starting \(exit code 7\).*no such database"):
        part.wait_ready(60)


class Reserved(PortReservations):
    def close(self) -> None:
        self.release_all()
