"""The resident process of a machine: the drain, and beside it the sweep of dead restores and the storage gauge.

It watches the spool and runs the `metering` flow in this process when something waits.

A run through the process worker takes about ten seconds to start here, one in process about one: so this process
stays. A run lasts `drain_run_seconds` while there is traffic, however little, so there is never more than one in that
time, and none at idle. When Prefect does not answer, usage must not wait for it: the core drains directly and says so.
When PostgreSQL does not, segments stay on disk, and each machine waits a random part of a doubling time up to 15
seconds (`shared.backoff`), so that a fleet does not come back in one second.
"""

import signal
import threading
import time
from types import FrameType

import httpx
import psycopg

from flows.core import control_plane
from flows.metering import metering, stopping, watermark
from shared import log as logs
from shared import metering as core
from shared import storage
from shared import sweep as core_sweep
from shared.backoff import Backoff
from shared.errors import ControlPlaneUnavailable, EngramError
from shared.log import get_logger
from shared.settings import Settings

_FAULTS = (EngramError, OSError, psycopg.Error)
log = get_logger("drain")
_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS = 1.0, 15.0


def main(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain once more and return."""
    logs.configure(settings.log_level)
    stop = stopping
    stop.clear()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    wait, backoff = settings.drain_poll_seconds, Backoff(_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS)
    sweeper = threading.Thread(target=_sweep, args=(settings, stop), name="sweep", daemon=True)
    sweeper.start()
    log.info("drain_started", spool=str(settings.spool_dir))
    while not stop.wait(wait):
        wait = _next_wait(settings, backoff)
    try:
        _drain_directly(settings)
    except _FAULTS as e:
        log.error("drain_stopped_with_segments_left", segments=len(core.pending(settings)), cause=str(e))
    log.info("drain_stopped")


def _sweep(settings: Settings, stop: threading.Event) -> None:
    """Look for dead restores from the start on, in a thread: a long drain must not keep a tenant waiting.

    The control plane is asked when the disk shows a trace, and once in a lease time: a restore that could not
    reach it at its end leaves a lease and no trace. How many bytes the tenants keep is measured here too.
    """
    asked_at = measured_at = float("-inf")
    while True:
        try:
            if core_sweep.sweep_disk(settings):
                asked_at = float("-inf")
            if time.monotonic() - asked_at >= settings.lease_seconds:
                core_sweep.sweep_records(settings, control_plane())
                asked_at = time.monotonic()
            if time.monotonic() - measured_at >= settings.usage_storage_seconds:
                measured = storage.measure(control_plane(), settings)
                measured_at = time.monotonic()
                log.info("storage_measured", tenants=measured.tenants, storage_bytes=measured.storage_bytes)
        except _FAULTS as e:
            log.error("sweep_failed", cause=str(e))
        if stop.wait(settings.sweep_seconds):
            return


def _next_wait(settings: Settings, backoff: Backoff) -> float:
    """Drain if there is something; the seconds to wait before looking again."""
    try:
        if core.pending(settings):
            control_plane().ping()
            _drain_visibly(settings)
        else:
            watermark.after_pass(control_plane(), settings, drained=False)
    except _FAULTS as e:
        wait = backoff.next_seconds()
        event = "control_plane_unavailable" if isinstance(e, ControlPlaneUnavailable) else "drain_failed"
        log.error(event, cause=" ".join(str(e).split())[:300], retry_seconds=round(wait, 1))
        return wait
    backoff.reset()
    return settings.drain_poll_seconds


def _drain_visibly(settings: Settings) -> None:
    if not _prefect_answers(settings):
        log.warning("prefect_unavailable", drained="directly")
        _drain_directly(settings)
        return
    try:
        state = metering(
            linger_seconds=settings.drain_linger_seconds, run_seconds=settings.drain_run_seconds, return_state=True
        )
        cause = None if state.is_completed() else f"{state.name}: {state.message}"
    except Exception as e:  # noqa: BLE001 - a server that dies in the middle of a run: usage does not wait for it
        cause = f"{type(e).__name__}: {e}"
    if cause is not None:
        log.error("metering_run_failed", cause=" ".join(cause.split())[:300])
        _drain_directly(settings)


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
