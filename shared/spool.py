"""The usage spool: where a request's event is safe before the request is answered.

Producer (one `Spool` a gateway worker)
    append   one `os.write` to an O_APPEND file before the answer leaves
    tick     off the loop, every few hundred ms: fdatasync, and seal a segment that is `usage_flush_seconds` old or
             has `usage_flush_events` events
    sync     off the loop, when answers wait for it (`usage_durability = sync`): what was appended is durable, or is
             amended: the request will be refused, and its segment holds a second event of it, which is what counts
    measure  off the loop, every second: how much the directory holds, and what is refused because of it
Drainer (any process of the machine): `shared.spool_dir` and `shared.segment.read`.

What is lost when, of events whose requests were answered:

| the worker is SIGKILLed                     | none: the kernel has them                                     |
| the machine loses power, durability async   | those since the last fdatasync: `usage_fsync_seconds` (0.5 s) |
| the machine loses power, durability sync    | none: the answer waited for the fdatasync                     |
| the disk refuses a write                    | none; up to `usage_backlog_events` wait in memory, where a    |
|                                             | SIGKILL would lose them, and a stop does if the disk still    |
|                                             | refuses; everything is refused meanwhile                      |

What was appended is counted apart, by tenant and day (`shared.tally`).
How full the directory may become and what follows is in `shared.spool_limit`. Whatever is dropped is counted in
`engram_usage_lost_total`, which goes on over restarts (`shared.counters`), and logged.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

from shared import metrics, workers
from shared.durable import fsync_path
from shared.errors import SpoolUnavailable
from shared.log import get_logger
from shared.segment import MAGIC, Segment, SegmentContent, frame, framed, read
from shared.settings import Settings
from shared.spool_dir import adopt, flush_failed, quarantine, sealed, survey
from shared.spool_limit import SpoolLimit
from shared.tally import Tally
from shared.unfinished import Unfinished
from shared.usage import UsageEvent
from shared.workers import Spooled

__all__ = ["MAGIC", "SegmentContent", "Spool", "adopt", "frame", "quarantine", "read", "sealed", "survey"]

_RETRY_EVENTS = 200  # of the backlog, while `append` waits
_MOST_UNSEALED = 64  # each holds a descriptor; with more the disk is not to be trusted with new events
_count_event = metrics.adder(metrics.usage_events_total)
log = get_logger("spool")


class Spool:
    """The producer. `append` and most properties are for the event loop; everything else is for a thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.dir = settings.spool_dir
        self._flush_seconds = settings.usage_flush_seconds
        self._flush_events = settings.usage_flush_events
        self._backlog_events = settings.usage_backlog_events
        self._limit = SpoolLimit(settings)
        self._drop = settings.usage_at_limit == "drop"
        self._segment: Segment | None = None
        self._sealing: deque[Segment] = deque()
        self._backlog: deque[bytes] = deque()
        self._backlog_since_us = 0  # of what waits there, and may have gone to a segment since
        self.unfinished = Unfinished()
        self._lock = threading.Lock()  # held for a write(2) or for detaching a segment, never across an fsync
        self._disk_lock = threading.Lock()  # taken before `_lock`; whoever fsyncs or seals has it
        self._unsynced = False  # a `sync` failed, or too much could not be sealed, and it has not succeeded since
        self._lost, self._lost_cause = 0, ""  # since the last time it was logged
        self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fsync_path(self.dir.parent)
        self._tally = Tally(settings, self._lock)

    @property
    def available(self) -> bool:
        """False: refuse everything. The disk refuses events, or the reserve is used up."""
        return not (self._backlog or self._limit.refusing or self._unsynced) or self._drop

    @property
    def takes_writes(self) -> bool:
        """False: refuse requests that change something. The spool has reached its limit."""
        return self._limit.takes_writes

    @property
    def spooled(self) -> Spooled:
        """For any thread."""
        since_us = self.unfinished.since_us()  # first: an event goes from there to the backlog, and on to a segment
        with self._lock:
            return self._spooled(since_us)

    def _spooled(self, since_us: int) -> Spooled:
        if not self._backlog:
            return Spooled(since_us, 0)
        return Spooled(min(since_us, self._backlog_since_us), self._backlog_since_us)

    def append(self, event: UsageEvent, refusal: UsageEvent | None = None) -> str:
        """Make the event safe against the death of this process; the name of the segment that holds it.

        When the disk refuses, it is kept in memory and retried by `tick`; beyond `usage_backlog_events` it is
        dropped. There is no segment then (""). `refusal` is what is kept instead, when the request is refused for it.
        """
        data, kept = frame(event), frame(refusal) if refusal is not None else b""
        with self._lock:
            if self._backlog:
                return self._keep(event, kept or data, "the disk refuses and the backlog is full")
            if self._limit.dropping:
                return self._lose(event, "the spool is full")
            try:
                segment = self._write(data)
            except OSError as e:
                flush_failed("write", e)
                return self._keep(event, kept or data, e.strerror or str(e))
            _count_event(1.0)  # under the lock, so that whoever appends may be in any thread
            self._tally.count(event)
            return segment

    def tick(self) -> None:
        """fsync what was written, seal what is due, retry what was refused. Blocking."""
        with self._disk_lock:
            self._retry_backlog()
            self._settle(self._detach_due())
            self._say_what_was_lost()
        self._tally.tick()

    def sync(self, refusals: Iterable[tuple[str, UsageEvent]] = ()) -> list[UsageEvent]:
        """What `append` has put in a segment before this call survives power loss when it returns. Blocking.

        Where that cannot be had, the spool is unavailable until it can, and those of `refusals` that belong to such a
        segment are returned, and appended to it: of two events of a request the later one counts. Not to one that has
        its sealed name already, of which only the directory's fsync failed: that event stays as it was.
        """
        with self._disk_lock:
            self._retry_backlog()
            failed = {segment.name: segment for segment in self._settle(self._segment)}
            self._unsynced = self._unsynced or bool(failed)
            refused = [(failed[name], refusal) for name, refusal in refusals if name in failed]
            for segment, refusal in refused:
                if not segment.sealed:  # else only its name may be lost, and the drainer may have read it
                    segment.amend(frame(refusal))
            return [refusal for _, refusal in refused]

    def close(self) -> None:
        """Seal everything. Raises `SpoolUnavailable` when that could not be done; it can be tried again."""
        with self._disk_lock:
            self._retry_backlog()
            with self._lock:
                self._detach()
            self._settle(None)
            self._say_what_was_lost()
        self._tally.close()
        if self._backlog or self._sealing:
            raise SpoolUnavailable(f"{len(self._backlog)} usage events could not be written to {self.dir}")

    def give_up(self) -> int:
        """At the end of a worker that could not close its spool: count what memory still holds as lost; how much. What
        is in a segment will be adopted."""
        with self._disk_lock, self._lock:
            given_up = len(self._backlog)
            for data in self._backlog:
                self._tally.lose(framed(data))
            self._backlog.clear()
            metrics.usage_lost_total.inc(given_up)
            self._lost += given_up
            self._lost_cause = "the disk refused them until the worker's end"
        self._say_what_was_lost()
        if not self._tally.close():
            log.error("usage_events_lost_untallied", events=given_up)
        return given_up

    def measure(self) -> None:
        """Look at the directory and the disk: sets the gauges and what is refused from now on. Blocking."""
        in_spool = self._limit.measure()
        of_workers = [self.spooled, *workers.spooled(self._settings)]  # the gauge is the last one's that set it
        waiting_us = min((worker.waiting_us for worker in of_workers if worker.waiting_us), default=None)
        in_memory = time.time() - waiting_us / 1e6 if waiting_us is not None else 0.0
        metrics.usage_oldest_unflushed_seconds.set(max(in_spool, in_memory))

    def _write(self, data: bytes) -> str:
        segment = self._segment
        if segment is None or segment.torn or segment.events >= self._flush_events:
            self._detach()  # before the opening, which may fail
            segment = self._segment = Segment(self.dir, self._spooled(self.unfinished.since_us()).since_us)
        segment.append(data)
        return segment.name

    def _keep(self, event: UsageEvent, data: bytes, cause: str) -> str:
        if len(self._backlog) >= self._backlog_events:
            return self._lose(event, cause)
        self._backlog_since_us = min(self._backlog_since_us, event.ts_us) if self._backlog else event.ts_us
        self._backlog.append(data)
        _count_event(1.0)
        self._tally.count(event)
        return ""

    def _lose(self, event: UsageEvent, cause: str) -> str:
        metrics.usage_lost_total.inc()
        self._tally.lose(event)
        self._lost += 1
        self._lost_cause = cause
        return ""

    def _detach(self) -> None:
        if self._segment is not None:
            self._sealing.append(self._segment)
            self._segment = None

    def _detach_due(self) -> Segment | None:
        """The open segment; one that is due is to be sealed first."""
        with self._lock:
            segment = self._segment
            if segment is not None and segment.events > 0:
                age = time.monotonic() - segment.opened_at
                if segment.torn or segment.events >= self._flush_events or age >= self._flush_seconds:
                    self._detach()
            return self._segment

    def _retry_backlog(self) -> None:
        """A few at a time: `append` waits for the lock."""
        while self._backlog:
            with self._lock:
                for _ in range(min(_RETRY_EVENTS, len(self._backlog))):
                    try:
                        self._write(self._backlog[0])
                    except OSError as e:
                        flush_failed("write", e)
                        return
                    self._backlog.popleft()

    def _settle(self, current: Segment | None) -> list[Segment]:
        """fsync `current`, seal what is detached; those that are not durable now."""
        if current is not None:
            try:
                current.sync()
            except OSError as e:
                flush_failed("fsync", e, current.name)
                with self._lock:
                    if self._segment is current:
                        self._detach()  # it is written anew below; what comes next goes to another file
        failed: list[Segment] = []
        for _ in range(len(self._sealing)):
            segment = self._sealing.popleft()
            try:
                segment.seal()
            except OSError as e:
                flush_failed("seal", e, segment.name)
                failed.append(segment)
        self._sealing.extendleft(reversed(failed))
        if len(failed) >= _MOST_UNSEALED:
            self._unsynced = True
        elif not failed and not self._backlog:
            self._unsynced = False
        return failed

    def _say_what_was_lost(self) -> None:
        with self._lock:
            lost, self._lost = self._lost, 0
        if lost:
            log.error("usage_events_lost", events=lost, cause=self._lost_cause)
