"""metering: collect → drain → report. One run takes everything there is, and what comes while it works.

The resident drain (`flows.drain`) starts a run in its own process when segments are waiting, so usage arrives in
seconds and an idle hour has no runs; the deployment is there for a person who wants one now.
"""

import time
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from pydantic import Field

from flows import artifact, policy
from flows.core import configuration, control_plane
from shared import metering as core
from shared.usage_audit import Drained


@task(name="collect", **policy.READ)
def collect() -> list[Path]:
    return core.pending(configuration())


@task(name="drain", **policy.READ)
def drain(segments: list[Path], linger_seconds: float, run_seconds: float) -> list[Drained]:
    """Drain `segments`, then whatever is sealed until nothing came for `linger_seconds`."""
    settings, log = configuration(), get_run_logger()
    drained: list[Drained] = []
    end = time.monotonic() + run_seconds
    quiet_since = time.monotonic()
    while True:
        for one in core.drain(control_plane(), settings, segments):
            drained.append(one)
            quiet_since = time.monotonic()
        now = time.monotonic()
        if now >= end or now - quiet_since >= linger_seconds:
            break
        time.sleep(min(settings.drain_poll_seconds, linger_seconds))
        segments = core.pending(settings)
    log.info("%d segments, %d events", len(drained), sum(d.events for d in drained))
    return drained


@task(name="report", **policy.READ)
def report(drained: list[Drained]) -> dict[str, Any]:
    totals = {
        "segments": len(drained),
        "events": sum(d.events for d in drained),
        "inserted": sum(d.inserted for d in drained),
        "duplicates": sum(d.duplicates for d in drained),
        "quarantined": sum(d.quarantined for d in drained),
        "corrupt bytes": sum(d.corrupt_bytes for d in drained),
        "oldest event in seconds": max((d.age_seconds for d in drained), default=0.0),
        "segments of dry runs, not billed": len(core.dry_run_segments(configuration())),
    }
    done = (
        "would have been new: dry run, nothing inserted"
        if any(d.dry_run for d in drained)
        else "were new and are in the rollups"
    )
    artifact.report(
        "metering",
        "Metering",
        f"{totals['inserted']} of {totals['events']} events {done}",
        totals,
        artifact.table(
            ("segment", "events", "inserted", "duplicates", "quarantined", "corrupt_bytes"),
            ((d.segment, d.events, d.inserted, d.duplicates, d.quarantined, d.corrupt_bytes) for d in drained[:200]),
        ),
    )
    return totals


@flow(name="metering", flow_run_name="metering", **policy.FLOW)
def metering(
    linger_seconds: Annotated[float, Field(ge=0, le=600)] = 0.0,
    run_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0,
) -> dict[str, Any]:
    """Bring the usage spool of this machine into PostgreSQL, each event counted once.

    Args:
        linger_seconds: End when nothing came for this many seconds.
        run_seconds: End after this many seconds at the latest.
    """
    return report(drain(collect(), linger_seconds, run_seconds))
