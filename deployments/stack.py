"""The supervisor behind `engram up`: everything in order, everything watched, everything stopped in order.

    lock → leftovers of a SIGKILLed run ended → ports chosen → PostgreSQL → migrations → issuer, Prefect server
         → work pool and deployments → worker, drain, gateway → with --monitoring: probe, Alertmanager, Prometheus
         → state "running"

Stopping is the same backwards: monitoring first (nobody is to be told of a stop), the gateway (no new traffic), then
the drain (its last pass meters what the gateway wrote), the worker, Prefect, the issuer, PostgreSQL. While starting,
any failure or signal stops what was started; afterwards a part that dies is started again with back-off and the rest
goes on.

Single-threaded on purpose: parent-death signals belong to the thread that forks, and this one lives longest.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from deployments import parts as composition
from deployments.issuer import ensure_key
from deployments.leftovers import end_leftovers, marked
from deployments.parts import Parts
from deployments.ports import PortReservations
from deployments.process import POLL_SECONDS, Child, Interrupted, StartFailed, end_all, rotate
from deployments.running import AlreadyUp, ProcessState, StackState, UpLock, resolved_values
from shared.control_plane import ControlPlane
from shared.log import get_logger
from shared.settings import Settings

log = get_logger("up")
_WATCH_SECONDS = 1.0
_BACKOFF_MAX_SECONDS = 30.0
_STABLE_SECONDS = 60.0
_HURRIED_STOP_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36


class Watched:
    """A started part, and when to try it again once it died."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.state = "starting"
        self.since = time.monotonic()
        self.backoff_seconds = 0.0

    def enter(self, state: str) -> None:
        self.state = state
        self.since = time.monotonic()

    def seconds_in_state(self) -> float:
        return time.monotonic() - self.since


