"""What a SIGKILLed `engram up` leaves running, and its end.

Two nets, because each has holes: the processes the state file recorded (a server may have replaced its
environment), and every process whose environment carries this data directory's mark (orphans of children that
nobody recorded). Callers hold the up lock: while a supervisor lives, its processes are not leftovers.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from deployments import postgres
from deployments.process import STACK_MARK, end_all, same_process
from deployments.running import StackState


def end_leftovers(data_dir: Path, grace_seconds: float = 10.0) -> int:
    """Stop them, PostgreSQL last and cleanly. Returns how many there were."""
    found = _recorded(data_dir) | marked(data_dir)
    servers = {p for p in found if _name(p) == "postgres"}
    end_all(list(found - servers), grace_seconds)
    stopped = postgres.stop_leftover(data_dir / "postgres")
    end_all(list(servers), grace_seconds)
    return len(found) or int(stopped)


def marked(data_dir: Path) -> set[psutil.Process]:
    """Live processes that were started, however indirectly, by a stack in this data directory."""
    mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in mine and process.environ().get(STACK_MARK) == str(data_dir):
                found.add(process)
    return found


def _recorded(data_dir: Path) -> set[psutil.Process]:
    state = StackState.read(data_dir)
    recorded = state.processes if state else []
    return {p for r in recorded if (p := same_process(r.pid, r.created_at)) is not None}


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""
