"""A run cancelled in the UI or killed at any step, through a real worker: old or new, unlocked, nobody's lease."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.running import status
from tests.acceptance.conftest import Stack
from tests.acceptance.slow_restore import ROOT, Beside, point_file
from tests.core_fixtures import contents_of, sampled, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
OLD, NEW = ["old", "newer"], ["old"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@pytest.fixture(scope="module")
def beside(stack: Stack) -> Iterator[Beside]:
    """What comes before and after a slow run does not need a worker."""
    with contextlib.closing(Beside(stack)) as made:
        yield made


@pytest.fixture(scope="module")
def deployment(stack: Stack) -> Iterator[str]:
    """The id of a deployment whose runs wait at a point, made as `prefect.yaml` makes the real ones."""
    real = stack.prefect("GET", "deployments/name/restore/restore")
    flow = stack.prefect("POST", "flows/", {"name": "slow-restore"})
    made = stack.prefect(
        "POST",
        "deployments/",
        {
            "name": "slow",
            "flow_id": flow["id"],
            "entrypoint": "tests.acceptance.slow_restore.slow_restore",
            "work_pool_name": real["work_pool_name"],
            "pull_steps": real["pull_steps"],
            "job_variables": real["job_variables"] | {"env": {"PYTHONPATH": str(ROOT)}},
            "enforce_parameter_schema": False,
        },
    )
    yield made["id"]
    stack.prefect("DELETE", f"deployments/{made['id']}")


class Run:
    """A run of the slow deployment, of a tenant with a backup of `NEW` and `OLD` live."""

    def __init__(self, stack: Stack, beside: Beside, deployment: str, tenant_id: str, point: str) -> None:
        self.stack, self.beside, self.tenant_id = stack, beside, tenant_id
        self.client = stack.tenant(tenant_id)
        self.write("old")
        self.backup = beside.run("backup", tenant_id)["result"][0]["backup_id"]
        self.write("newer")
        self.old, self.new = OLD, NEW
        parameters: dict[str, Any] = {"tenant_id": tenant_id, "point": point, "backup_id": self.backup}
        if point.startswith("undo: "):
            self.restore()
            self.old, self.new = NEW, OLD
            parameters |= {"point": point.removeprefix("undo: "), "backup_id": None}
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        self.id = stack.prefect("POST", f"deployments/{deployment}/create_flow_run", body)["id"]
        file = point_file(stack.data_dir, tenant_id)
        wait_until(lambda: file.exists() or self.state()["state_type"] in ENDED, 120)
        assert file.exists(), self.state()
        self.pid: int = json.loads(file.read_text())["pid"]

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.stack.prefect("GET", f"flow_runs/{self.id}")
        return found

    def restore(self) -> None:
        answer = self.beside.run("restore", self.tenant_id, backup_id=self.backup, with_safety_backup=False)
        assert answer["state"] == "COMPLETED", answer["message"]

    def write(self, content: str) -> httpx.Response:
        return self.client.post("/v1/memories", json={"content": content})

    def cancel(self) -> None:
        """What the button in the UI sends."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        answer = self.stack.prefect("POST", f"flow_runs/{self.id}/set_state", {"state": state})
        assert answer["status"] == "ACCEPT", answer

    def root(self) -> Path:
        return self.stack.data_dir / "tenants" / self.tenant_id

    def held(self) -> list[str]:
        """What of a restore is still held, by name."""
        holders = self.stack.rows("SELECT holder FROM maintenance_locks WHERE tenant_id = %s", self.tenant_id)
        left = [f"lease of {holder}" for (holder,) in holders if holder]
        left += ["mark"] if (self.root() / "maintenance").exists() else []
        left += ["mutex"] if (self.root() / "restore.lock").stat().st_size else []
        rows = self.stack.rows("SELECT state FROM restores WHERE flow_run_id = %s", self.id)
        return left + [state for (state,) in rows if state == "running"]

    def row_state(self) -> str:
        [(state,)] = self.stack.rows("SELECT state FROM restores WHERE flow_run_id = %s", self.id)
        return str(state)

    def check_over(self) -> list[str]:
        """Nothing is held, the database is whole and takes writes, another restore works; what it held."""
        wait_until(lambda: not self.held(), 90)
        rows = contents_of(self.root() / "engram.db")
        assert rows in (self.old, self.new), rows
        assert (self.row_state() == "restored") == (rows == self.new)
        assert self.write("after").status_code == 201
        assert contents_of(self.root() / "engram.db") == [*rows, "after"]
        self.restore()
        assert not list(self.root().glob("restore.sqlite*"))
        assert contents_of(self.root() / "engram.db") == NEW
        return rows


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# Cancelled before the rename the old one stays; after it the new one, which verifies, is finished.
CANCELLED = {
    "download": "old",
    "safety-backup": "old",
    "lock": "old",
    "before the rename": "old",
    "after the rename": "new",
    "verify": "new",
    "release": "new",
    "undo: copy": "old",
    "undo: before the rename": "old",
    "undo: after the rename": "new",
}


