"""`engram monitor`: the parts of `deployments.monitoring` on a machine of their own, all of them or none.

Nothing is started again here: a part that dies ends the process, and who supervises it (Fly.io, systemd) starts all of
them anew. Until then the dead man's switch hears nothing, which is right: half of a monitoring is none.
"""

from __future__ import annotations

import os
import signal
import threading

from deployments import monitoring
from deployments.bridge import ensure_token
from deployments.process import Child, Interrupted, rotate
from shared.log import get_logger
from shared.settings import Settings

log = get_logger("monitor")
_WATCH_SECONDS = 1.0


def run(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises `StartFailed` when a part does not start or dies; then, too, all are stopped."""
    settings.require("prefect_api_url", "monitoring_targets", "monitoring_probe_urls")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    ensure_token(settings)  # before Alertmanager and the bridge read it
    environment = {**os.environ, "ENGRAM_DATA_DIR": str(settings.data_dir), "PYTHONSAFEPATH": "1"}
    parts = [child for child, _ in monitoring.children(settings, environment, gateway_url="")]

    def give_up() -> None:
        if stopping.is_set():
            raise Interrupted("stopped before it was ready")

    started: list[Child] = []
    try:
        for child in parts:
            rotate(settings.data_dir / "logs" / f"{child.name}.log")
            child.start()
            started.append(child)
        for child in parts:
            child.wait_ready(settings.start_timeout_seconds, give_up)
        log.info("monitoring_started", parts=[child.name for child in parts])
        while not stopping.wait(_WATCH_SECONDS):
            for child in parts:
                if not child.alive():
                    raise child.failure(f"died ({child.exit_reason()})")
    except Interrupted:
        pass  # as it was asked to
    finally:
        for child in reversed(started):
            child.stop(settings.stop_timeout_seconds)
    log.info("monitoring_stopped")
