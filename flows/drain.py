"""The resident process of a machine: the drain, and beside it the sweep of dead restores.

It watches the spool and runs the `metering` flow in this process when something waits.

A run through the process worker takes about ten seconds to start here, one in process about one: so this process
stays. It is a visible run when Prefect answers. When Prefect does not, usage must not wait for it: the core drains
directly and says so. When PostgreSQL does not, segments stay on disk and the wait doubles up to 30 seconds.
"""

import signal
import threading
import time
from types import FrameType

import httpx
import psycopg

from flows.core import control_plane
from flows.metering import metering
from shared import log as logs
from shared import metering as core
from shared import sweep as core_sweep
from shared.errors import ControlPlaneUnavailable, EngramError
from shared.log import get_logger
from shared.settings import Settings

log = get_logger("drain")
_MAX_WAIT_SECONDS = 30.0


def main(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain once more and return."""
    logs.configure(settings.log_level)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    wait = settings.drain_poll_seconds
    sweeper = threading.Thread(target=_sweep, args=(settings, stop), name="sweep", daemon=True)
    sweeper.start()
    log.info("drain_started", spool=str(settings.spool_dir))
    while not stop.wait(wait):
        wait = _next_wait(settings, wait)
    try:
        _drain_directly(settings)
    except ControlPlaneUnavailable as e:
        log.error("drain_stopped_with_segments_left", segments=len(core.pending(settings)), cause=str(e))
    log.info("drain_stopped")


def _sweep(settings: Settings, stop: threading.Event) -> None:
    """Look for dead restores from the start on, in a thread: a long drain must not keep a tenant waiting.

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
                asked_at = time.monotonic()
        except (EngramError, OSError, psycopg.Error) as e:
            log.error("sweep_failed", cause=str(e))
        if stop.wait(settings.sweep_seconds):
            return


def _next_wait(settings: Settings, wait: float) -> float:
    """Drain if there is something; the seconds to wait before looking again."""
    if not core.pending(settings):
        return settings.drain_poll_seconds
    try:
        control_plane().ping()
        _drain_visibly(settings)
    except ControlPlaneUnavailable as e:
        wait = min(_MAX_WAIT_SECONDS, max(1.0, wait * 2))
        log.error("control_plane_unavailable", cause=str(e), retry_seconds=wait)
        return wait
    return settings.drain_poll_seconds


def _drain_visibly(settings: Settings) -> None:
    if not _prefect_answers(settings):
        log.warning("prefect_unavailable", drained="directly")
        _drain_directly(settings)
        return
    state = metering(
        linger_seconds=settings.drain_linger_seconds, run_seconds=settings.drain_run_seconds, return_state=True
    )
    if not state.is_completed():
        log.error("metering_run_failed", state=state.name, cause=str(state.message)[:300])
        time.sleep(settings.drain_poll_seconds)
        _drain_directly(settings)


def _drain_directly(settings: Settings) -> None:
    for drained in core.drain_all(control_plane(), settings):
        log.info("segment_drained", segment=drained.segment, events=drained.events, inserted=drained.inserted)


def _prefect_answers(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.prefect_api_url.rstrip('/')}/health", timeout=2.0).is_success
    except httpx.HTTPError:
        return False