@pytest.mark.parametrize("point", sampled(CANCELLED, "download", "after the rename", "undo: before the rename"))
def test_a_run_cancelled_in_the_ui_ends_in_old_or_new(
    stack: Stack, beside: Beside, deployment: str, point: str
) -> None:
    """At every step: the run says Cancelled, nothing is held, what is served is whole, and restores go on."""
    run = Run(stack, beside, deployment, f"cancel-{list(CANCELLED).index(point)}", point)
    run.cancel()
    wait_until(lambda: run.state()["state_type"] in ENDED, 60)
    assert run.state()["state_type"] == "CANCELLED", run.state()["state"]
    assert run.held() == []
    assert run.check_over() == (run.old if CANCELLED[point] == "old" else run.new)


@pytest.mark.parametrize("point", sampled(["download", "before the rename", "after the rename"], "after the rename"))
def test_a_killed_run_is_repaired_by_the_resident_sweep(
    stack: Stack, beside: Beside, deployment: str, point: str
) -> None:
    """No `finally` runs after SIGKILL: the drain beside the gateway finishes or undoes, and nobody is asked."""
    run = Run(stack, beside, deployment, f"kill-{point.split()[0]}", point)
    kill(run.pid)
    wait_until(lambda: run.state()["state_type"] in ENDED, 60)
    assert run.state()["state_type"] == "CRASHED", run.state()["state"]
    assert run.check_over() == (run.new if point == "after the rename" else run.old)


def test_a_run_killed_together_with_its_worker_is_repaired_and_marked(
    stack: Stack, beside: Beside, deployment: str
) -> None:
    """Nobody is left to tell Prefect: the sweep says Crashed instead of Running for ever, and cancels what waits."""
    run = Run(stack, beside, deployment, "kill-worker", "after the rename")
    worker = _worker(stack)
    kill(worker)
    kill(run.pid)
    wait_until(lambda: not psutil.pid_exists(run.pid) or psutil.Process(run.pid).status() == "zombie")
    wait_until(lambda: _worker(stack) not in (0, worker), 60)
    assert "run of a dead process" in {found["found"] for found in stack.json("sweep")["swept"]} or (
        run.state()["state_type"] == "CRASHED"  # the minute's own sweep was first
    )
    assert run.state()["state_type"] == "CRASHED"
    assert run.check_over() == run.new


def test_a_run_that_was_being_cancelled_when_its_worker_died_is_marked(
    stack: Stack, beside: Beside, deployment: str
) -> None:
    """Cancelling needs a worker: a run whose process went with it would say Cancelling for ever."""
    run = Run(stack, beside, deployment, "cancel-worker", "lock")
    worker = _worker(stack)
    kill(worker)
    run.cancel()
    kill(run.pid)
    wait_until(lambda: not psutil.pid_exists(run.pid) or psutil.Process(run.pid).status() == "zombie")
    stack.json("sweep")
    wait_until(lambda: run.state()["state_type"] in ENDED, 60)
    assert run.state()["state_type"] in ("CANCELLED", "CRASHED")
    wait_until(lambda: _worker(stack) not in (0, worker), 60)
    assert run.check_over() == run.old


def _worker(stack: Stack) -> int:
    """The pid of the running worker, 0 while there is none."""
    found = [p for p in status(stack.settings)["processes"] if p["name"] == "worker" and p["state"] == "running"]
    time.sleep(0.1)
    return int(found[0]["pid"]) if found else 0
