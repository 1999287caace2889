"""One child process: start, readiness, memory, stop. Knows nothing of what the child does.

- A child leads its own session, so Ctrl-C in the terminal reaches the supervisor alone, which stops in order.
- The kernel stops the child when its parent is SIGKILLed (`shared.orphan`): start children from a thread that lives
  as long as the process.
- `ENGRAM_STACK={data_dir}` in its environment, inherited by everything it starts, is how a later `engram up`
  finds what a SIGKILLed one left behind (`deployments.leftovers`).
- Stopping is signal → time-out → SIGKILL, and covers descendants, whether or not they left the process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from shared.errors import Permanent, Transient
from shared.orphan import end_with_parent

STACK_MARK = "ENGRAM_STACK"
POLL_SECONDS = 0.05
_SURVIVORS_SECONDS = 5.0


class StartFailed(Permanent):
    """A child died or never became ready; the message names it and ends with the last lines of its log."""


class Interrupted(Transient):
    """Starting was given up because somebody asked the stack to stop."""


class Child:
    """A command with a log file and a readiness probe. `start` may be called again after it died."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        ready: Callable[[], bool],
        stop_signal: signal.Signals = signal.SIGTERM,
        before_start: Callable[[], None] | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`ready` is asked every `poll_seconds`."""
        self.name = name
        self._argv = list(argv)
        self._env = dict(env)
        self._log_path = log_path
        self._ready = ready
        self._stop_signal = stop_signal
        self._before_start = before_start
        self._poll_seconds = poll_seconds
        self._popen: subprocess.Popen[bytes] | None = None
        self.created_at = 0.0

    @property
    def pid(self) -> int:
        return self._popen.pid if self._popen else 0

    def start(self) -> None:
        """Start it; returns at once. Raises `StartFailed` when the program cannot be run."""
        if self._before_start:
            self._before_start()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()

        with self._log_path.open("ab") as log:
            try:
                self._popen = subprocess.Popen(
                    self._argv,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=partial(end_with_parent, parent, int(self._stop_signal)),
                )
            except OSError as e:
                raise StartFailed(f"{self.name}: {self._argv[0]}: {e.strerror}") from e
        try:
            self.created_at = psutil.Process(self._popen.pid).create_time()
        except psutil.NoSuchProcess:
            self.created_at = 0.0

    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def ready(self) -> bool:
        return self.alive() and self._ready()

    def wait_ready(self, timeout_seconds: float, give_up: Callable[[], None] = lambda: None) -> None:
        """Return when the probe holds. Raises `StartFailed`, or whatever `give_up` (called each poll) raises."""
        deadline = time.monotonic() + timeout_seconds
        while not self.ready():
            give_up()
            if not self.alive():
                raise self.failure(f"stopped while starting ({self.exit_reason()})")
            if time.monotonic() > deadline:
                raise self.failure(f"not ready within {timeout_seconds:g} s")
            time.sleep(self._poll_seconds)

    def exit_reason(self) -> str:
        code = self._popen.poll() if self._popen else None
        if code is None:
            return "still running" if self._popen else "never started"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def ending(self) -> str:
        """How one that was asked to stop did: a code of its own says that not all went as it should."""
        code = self._popen.poll() if self._popen else None
        return f"stopped with exit code {code}; log {self._log_path}" if code and code > 0 else "stopped"

    def failure(self, what: str) -> StartFailed:
        return StartFailed(f"{self.name}: {what}; log {self._log_path}: {last_lines(self._log_path)}")

    def stop(self, timeout_seconds: float, hurry: threading.Event | None = None) -> bool:
        """Ask, wait, then kill; afterwards nothing of its family runs. True when it left by itself."""
        if self._popen is None:
            return True
        family = self._family()
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._popen.pid, self._stop_signal)
        deadline = time.monotonic() + timeout_seconds
        while self.alive() and time.monotonic() < deadline and not (hurry and hurry.is_set()):
            time.sleep(POLL_SECONDS)
        by_itself = not self.alive()
        if not by_itself:
            family += self._family()
            self._popen.kill()
            self._popen.wait()
        end_all(family + _session_members(self._popen.pid), 0 if hurry and hurry.is_set() else _SURVIVORS_SECONDS)
        return by_itself

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return list(psutil.Process(self.pid).children(recursive=True))
        return []


def end_all(processes: Sequence[psutil.Process], grace_seconds: float) -> None:
    """SIGTERM, wait up to `grace_seconds`, SIGKILL. Compares creation times, so a reused pid is never hit."""
    left = [p for p in set(processes) if p.is_running()]
    if grace_seconds > 0 and left:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(left, timeout=grace_seconds)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_SURVIVORS_SECONDS)


def rss_bytes(pid: int, created_at: float) -> int:
    """Resident memory of a process and its descendants; 0 when it is gone."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if _same_time(process.create_time(), created_at):
            for member in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += member.memory_info().rss
    return total


def same_process(pid: int, created_at: float) -> psutil.Process | None:
    """The live process that was recorded as `pid` at `created_at`, or None."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if _same_time(process.create_time(), created_at) and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _same_time(a: float, b: float) -> bool:
    return abs(a - b) < 2.0  # a stepped clock moves the boot time these are computed from


def catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM by now (true where that cannot be seen)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
        return False
    return not sys.platform.startswith("linux")


def rotate(log_path: Path) -> None:
    """Keep the previous run's log as `NAME.log.1`."""
    with contextlib.suppress(FileNotFoundError):
        log_path.replace(log_path.with_name(f"{log_path.name}.1"))


def last_lines(path: Path, lines: int = 3, characters: int = 600) -> str:
    """The end of a log on one line."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - 8_192))
            text = f.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    tail = [" ".join(line.split()) for line in text.splitlines() if line.strip()][-lines:]
    text = " | ".join(tail) or "(empty)"
    return text if len(text) <= characters else f"…{text[-characters:]}"


def _session_members(leader: int) -> list[psutil.Process]:
    """Processes still in the session a dead leader made."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if pid != leader and os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
    return found