class Stack:
    """One run of the whole stack. `say` gets a line per step while it starts and stops."""

    def __init__(self, settings: Settings, say: Callable[[str], None], *, monitoring: bool = False) -> None:
        self._given = settings
        self._monitoring = monitoring
        self._say = say
        self._stop_requested = threading.Event()
        self._hurry = threading.Event()
        self._ports = PortReservations()
        self._watched: list[Watched] = []
        self._state = StackState(os.getpid(), "starting", {})

    def run(self, on_ready: Callable[[], None]) -> None:
        """Start, call `on_ready`, watch until asked to stop, stop. Raises what made the start fail."""
        lock = UpLock(self._given.data_dir)
        with self._signals():
            if not lock.acquire():
                raise AlreadyUp(f"a stack is already up in {self._given.data_dir} (pid {lock.holder()})")
            try:
                if ended := end_leftovers(self._given.data_dir):
                    self._say(f"ended {ended} processes of an earlier run")
                self._start()
                on_ready()
                self._watch()
            finally:
                self._stop()
                lock.release()

    # Start

    def _start(self) -> None:
        parts = composition.plan(self._given, self._ports, monitoring=self._monitoring)
        settings = parts.settings
        self._state.settings = resolved_values(settings)
        self._state.embedded_postgres = parts.postgres is not None
        _become_subreaper()
        for name in ("postgres", "issuer", "prefect", "deployments", "worker", "drain", "litestream", "gateway"):
            rotate(settings.data_dir / "logs" / f"{name}.log")
        for watcher, _ in parts.monitoring:
            rotate(settings.data_dir / "logs" / f"{watcher.name}.log")
        self._save()

        if parts.postgres is not None:
            self._launch(parts.postgres.child, "postgres_port")
            self._await(parts.postgres.child)
            parts.postgres.create_databases()
        self._give_up()
        with ControlPlane(settings) as control_plane:
            applied = control_plane.migrate()
        self._say(f"migrations: {len(applied)} applied" if applied else "migrations: up to date")

        if parts.issuer is not None:
            ensure_key(settings.data_dir)
            self._launch(parts.issuer, "issuer_port")
        if parts.prefect is not None:
            self._launch(parts.prefect, "prefect_port")
        for child in (parts.issuer, parts.prefect):
            if child is not None:
                self._await(child)
        self._deploy(parts)
        self._launch(parts.worker)
        self._launch(parts.drain)
        if parts.litestream is not None:  # before the gateway, so that it stops after it and has its last writes
            self._launch(parts.litestream)
        self._launch(parts.gateway, "gateway_port")
        for child in (parts.worker, parts.drain, parts.litestream, parts.gateway):
            if child is not None:
                self._await(child)
        for watcher, port_setting in parts.monitoring:  # last: nothing is reported that only was not there yet
            self._launch(watcher, port_setting)
        for watcher, _ in parts.monitoring:
            self._await(watcher)
        self._give_up()
        self._state.state = "running"
        self._save()

    def _launch(self, child: Child, port_setting: str = "") -> None:
        self._give_up()
        self._ports.release(port_setting)
        watched = Watched(child)
        self._watched.append(watched)
        child.start()
        self._save()

    def _await(self, child: Child) -> None:
        watched = next(w for w in self._watched if w.child is child)
        child.wait_ready(self._given.start_timeout_seconds, self._give_up)
        self._say(f"{child.name}: ready after {watched.seconds_in_state():.1f} s")
        watched.enter("running")
        self._save()

    def _deploy(self, parts: Parts) -> None:
        """Run the one part that ends by itself to its end."""
        child, started_at = parts.deploy, time.monotonic()
        self._launch(child)
        while child.alive():
            self._give_up()
            if time.monotonic() - started_at > self._given.start_timeout_seconds:
                raise child.failure(f"not done within {self._given.start_timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)
        self._watched = [w for w in self._watched if w.child is not child]
        if child.exit_reason() != "exit code 0":
            raise child.failure(f"failed ({child.exit_reason()})")
        self._say(f"deployments: applied after {time.monotonic() - started_at:.1f} s")

    def _give_up(self) -> None:
        """Raise when there is no point in starting further."""
        if self._stop_requested.is_set():
            raise Interrupted("stopped before it was ready")
        for watched in self._watched:
            if watched.state == "running" and not watched.child.alive():
                raise watched.child.failure(f"died during the start ({watched.child.exit_reason()})")

    # Watch

    def _watch(self) -> None:
        while not self._stop_requested.wait(_WATCH_SECONDS):
            changed = [self._check(watched) for watched in self._watched]
            self._reap_orphans()
            if any(changed):
                healthy = all(w.state == "running" for w in self._watched)
                self._state.state = "running" if healthy else "degraded"
                self._save()

    def _check(self, watched: Watched) -> bool:
        """Move one part along running → waiting → starting → running; whether it moved."""
        child = watched.child
        if watched.state == "waiting":
            if watched.seconds_in_state() < watched.backoff_seconds:
                return False
            self._start_again(watched)
        elif not child.alive():
            self._schedule(watched, child.exit_reason())
        elif watched.state == "starting":
            if child.ready():
                watched.enter("running")
                log.info("part_restarted", part=child.name, pid=child.pid)
            elif watched.seconds_in_state() > self._given.start_timeout_seconds:
                child.stop(_HURRIED_STOP_SECONDS)
                self._schedule(watched, "not ready in time")
            else:
                return False
        else:
            if watched.backoff_seconds and watched.seconds_in_state() > _STABLE_SECONDS:
                watched.backoff_seconds = 0.0
            return False
        return True

    def _schedule(self, watched: Watched, reason: str) -> None:
        watched.backoff_seconds = min(_BACKOFF_MAX_SECONDS, watched.backoff_seconds * 2 or 0.5)
        watched.enter("waiting")
        log.error("part_died", part=watched.child.name, reason=reason, restart_after_seconds=watched.backoff_seconds)

    def _start_again(self, watched: Watched) -> None:
        child = watched.child
        if child.name != "worker":  # flow runs outlive their worker on purpose; a second gateway must not
            child.stop(_HURRIED_STOP_SECONDS)
        try:
            child.start()
        except StartFailed as e:
            self._schedule(watched, str(e))
        else:
            watched.enter("starting")

    def _reap_orphans(self) -> None:
        """Wait for dead grandchildren that became ours; our own children stay for `Popen` to wait for."""
        own = {watched.child.pid for watched in self._watched}
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if dead.si_pid in own:
                    return  # noticed by the next check, orphans behind it by the one after
                os.waitpid(dead.si_pid, os.WNOHANG)

    # Stop

    def _stop(self) -> None:
        self._stop_requested.set()
        if self._watched:
            self._state.state = "stopping"
            self._save()
        for watched in reversed(self._watched):
            child = watched.child
            if child.name == "postgres":
                end_all(list(marked(self._given.data_dir)), _HURRIED_STOP_SECONDS)  # flow runs, orphans
                by_itself = child.stop(
                    _HURRIED_STOP_SECONDS if self._hurry.is_set() else self._given.stop_timeout_seconds
                )
            else:
                by_itself = child.stop(self._given.stop_timeout_seconds, self._hurry)
            self._say(f"{child.name}: {child.ending() if by_itself else 'killed after the time-out'}")
        end_all(list(marked(self._given.data_dir)), _HURRIED_STOP_SECONDS)
        self._state.remove(self._given.data_dir)
        self._ports.release_all()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, _frame: FrameType | None) -> None:
            if self._stop_requested.is_set():
                self._hurry.set()
            self._stop_requested.set()

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means to stay
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self) -> None:
        self._state.processes = [
            ProcessState(w.child.name, w.child.pid, w.child.created_at, w.state) for w in self._watched
        ]
        self._state.write(self._given.data_dir)


def _become_subreaper() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
