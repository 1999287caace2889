"""metering: collect → drain → report. One run takes everything there is, and what comes while it works.

The resident drain (`flows.drain`) starts a run in its own process when segments are waiting, so usage arrives in
seconds and an idle hour has no runs; the deployment is there for a person who wants one now, on every machine.

A run counts what it drained whatever happens in the middle of it: a control plane that goes away is asked again a few
times, and then the run is Failed with the counts of what was committed until then.
"""

import threading
import time
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from pydantic import Field

from flows import artifact, machine, policy
from flows.core import configuration, control_plane
from shared import dry_run, stuck
from shared import metering as core
from shared.backoff import Backoff
from shared.errors import ControlPlaneUnavailable, Permanent
from shared.receipt import Receipt
from shared.usage_audit import Drained
from shared.watermark import Watermark

_TRIES = 4
_BACKLOG = 200  # segments; from there on a run has a progress bar

stopping = threading.Event()  # the process that holds this run wants to end
watermark = Watermark()


class Heart:
    """Beats while a run of this process drains: one that waits for a Prefect server that does not answer is silent."""

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        self._at = time.monotonic()

    def silent_seconds(self) -> float:
        return time.monotonic() - self._at


heart = Heart()


class Taken(Receipt, frozen=True):
    """What a run drained; `error` is why it ended early."""

    drained: list[Drained]
    error: str | None


@task(name="collect", **policy.READ)
def collect() -> list[Path]:
    return core.pending(configuration())


@task(name="drain", **policy.ONCE)
def drain(segments: list[Path], linger_seconds: float, run_seconds: float) -> Taken:
    """Drain `segments`, then whatever is sealed until nothing came for `linger_seconds`."""
    settings, log = configuration(), get_run_logger()
    drained: list[Drained] = []
    backoff, failures, error = Backoff(1.0, 8.0), 0, None
    progress: artifact.Progress | None = None
    end = time.monotonic() + run_seconds
    quiet_since = time.monotonic()
    while True:
        heart.beat()
        pause = min(settings.drain_poll_seconds, linger_seconds)
        try:
            before, total = len(drained), len(drained) + len(segments)
            if progress is None and len(segments) > _BACKLOG:
                progress = artifact.Progress("metering-progress", "segments drained of those that waited")
            for one in core.drain(control_plane(), settings, segments):
                drained.append(one)
                heart.beat()
                quiet_since = time.monotonic()
                if progress is not None:
                    progress.show(len(drained), total)
                if stopping.is_set():
                    break
            watermark.after_pass(control_plane(), settings, drained=len(drained) > before)
            failures = 0
            backoff.reset()
        except ControlPlaneUnavailable as e:
            failures += 1
            if failures == _TRIES:
                error = str(e)
                break
            log.warning("the control plane is asked again: %s", e)
            pause = backoff.next_seconds()
        now = time.monotonic()
        if failures == 0 and (now >= end or now - quiet_since >= linger_seconds):
            break
        if stopping.wait(pause):
            break
        segments = core.pending(settings)
    log.info("%d segments, %d events", len(drained), sum(d.events for d in drained))
    return Taken(drained, error)


@task(name="report", **policy.READ)
def report(taken: Taken, elsewhere: dict[str, str]) -> dict[str, Any]:
    settings, drained = configuration(), taken.drained
    totals = {
        "segments": len(drained),
        "events": sum(d.events for d in drained),
        "inserted": sum(d.inserted for d in drained),
        "duplicates": sum(d.duplicates for d in drained),
        "quarantined": sum(d.quarantined for d in drained),
        "corrupt bytes": sum(d.corrupt_bytes for d in drained),
        "oldest event in seconds": max((d.age_seconds for d in drained), default=0.0),
        "segments that cannot be drained": len(stuck.segments(settings.spool_dir)),
        "segments of dry runs, not billed": len(dry_run.segments(settings)),
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
        {"machine": settings.machine_id, **totals},
        *([artifact.table(("other machine", "its run"), elsewhere.items())] if elsewhere else []),
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
    all: bool = False,
    machine_id: Annotated[str, Field(max_length=100)] | None = None,
) -> dict[str, Any]:
    """Bring usage spools into PostgreSQL, each event counted once.

    Args:
        linger_seconds: End when nothing came for this many seconds.
        run_seconds: End after this many seconds at the latest.
        all: The spool of every machine, by a run on each. Off is the one machine that takes up this run.
        machine_id: The spool of this machine alone.
    """
    mine = configuration().machine_id
    wanted = [machine_id] if machine_id else machine.every() if all else [mine]
    parameters = {"linger_seconds": linger_seconds, "run_seconds": run_seconds}
    started = [machine.start("metering", m, {**parameters, "machine_id": m}) for m in wanted if m != mine]
    taken = drain(collect(), linger_seconds, run_seconds) if mine in wanted else Taken([], None)
    failed = [cause for other in started if (cause := machine.wait(other)) is not None]
    totals = report(taken, {other.machine_id: other.url for other in started})
    if taken.error is not None:
        raise ControlPlaneUnavailable(taken.error)
    if failed:
        raise Permanent("; ".join(failed))
    return totals
