"""Granian's supervisor, with another idea of what a dead or a silent worker means.

- A worker that dies is replaced at once, however soon it dies again: Granian gives the whole server up when the same
  worker dies twice within 5.5 s ("crash loop"), which turns two OOM kills into an outage. Given up is only what
  cannot work: more deaths than workers before any has served, or `DEATHS` for each worker within `DEATHS_SECONDS`.
  Then the process exits 1, for whoever runs it (`engram up`, a container runtime) to start it again.
- A worker whose heartbeat (`gateway.pulse`) stands still for `worker_silence_seconds` is killed and replaced: its
  socket would go on taking its share of the connections. Only time in which the supervisor itself ran counts, so a
  machine that slept kills nobody.
- Workers die with their supervisor (`shared.orphan`), in order: SIGTERM, drain, seal.
- SIGHUP stops in order, like SIGTERM: Granian's reload leaves old and new workers side by side (FACTS), and there is
  nothing to read again.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any

from granian.log import logger
from granian.server.mp import MPServer

from gateway.pulse import Pulse, new_beats

LOOK_SECONDS = 0.5
DEATHS = 5
DEATHS_SECONDS = 60.0


class Supervisor(MPServer):
    """Overrides what Granian calls from `serve`: how a worker is made, and the loop that waits for one to die."""

    def __init__(self, target: str, *, silence_seconds: float, **options: Any) -> None:
        super().__init__(target, **options)
        self._silence_seconds = silence_seconds
        self._beats = new_beats(self.workers)
        self._seen = [0.0] * self.workers
        self._silent_seconds = [0.0] * self.workers
        self._deaths: deque[float] = deque()
        self._spawned: set[int] = set()
        self._served = False

    def signal_handler_reload(self, *_args: Any, **_options: Any) -> None:
        self.interrupt_signal = True
        self.main_loop_interrupt.set()

    def _spawn_worker(self, idx: int, target: Any, callback_loader: Any) -> Any:  # type: ignore[override]
        respawned = idx in self._spawned
        self._spawned.add(idx)
        self._beats[idx] = self._seen[idx] = self._silent_seconds[idx] = 0.0
        return super()._spawn_worker(idx, target, partial(callback_loader, Pulse(self._beats, idx, respawned)))

    def _serve_loop(self, spawn_target: Any, target_loader: Any) -> None:
        looked_at = time.monotonic()
        while True:
            self.main_loop_interrupt.wait(LOOK_SECONDS)
            self.main_loop_interrupt.clear()  # before looking: a death from here on ends the next wait
            if self.interrupt_signal:
                return
            now = time.monotonic()
            self._kill_the_silent(min(now - looked_at, 2 * LOOK_SECONDS))
            looked_at = now
            dead = [worker.idx for worker in self.wrks if not worker.inner.is_alive()]
            if not dead:
                continue
            if self._is_hopeless(now, len(dead)):
                self.interrupt_children = dead  # with somebody in it, Granian's `shutdown` exits 1
                return
            self.interrupt_children.clear()
            self._respawn_workers(dead, spawn_target, target_loader)

    def _is_hopeless(self, now: float, dead: int) -> bool:
        self._deaths.extend([now] * dead)
        while self._deaths and now - self._deaths[0] > DEATHS_SECONDS:
            self._deaths.popleft()
        if not self._served and len(self._deaths) > self.workers:
            logger.error("Workers keep dying before any has served, exiting")
        elif len(self._deaths) > DEATHS * self.workers:
            logger.error(f"{len(self._deaths)} workers died within {DEATHS_SECONDS:.0f} s, exiting")
        else:
            return False
        return True

    def _kill_the_silent(self, elapsed_seconds: float) -> None:
        for worker in self.wrks:
            idx, beat = worker.idx, self._beats[worker.idx]
            if beat != self._seen[idx] or beat == 0.0:
                self._served = self._served or beat != 0.0
                self._seen[idx], self._silent_seconds[idx] = beat, 0.0
                continue
            self._silent_seconds[idx] += elapsed_seconds
            if 0 < self._silence_seconds <= self._silent_seconds[idx] and worker.inner.is_alive():
                logger.error(f"worker-{idx + 1} was silent for {self._silent_seconds[idx]:.1f} s, killing it")
                worker.inner.kill()  # not `worker.kill`, which says that it was meant to stop
                self._silent_seconds[idx] = 0.0
