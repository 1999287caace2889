"""The workers' heartbeats, in memory that they share with their supervisor: no disk, no lock, nothing to fill up.

A worker's event loop writes the time into its own place, so a worker that is stopped (SIGSTOP, a debugger) or whose
loop is stuck goes silent while its listening socket still takes its share of the connections. The supervisor kills
it (`gateway.supervisor`); how silent the most silent one is can be read from any worker's metrics.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

from shared import metrics

BEAT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Pulse:
    """One worker's place among the `beats`: monotonic seconds of each worker's last one, 0 until it serves."""

    beats: Any  # a ctypes array of doubles
    index: int
    respawned: bool

    def start(self) -> None:
        """On the event loop: beat from now on."""
        if self.respawned:
            metrics.worker_restarts_total.inc()
        self._beat(asyncio.get_running_loop())

    def observe(self) -> None:
        """Publish how long ago the most silent serving worker's last beat was."""
        beats = [beat for beat in self.beats if beat]
        if beats:
            metrics.worker_oldest_beat_seconds.set(max(0.0, time.monotonic() - min(beats)))

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self.beats[self.index] = time.monotonic()
        loop.call_later(BEAT_SECONDS, self._beat, loop)


def new_beats(workers: int) -> Any:
    return multiprocessing.get_context("spawn").RawArray("d", workers)
