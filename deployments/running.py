"""What runs in a data directory: the lock, the state file, and the settings a command beside the stack needs.

    {data_dir}/run/up.lock       flock held by the supervisor for as long as it lives; holds its pid
    {data_dir}/run/stack.json    0600: resolved settings and the processes

The lock is the truth about whether a stack runs (the kernel drops it with its holder); the state file says what
it consists of and outlives a SIGKILL, so that the next `engram up` knows what to look for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import SecretStr

from deployments.process import rss_bytes, same_process
from shared import durable
from shared.errors import Permanent
from shared.settings import Settings, redact_url

# What `engram up` resolves, and what a command beside it takes over unless the person set it.
RESOLVED = (
    "control_plane_url",
    "object_store_url",
    "prefect_api_url",
    "prefect_api_auth_string",
    "jwks_url",
    "jwt_issuer",
    "gateway_host",
    "gateway_port",
    "postgres_port",
    "prefect_port",
    "issuer_port",
    "prometheus_port",
    "alertmanager_port",
    "probe_port",
    "bridge_port",
    "prometheus_url",
    "alertmanager_url",
    "point_in_time",
)
_SECRET = ("control_plane_url", "prefect_api_auth_string")

_LOOK_SECONDS = 1.0


class AlreadyUp(Permanent):
    """Another supervisor holds the data directory."""


@dataclass(slots=True)
class ProcessState:
    name: str
    pid: int
    created_at: float
    state: str


@dataclass(slots=True)
class StackState:
    """The content of `stack.json`."""

    pid: int
    state: str
    settings: dict[str, Any]
    embedded_postgres: bool = False
    processes: list[ProcessState] = field(default_factory=list)

    def write(self, data_dir: Path) -> None:
        durable.write_file(_state_file(data_dir), json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def remove(data_dir: Path) -> None:
        _state_file(data_dir).unlink(missing_ok=True)

    @classmethod
    def read(cls, data_dir: Path) -> Self | None:
        """None when there is none, or a half-written or foreign one."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            raw = json.loads(_state_file(data_dir).read_bytes())
            raw["processes"] = [ProcessState(**p) for p in raw["processes"]]
            return cls(**raw)
        return None


class UpLock:
    """The supervisor's lock: exclusive while it lives. Looking takes it shared for an instant."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "run" / "up.lock"
        self._fd: int | None = None

    def acquire(self) -> bool:
        """False when another supervisor has it; one that only looks is waited for."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOOK_SECONDS
        while not _flock(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(fd)
                return False
            time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._fd = fd
        return True

    def release(self) -> None:
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None

    def holder(self) -> int:
        """The pid of the supervisor, 0 when none lives."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            deadline = time.monotonic() + _LOOK_SECONDS
            while not _flock(fd, fcntl.LOCK_SH):
                if (pid := os.pread(fd, 20, 0)) or time.monotonic() > deadline:
                    return int(pid or 0)
                time.sleep(0.02)  # it has the lock and is about to write its pid
            return 0
        finally:
            os.close(fd)


def _flock(fd: int, mode: int) -> bool:
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def running_settings(*needed: str) -> Settings:
    """The environment's settings, completed by those of the stack that runs in the same data directory.

    What the person set always wins. Raises `Permanent` when one of `needed` is then still empty.
    """
    settings = Settings()
    state = StackState.read(settings.data_dir) if UpLock(settings.data_dir).holder() else None
    if state is not None:
        found = {n: v for n, v in state.settings.items() if n in RESOLVED and not settings.is_set(n)}
        found |= {n: SecretStr(found[n]) for n in _SECRET if n in found}
        settings = settings.model_copy(update=found)
    elif settings.env == "dev" and any(not _given(settings, name) for name in needed):
        raise Permanent(f"no stack runs in {settings.data_dir}: start one with `engram up`")
    settings.require(*needed)
    return settings


def resolved_values(settings: Settings) -> dict[str, Any]:
    """`RESOLVED` as plain values, passwords included: only for the 0600 state file."""
    values = {name: getattr(settings, name) for name in RESOLVED}
    return values | {name: values[name].get_secret_value() for name in _SECRET}


def status(settings: Settings) -> dict[str, Any]:
    """What `engram status --json` prints. Never raises for a stack that does not run."""
    holder = UpLock(settings.data_dir).holder()
    state = StackState.read(settings.data_dir) if holder else None
    if state is not None and state.pid != holder:
        state = None  # the file of an earlier run: the new one has not written its own yet
    if state is None:
        overall = "starting" if holder else "stopped"
        shown = resolved_values(settings)
        if not holder:
            shown |= {name: "" for name in ("jwks_url", "prefect_api_url") if not settings.is_set(name)}
        processes: list[dict[str, Any]] = []
    else:
        shown = resolved_values(settings) | state.settings  # an older build's file may lack what is new
        processes = [_process(p) for p in [ProcessState("up", holder, 0.0, "running"), *state.processes]]
        overall = state.state
        if overall == "running" and any(p["state"] != "running" for p in processes):
            overall = "degraded"
    running = settings.model_copy(update={n: shown[n] for n in ("gateway_host", "gateway_port", "prefect_api_url")})
    control_plane_url = str(shown["control_plane_url"])
    if state is None or not state.embedded_postgres:
        control_plane_url = redact_url(control_plane_url)
    return {
        "state": overall,
        "environment": settings.env,
        "data_dir": str(settings.data_dir),
        "gateway_url": running.gateway_url if state else "",
        "prefect_ui_url": running.prefect_ui_url,
        "prefect_api_url": shown["prefect_api_url"],
        "control_plane_url": control_plane_url,
        "object_store_url": shown["object_store_url"],
        "jwks_url": shown["jwks_url"],
        "issuer": shown["jwt_issuer"],
        "prometheus_url": shown["prometheus_url"],
        "alertmanager_url": shown["alertmanager_url"],
        "processes": processes,
    }


def _process(recorded: ProcessState) -> dict[str, Any]:
    if recorded.name == "up":  # its memory without that of its children, which are listed themselves
        import psutil

        with contextlib.suppress(psutil.Error):
            rss = psutil.Process(recorded.pid).memory_info().rss
            return {"name": "up", "pid": recorded.pid, "state": "running", "rss_bytes": rss}
    alive = same_process(recorded.pid, recorded.created_at) is not None
    return {
        "name": recorded.name,
        "pid": recorded.pid,
        "state": recorded.state if alive else "stopped",
        "rss_bytes": rss_bytes(recorded.pid, recorded.created_at) if alive else 0,
    }


def _given(settings: Settings, name: str) -> bool:
    value = getattr(settings, name)
    return bool(value.get_secret_value() if isinstance(value, SecretStr) else value)


def _state_file(data_dir: Path) -> Path:
    return data_dir / "run" / "stack.json"
