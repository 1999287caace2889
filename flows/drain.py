"""The resident process of a machine: the drain, and beside it the sweep of dead restores and the storage gauge.

It watches the spool and runs the `metering` flow in this process when something waits.

A run through the process worker takes about ten seconds to start here, one in process about one: so this process
stays. A run lasts `drain_run_seconds` while there is traffic, however little, so there is never more than one in that
time, and none at idle. When Prefect does not answer, or stops to in the middle of a run, usage does not wait for it:
the core drains directly and says so. (Measured, a server frozen for two minutes in mid-run: the newest row was never
older than 6.7 s.) When PostgreSQL does not answer, segments stay on disk, and each machine waits a random part of a
doubling time up to 15 seconds (`shared.backoff`), so that a fleet does not come back in one second.
"""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from types import FrameType

import httpx
import psycopg

from flows.core import control_plane
from flows.metering import heart, metering, stopping, watermark
from shared import log as logs
from shared import metering as core
from shared import move_settle, storage
from shared import sweep as core_sweep
from shared.backoff import Backoff
from shared.errors import ControlPlaneUnavailable, EngramError
from shared.log import get_logger
from shared.settings import Settings

_FAULTS = (EngramError, OSError, psycopg.Error)
log = get_logger("drain")
_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS = 1.0, 15.0
_SILENT_SECONDS = 4.0  # of a run that neither drains nor looks; the core drains beside it then, which is safe


def main(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain once more and return.

    The work is done in a thread: in the main one Prefect would take SIGTERM for itself while a run lasts, and end this
    process by an exception before the last drain.
    """
    logs.configure(settings.log_level)
    stopping.clear()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    with suppress(EngramError):  # whoever asks it is told
        control_plane()  # one for all threads, which would each make their own at once; it does not connect yet
    threading.Thread(target=_sweep, args=(settings, stopping), name="sweep", daemon=True).start()
    threading.Thread(target=_measure, args=(settings, stopping), name="storage", daemon=True).start()
    with ThreadPoolExecutor(1, thread_name_prefix="drain") as thread:
        work = thread.submit(_drain_until_stopped, settings)
        while not wait([work], timeout=0.5).done:  # short, so that a signal is handled in between
            pass
        work.result()
    log.info("drain_stopped")


class VisibleRun:
    """The flow run of this process, in a thread that nobody has to wait for: a server that stops answering holds a run
    for minutes. There is never a second one beside it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: list[str] = []

    def start(self, settings: Settings) -> None:
        heart.beat()
        self._failed = []
        self._thread = threading.Thread(target=_run, args=(settings, self._failed), name="metering", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def failure(self) -> str | None:
        """Why the last run did not complete; told once."""
        return self._failed.pop() if self._failed and not self.alive else None


def _drain_until_stopped(settings: Settings) -> None:
    run = VisibleRun()
    pause, backoff = settings.drain_poll_seconds, Backoff(_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS)
    log.info("drain_started", spool=str(settings.spool_dir))
    while not stopping.wait(pause):
        pause = _next_wait(settings, backoff, run)
    try:
        _drain_directly(settings)
    except _FAULTS as e:
        log.error("drain_stopped_with_segments_left", segments=len(core.pending(settings)), cause=str(e))


def _sweep(settings: Settings, stop: threading.Event) -> None:
    """Look for dead restores and moves from the start on, in a thread: a long drain must not keep a tenant waiting.

    The control plane is asked when the disk shows a trace, and once in a lease time: a restore that could not
    reach it at its end leaves a lease and no trace.
    """
    asked_at = float("-inf")
    while True:
        try:
            if core_sweep.sweep_disk(settings):
                asked_at = float("-inf")
            if time.monotonic() - asked_at >= settings.lease_seconds:
                core_sweep.sweep_records(settings, control_plane())
                move_settle.sweep_moves(settings, control_plane())
                asked_at = time.monotonic()
        except _FAULTS as e:
            log.error("sweep_failed", cause=str(e))
        except Exception as e:  # nobody would miss this thread before a tenant stays locked
            log.error("sweep_failed", cause=str(e), exc_info=e)
        if stop.wait(settings.sweep_seconds):
            return


def _measure(settings: Settings, stop: threading.Event) -> None:
    """Measure how many bytes the tenants keep, in a thread: to open thousands of databases must not keep the sweep from
    the disk. What fails is tried again as soon as a sweep would be."""
    last: dict[str, storage.Measurement] = {}
    while True:
        pause = settings.sweep_seconds
        try:
            measured = storage.measure(control_plane(), settings, last)
            log.info("storage_measured", tenants=measured.tenants, storage_bytes=measured.storage_bytes)
            pause = settings.usage_storage_seconds
        except _FAULTS as e:
            log.error("storage_failed", cause=str(e))
        except Exception as e:  # nobody would miss this thread before a bill is wrong
            log.error("storage_failed", cause=str(e), exc_info=e)
        if stop.wait(pause):
            return


def _next_wait(settings: Settings, backoff: Backoff, run: VisibleRun) -> float:
    """Drain if there is something; the seconds to wait before looking again."""
    try:
        if core.pending(settings):
            control_plane().ping()
            _drain_visibly(settings, run)
        else:
            watermark.after_pass(control_plane(), settings, drained=False)
    except _FAULTS as e:
        pause = backoff.next_seconds()
        event = "control_plane_unavailable" if isinstance(e, ControlPlaneUnavailable) else "drain_failed"
        log.error(event, cause=" ".join(str(e).split())[:300], retry_seconds=round(pause, 1))
        return pause
    backoff.reset()
    return settings.drain_poll_seconds


def _drain_visibly(settings: Settings, run: VisibleRun) -> None:
    """Beside a run that is silent, and after one that failed, usage is drained directly."""
    if not run.alive:
        if not _prefect_answers(settings):
            log.warning("prefect_unavailable", drained="directly")
            _drain_directly(settings)
            return
        run.start(settings)
    while run.alive and not (stopping.is_set() and heart.silent_seconds() > _SILENT_SECONDS):
        run.wait(settings.drain_poll_seconds)
        if run.alive and heart.silent_seconds() > _SILENT_SECONDS and core.pending(settings):
            log.warning("metering_run_silent", drained="directly")
            _drain_directly(settings)
    if (cause := run.failure()) is not None:
        log.error("metering_run_failed", cause=cause)
        _drain_directly(settings)


def _run(settings: Settings, failed: list[str]) -> None:
    """One visible run; `failed` takes its cause when it does not complete."""
    try:
        state = metering(
            linger_seconds=settings.drain_linger_seconds, run_seconds=settings.drain_run_seconds, return_state=True
        )
        cause = None if state.is_completed() else f"{state.name}: {state.message}"
    except Exception as e:  # noqa: BLE001 - a server that dies in the middle of a run: usage does not wait for it
        cause = f"{type(e).__name__}: {e}"
    if cause is not None:
        failed.append(" ".join(cause.split())[:300])


def _drain_directly(settings: Settings) -> None:
    segments = events = inserted = 0
    try:
        for drained in core.drain_all(control_plane(), settings):
            segments, events, inserted = segments + 1, events + drained.events, inserted + drained.inserted
        watermark.after_pass(control_plane(), settings, drained=segments > 0)
    finally:
        if segments:
            log.info("segments_drained", segments=segments, events=events, inserted=inserted)


def _prefect_answers(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.prefect_api_url.rstrip('/')}/health", timeout=2.0).is_success
    except httpx.HTTPError:
        return False
