"""Work that must happen every so often, off the event loop, each in a thread of its own.

One thread a job, so that PostgreSQL taking its connect time-out cannot delay the spool's fsync.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from shared.log import get_logger

log = get_logger("gateway")


class Periodic:
    """Calls `job` every `seconds` until `stop_all`; a failure is logged and the next turn tries again.

    The first turn is after `seconds` too, or at once.
    """

    def __init__(self, name: str, seconds: float, job: Callable[[], None], *, at_once: bool = False) -> None:
        self._name = name
        self._seconds = seconds
        self._job = job
        self._at_once = at_once
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Periodic:
        self._thread.start()
        return self

    def _run(self) -> None:
        failing = False
        while not self._stop.wait(0 if self._at_once else self._seconds):
            self._at_once = False
            try:
                self._job()
                failing = False
            except Exception as e:  # noqa: BLE001  a dead background thread is worse than any error in it
                if not failing:  # once per outage, not once per turn
                    log.error("background_work_failed", work=self._name, error=type(e).__name__, cause=str(e)[:500])
                failing = True


def stop_all(work: Sequence[Periodic], timeout_seconds: float) -> None:
    """Let running turns end, all within `timeout_seconds`: those that wait for the same silent server do so together.
    No job runs after this returned (unless it hangs that long)."""
    deadline = time.monotonic() + timeout_seconds
    for each in work:
        each._stop.set()
    for each in work:
        each._thread.join(max(0.0, deadline - time.monotonic()))
