"""The workers' heartbeats, in memory that they share with their supervisor: no disk, no lock, nothing to fill up.

A worker's event loop writes the time into its own place, so a worker that is stopped (SIGSTOP, a debugger) or whose
loop is stuck goes silent while its listening socket still takes its share of the connections. The supervisor kills
it (`gateway.supervisor`); how silent the most silent one is can be read from any worker's metrics.

One that takes a dead or a leaving one's place tells by the sign whether it serves yet: without the control plane or
the issuer it could only refuse its share of the connections, so it waits while others serve (`gateway.app`).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

from gateway.silence import STOPPING
from shared import metrics

BEAT_SECONDS = 0.5
FRESH_SECONDS = 4 * BEAT_SECONDS


@dataclass(slots=True)
class Pulse:
    """One worker's place among the `beats`: monotonic seconds of each worker's last one, 0 before the first and negated
    until it serves, and again once it is told to stop: from then on it listens no more.

    The second half of them is the supervisor's: not 0 for a worker that will soon be told to go. Then `leaving` is set
    within a beat, and the worker says so to the clients that keep connections (`gateway.edge`).
    """

    beats: Any  # a ctypes array of doubles
    index: int
    respawned: bool
    leaving: bool = False
    serving: bool = False
    steers_to: int = -1  # this worker's place among the listening ones, if it takes the place of one that still serves

    def start(self) -> None:
        """On the event loop: beat from now on."""
        if self.respawned:
            metrics.worker_restarts_total.inc()
        self._beat(asyncio.get_running_loop())

    def serve(self) -> None:
        """Say at once that this worker serves."""
        self.serving = True
        self.beats[self.index] = time.monotonic()

    def others_serve(self) -> bool:
        """Whether another worker does, whose place among the connections would be this one's too."""
        since = time.monotonic() - FRESH_SECONDS
        beats = self.beats[: len(self.beats) // 2]
        return any(beat > since for place, beat in enumerate(beats) if place != self.index)

    def observe(self) -> None:
        """Publish how long ago the most silent worker's last beat was."""
        beats = [abs(beat) for beat in self.beats[: len(self.beats) // 2] if beat]
        if beats:
            metrics.worker_oldest_beat_seconds.set(max(0.0, time.monotonic() - min(beats)))

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self.beats[self.index] = time.monotonic() if self.serving and not STOPPING.is_set() else -time.monotonic()
        self.leaving = self.beats[len(self.beats) // 2 + self.index] != 0.0
        loop.call_later(BEAT_SECONDS, self._beat, loop)


def new_beats(places: int) -> Any:
    return multiprocessing.get_context("spawn").RawArray("d", 2 * places)
