"""Granian's supervisor, with another idea of what a dead or a silent worker means.

- A worker that dies is replaced at once, however soon it dies again: Granian gives the whole server up when the same
  worker dies twice within 5.5 s ("crash loop"), which turns two OOM kills into an outage. Given up is only what
  cannot work: more deaths than workers before any has served, or `DEATHS` for each worker within `DEATHS_SECONDS`
  and none left that serves. Then the process exits 1, for whoever runs it (`engram up`, a container runtime) to start
  it again.
- While one serves, the server is not given up for those that die: it has clients, and usage in memory that a full
  disk may refuse. After so many deaths successors come with growing pauses instead, of `LONGEST_PAUSE_SECONDS` in the
  end, until none died for `DEATHS_SECONDS`; or at once when the last one that serves dies.
- A worker whose heartbeat (`gateway.pulse`) stands still for `worker_silence_seconds` is killed and replaced: its
  socket would go on taking its share of the connections. Only time in which the supervisor itself ran counts, so a
  machine that slept kills nobody.
- Workers are replaced when somebody asks for it (`shared.limits`, `restart_workers`), one after the other: a new one
  starts beside the old one, and once it serves the old one is told to finish what it has and go. One that cannot
  start, or knows no tenants or keys because nobody answers it, ends that: those that serve are kept. Granian's own way
  stops the old one whether or not the new one serves.
- Workers die with their supervisor (`shared.orphan`), in order: SIGTERM, drain, seal.
- A worker that has to be killed when the server stops makes it exit 1: what it has not sealed is for somebody to know.
- SIGHUP stops in order, like SIGTERM: Granian's reload leaves old and new workers side by side (FACTS), and there is
  nothing to read again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from typing import Any

from granian.log import logger
from granian.server.mp import MPServer

from gateway.pulse import Pulse, new_beats
from shared.ending import end_now

LOOK_SECONDS = 0.5
DEATHS = 5
DEATHS_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 30.0
SERVED_SECONDS = 2.0
START_SECONDS = 40.0  # for a new worker to serve beside the old one


def _work(target: Callable[..., None], *arguments: Any) -> None:
    """In the worker: all of its life. When Granian's part returns, the application has done what must not be missing
    (`gateway.app`), or has logged why not; or it never came to serve."""
    code = 0
    try:
        target(*arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    end_now(code)


class Supervisor(MPServer):
    """Overrides what Granian calls from `serve`: how a worker is made, and the loop that waits for one to die."""

    def __init__(
        self,
        target: str,
        *,
        silence_seconds: float,
        restart_asked: Callable[[], tuple[str, int]],
        given_up: Callable[[str, str], None] = lambda _asked, _cause: None,
        **options: Any,
    ) -> None:
        """`restart_asked` is the id of the newest wish for new workers, empty when there is none, and the process id of
        the worker that goes last, if it is one: who asked. `given_up` is told such an id, and why no more workers are
        replaced for it."""
        super().__init__(target, **options)
        self._silence_seconds = silence_seconds
        self._restart_asked = restart_asked
        self._restarted, _ = restart_asked()
        self._given_up = given_up
        self._to_replace: deque[int] = deque()
        self._arriving: Any = None  # a worker, beside the first of `_to_replace`
        self._arrived_at = 0.0
        self._first_beat = 0.0
        self._leaving: list[tuple[Any, int, float]] = []  # worker, its place among the beats, since when
        # Two places a worker: while one is replaced both beat.
        self._beats = new_beats(2 * self.workers)
        self._places = list(range(self.workers))
        self._seen = [0.0] * self.workers
        self._silent_seconds = [0.0] * self.workers
        self._deaths: deque[float] = deque()
        self._mourned: set[int] = set()  # workers that are dead, counted among the deaths, and not replaced yet
        self._pause_seconds = 0.0
        self._paused_until = 0.0
        self._spawned: set[int] = set()
        self._served = False

    def signal_handler_reload(self, *_args: Any, **_options: Any) -> None:
        self.interrupt_signal = True
        self.main_loop_interrupt.set()

    def _spawn_worker(self, idx: int, target: Any, callback_loader: Any) -> Any:  # type: ignore[override]
        respawned = idx in self._spawned
        self._spawned.add(idx)
        self._mourned.discard(idx)
        self._seen[idx] = self._silent_seconds[idx] = 0.0
        return self._spawn_at(Pulse(self._beats, self._places[idx], respawned), idx, target, callback_loader)

    def _spawn_at(self, pulse: Pulse, idx: int, target: Any, callback_loader: Any) -> Any:
        self._beats[pulse.index] = self._beats[2 * self.workers + pulse.index] = 0.0
        return super()._spawn_worker(idx, partial(_work, target), partial(callback_loader, pulse))

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
            self._replace_workers(now, spawn_target, target_loader)
            dead = [worker.idx for worker in self.wrks if not worker.inner.is_alive()]
            if self._arriving is not None and self._arriving.idx in dead and self._arriving.is_alive():
                dead.remove(self._arriving.idx)  # its successor is on its way already
            if not dead:
                continue
            somebody_serves = self._somebody_serves()
            if self._is_hopeless(now, set(dead), somebody_serves):
                self.interrupt_children = dead  # with somebody in it, Granian's `shutdown` exits 1
                return
            self.interrupt_children.clear()
            if now >= self._paused_until or not somebody_serves:
                self._respawn_workers(dead, spawn_target, target_loader)

    def _somebody_serves(self) -> bool:
        """One that has fallen silent does until it is killed for it."""
        return any(worker.inner.is_alive() and self._beats[self._places[worker.idx]] > 0.0 for worker in self.wrks)

    def _is_hopeless(self, now: float, dead: set[int], somebody_serves: bool) -> bool:
        """Counts each death once, and decides how long its successor waits."""
        while self._deaths and now - self._deaths[0] > DEATHS_SECONDS:
            self._deaths.popleft()
        if not self._deaths:
            self._pause_seconds = 0.0
        new = dead - self._mourned
        self._mourned |= new
        self._deaths.extend([now] * len(new))
        too_many = len(self._deaths) > DEATHS * self.workers
        if somebody_serves:
            if new and (too_many or self._pause_seconds):
                self._pause_seconds = min(max(1.0, 2 * self._pause_seconds), LONGEST_PAUSE_SECONDS)
                self._paused_until = now + self._pause_seconds
                died = f"{len(self._deaths)} workers died within {DEATHS_SECONDS:.0f} s"
                logger.error(f"{died}; another serves, the next comes in {self._pause_seconds:.0f} s")
            return False
        if not self._served and len(self._deaths) > self.workers:
            logger.error("Workers keep dying before any has served, exiting")
        elif too_many:
            logger.error(f"{len(self._deaths)} workers died within {DEATHS_SECONDS:.0f} s, exiting")
        else:
            return False
        return True

    def _kill_the_silent(self, elapsed_seconds: float) -> None:
        for worker in self.wrks:
            idx, beat = worker.idx, self._beats[self._places[worker.idx]]
            if beat != self._seen[idx] or beat == 0.0:
                self._served = self._served or beat > 0.0
                self._seen[idx], self._silent_seconds[idx] = beat, 0.0
                continue
            self._silent_seconds[idx] += elapsed_seconds
            if 0 < self._silence_seconds <= self._silent_seconds[idx] and worker.inner.is_alive():
                logger.error(f"worker-{idx + 1} was silent for {self._silent_seconds[idx]:.1f} s, killing it")
                worker.inner.kill()  # not `worker.kill`, which says that it was meant to stop
                self._silent_seconds[idx] = 0.0

    def _replace_workers(self, now: float, spawn_target: Any, target_loader: Any) -> None:
        """One step: begin what was asked for, bring the next new worker up, let an old one go."""
        self._bury(now)
        if not self._to_replace:
            asked, last_pid = self._restart_asked()
            if asked in ("", self._restarted):
                return
            self._restarted = asked
            self._to_replace.extend(sorted(range(self.workers), key=lambda idx: self.wrks[idx].inner.pid == last_pid))
        idx = self._to_replace[0]
        place = (self._places[idx] + self.workers) % (2 * self.workers)
        if self._arriving is None:
            if any(left == place for _, left, _ in self._leaving):
                return  # the one before it has not gone yet
            logger.info(f"Replacing worker-{idx + 1}")
            pulse = Pulse(self._beats, place, respawned=False, steers_to=self.workers)
            self._arriving = self._spawn_at(pulse, idx, spawn_target, target_loader)
            self._arriving.start()
            self._arrived_at, self._first_beat = now, 0.0
        elif not self._arriving.is_alive() or now - self._arrived_at > START_SECONDS:
            how = "died before it served" if not self._arriving.is_alive() else f"did not serve in {START_SECONDS:g} s"
            logger.error(f"The new worker-{idx + 1} does not serve; the workers there are are kept")
            self._given_up(self._restarted, f"a new worker {how}; the workers there are are kept")
            self._arriving.kill()
            self._arriving.join()
            self._beats[place] = self._beats[2 * self.workers + self._places[idx]] = 0.0
            self._arriving = None
            self._to_replace.clear()
            self.interrupt_children.clear()
        elif self._serves(place, self._places[idx], now):
            old, self.wrks[idx], self._arriving = self.wrks[idx], self._arriving, None
            self._leaving.append((old, self._places[idx], now))
            self._places[idx] = place
            self._mourned.discard(idx)
            self._seen[idx] = self._silent_seconds[idx] = 0.0
            self._to_replace.popleft()
            old.terminate()  # type: ignore[no-untyped-call]

    def _serves(self, place: int, old_place: int, now: float) -> bool:
        """And has for long enough: the first beat is from before it listens, and the old worker needs time to read what
        it accepted before new connections went to the new one (`gateway.steering`), and to tell its clients."""
        if self._first_beat == 0.0 and self._beats[place] > 0.0:
            self._first_beat = now
            self._beats[2 * self.workers + old_place] = now
        return self._first_beat != 0.0 and now - self._first_beat >= SERVED_SECONDS

    def _bury(self, now: float) -> None:
        for leaving in list(self._leaving):
            worker, place, since = leaving
            if not worker.is_alive():
                self._beats[place] = 0.0
                self._leaving.remove(leaving)
                logger.info(f"The old worker-{worker.idx + 1} is gone")
            elif self.workers_kill_timeout and now - since > self.workers_kill_timeout:
                logger.warning(f"Killing the old worker-{worker.idx + 1} after it refused to gracefully stop")
                worker.kill()

    def _stop_workers(self) -> None:
        """All at once, those that are leaving or arriving too. Granian's own asks of a worker that has just ended
        whether it lives while its other thread collects it, and is told so: it then says that it killed it."""
        stopping = [*self.wrks, *(worker for worker, _, _ in self._leaving)]
        stopping += [self._arriving] if self._arriving is not None else []
        for worker in stopping:
            worker.terminate()
        alive = {worker.inner.sentinel: worker for worker in stopping}
        deadline = time.monotonic() + (self.workers_kill_timeout or math.inf)
        while alive and (left_seconds := deadline - time.monotonic()) > 0:
            for ended in wait(alive, left_seconds if left_seconds < math.inf else None):
                logger.info(f"Stopped worker-{alive.pop(ended).idx + 1}")
        for worker in alive.values():
            logger.error(
                f"Killing worker-{worker.idx + 1} (PID {worker.inner.pid}) after it refused to gracefully stop: its"
                " requests may be cut off, and its last usage may not be sealed (what is on disk the drain adopts)"
            )
            worker.kill()
            worker.join()
        self.wrks.clear()
        if self.interrupt_signal:
            self.interrupt_children.clear()  # deaths that were still to be dealt with would have it exit 1
        self.interrupt_children.extend(worker.idx for worker in alive.values())  # and so do these
