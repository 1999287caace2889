"""Flows that wait at a named point, so that a test can cancel, kill or overlap them there.

`slow_restore` is the body of `restore` (or `restore-undo`) as a deployment of the test. `python -m` this module is
a process that runs flows one after another: a `Job` as a JSON line in, what came of it as a JSON line out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect import flow

from deployments.parts import child_environment
from flows.backup import backup
from flows.core import configuration
from flows.restore import restore
from flows.sweep import sweep
from flows.undo import restore_undo
from shared import generation, previous, snapshot
from shared import restore as core
from shared.objects import ObjectStore
from shared.settings import Settings

if TYPE_CHECKING:
    from tests.acceptance.conftest import Stack

ROOT = Path(__file__).resolve().parent.parent.parent
_LONGEST_WAIT_SECONDS = 180.0

# Where to wait: the core function as the flows reach it, and whether before or after its work.
POINTS: dict[str, tuple[Any, str, Literal["before", "after"]]] = {
    "download": (core, "fetch", "after"),  # the snapshot is there, not inspected
    "copy": (previous, "copy", "after"),
    "safety-backup": (ObjectStore, "put_file", "before"),
    "lock": (core, "lock", "after"),  # the lease is held, writes flow
    "before the rename": (generation, "activate", "before"),  # the fence is up
    "after the rename": (generation, "activate", "after"),
    "verify": (core, "verify", "after"),  # the fence is still up
    "release": (core, "finish", "before"),  # everybody is in again, the lease is held
    "snapshot": (snapshot, "copy", "before"),  # of a backup: its content is fixed
}


def point_file(data_dir: Path, tenant_id: str) -> Path:
    """Holds the point and the pid of whoever waits; the wait ends when it is gone."""
    return data_dir / "points" / tenant_id


def _wait(point: str, tenant_id: str) -> None:
    file = point_file(configuration().data_dir, tenant_id)
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"point": point, "pid": os.getpid()}))
    part.rename(file)
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def waiting(point: str | None, tenant_id: str) -> Iterator[None]:
    """Inside: the first call of the point's function waits. No point, no wait."""
    if point is None:
        yield
        return
    owner, name, when = POINTS[point]
    real: Callable[..., Any] = getattr(owner, name)
    waited: list[str] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        first = not waited
        waited.append(point)
        if first and when == "before":
            _wait(point, tenant_id)
        result = real(*arguments, **options)
        if first and when == "after":
            _wait(point, tenant_id)
        return result

    setattr(owner, name, slow)
    try:
        yield
    finally:
        setattr(owner, name, real)


@flow(name="slow-restore", flow_run_name="slow-restore-{tenant_id}", persist_result=False)
def slow_restore(tenant_id: str, point: str, backup_id: str | None = None) -> Any:
    """The body of a restore in this run, with a wait in it; without a backup, of an undo."""
    with waiting(point, tenant_id):
        if backup_id is None:
            return restore_undo.fn(tenant_id, requested_by="test")
        return restore.fn(tenant_id, UUID(backup_id), requested_by="test")


_FLOWS: dict[str, Any] = {"restore": restore, "undo": restore_undo, "backup": backup, "sweep": sweep}


class Beside:
    """That process beside a stack. One flow at a time."""

    def __init__(self, stack: Stack) -> None:
        status, self._data_dir = stack.status, stack.data_dir
        known = ("data_dir", "control_plane_url", "object_store_url", "prefect_api_url")
        settings = Settings(**{name: status[name] for name in known})
        environment = child_environment(settings) | {
            "PYTHONPATH": str(ROOT),
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.slow_restore"],  # not `stack.program`: it is killed
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, flow_name: str, tenant_id: str, *, point: str | None = None, **parameters: Any) -> None:
        """Start a flow; with a point, return when it waits there."""
        assert self._process.stdin is not None
        named = {"tenants": [tenant_id]} if flow_name == "backup" else {"tenant_id": tenant_id}
        job = {"flow": flow_name, "tenant_id": tenant_id, "point": point, "parameters": named | parameters}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if point is not None:
            deadline = time.monotonic() + 60
            while not point_file(self._data_dir, tenant_id).exists():
                assert time.monotonic() < deadline and self._process.poll() is None, f"never came to {point}"
                time.sleep(0.02)

    def go_on(self, tenant_id: str) -> None:
        """End the wait at the point."""
        point_file(self._data_dir, tenant_id).unlink()

    def answer(self) -> dict[str, Any]:
        """How the flow ended: `state`, `message`, `run`, `result`."""
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def run(self, flow_name: str, tenant_id: str, **parameters: Any) -> dict[str, Any]:
        self.start(flow_name, tenant_id, **parameters)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Run the flows asked for on stdin until it ends."""
    for line in sys.stdin:
        job = json.loads(line)
        with waiting(job["point"], job["tenant_id"]):
            state = _FLOWS[job["flow"]](**job["parameters"], return_state=True)
        answer = {
            "state": state.type.value,
            "message": str(state.message),
            "run": str(state.state_details.flow_run_id),
            "result": state.result(raise_on_failure=False) if state.is_completed() else None,
        }
        print(json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    main()
