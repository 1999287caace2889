"""`engram up --detach` and `engram down`: a supervisor without a terminal, and its end.

The detached supervisor is the ordinary `engram up` in its own session with its output in `logs/up.log`. Its
parent waits for the state file to say "running" or for the supervisor to end, never for an amount of time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deployments.leftovers import end_leftovers
from deployments.process import POLL_SECONDS, STACK_MARK, StartFailed, last_lines, rotate
from deployments.running import AlreadyUp, StackState, UpLock
from shared.errors import Permanent
from shared.settings import Settings

# A stop takes the parts one after the other; each has the whole time-out to itself, few ever need it.
_STOP_TIMEOUTS = 3
_AFTER_KILL_SECONDS = 10.0


def up(settings: Settings, say: Callable[[str], None], *, monitoring: bool = False) -> None:
    """Start a detached supervisor and return when all is ready. Raises `StartFailed` with the cause."""
    holder = UpLock(settings.data_dir).holder()
    if holder:
        raise AlreadyUp(f"a stack is already up in {settings.data_dir} (pid {holder})")
    log_path = settings.data_dir / "logs" / "up.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    rotate(log_path)
    environment = {k: v for k, v in os.environ.items() if k != STACK_MARK}
    with log_path.open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-P", "-m", "deployments.cli", "up", "--supervise", *(["--monitoring"] * monitoring)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # giving up here stops what is starting there
    shown = 0
    try:
        while not _ready(settings.data_dir, supervisor.pid):
            shown = _show_progress(log_path, shown, say)
            if supervisor.poll() is not None:
                raise StartFailed(last_lines(log_path, lines=1).removeprefix("engram: "))
            time.sleep(POLL_SECONDS)
        _show_progress(log_path, shown, say)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise


def down(settings: Settings) -> bool:
    """Stop the supervisor, or clean up after one that was killed. True when there was something to stop."""
    lock = UpLock(settings.data_dir)
    holder = lock.holder()
    if holder:
        patience = settings.stop_timeout_seconds * _STOP_TIMEOUTS
        for number, seconds in (
            (signal.SIGTERM, patience),
            (signal.SIGTERM, settings.stop_timeout_seconds),  # the second one makes it hurry
            (signal.SIGKILL, _AFTER_KILL_SECONDS),
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder, number)
            if _released(lock, holder, seconds):
                break
    if not settings.data_dir.exists():
        return False
    if not lock.acquire():
        raise Permanent(f"another stack has started in {settings.data_dir} (pid {lock.holder()})")
    try:
        left = end_leftovers(settings.data_dir)
        StackState.remove(settings.data_dir)
    finally:
        lock.release()
    return bool(holder or left)


def _ready(data_dir: Path, pid: int) -> bool:
    state = StackState.read(data_dir)
    return state is not None and state.pid == pid and state.state == "running"


def _released(lock: UpLock, holder: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lock.holder() == holder:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _show_progress(log_path: Path, shown: int, say: Callable[[str], None]) -> int:
    """Pass on whole new lines of the supervisor's output, except its last word on failing."""
    text = log_path.read_bytes()[shown:]
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        if not line.startswith("engram: "):
            say(line)
    return shown + len(whole)
