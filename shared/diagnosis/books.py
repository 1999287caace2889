"""Usage on its way: the control plane, the spool on this machine's disk, what the gateway says of its own writes."""

from __future__ import annotations

import time

from shared import spool_dir
from shared.diagnosis.finding import Finding, bad, good
from shared.diagnosis.sight import Sight
from shared.errors import ControlPlaneUnavailable

LATE_SECONDS = 60.0  # the resident drain takes seconds; a run of it lasts so long at the most
FEW_DAYS = 2


def control_plane(sight: Sight) -> Finding:
    begun = time.monotonic()
    try:
        sight.control_plane.ping()
    except ControlPlaneUnavailable as e:
        return bad("control-plane", str(e), "answers", "control_plane_down")
    return good("control-plane", f"answers, in {(time.monotonic() - begun) * 1000:.0f} ms", "answers")


def spool(sight: Sight) -> list[Finding]:
    """One look at the directory."""
    settings = sight.settings
    if not settings.spool_dir.is_dir():
        return [good("spool", "there is none: no gateway ran here", "drained within seconds")]
    seen = spool_dir.survey(settings.spool_dir)
    found = []
    said, normal = f"{seen.oldest_age_seconds:,.0f} s", f"oldest event younger than {LATE_SECONDS:g} s"
    late = seen.oldest_age_seconds > LATE_SECONDS
    found.append(bad("spool-age", said, normal, "usage_late") if late else good("spool-age", said, normal))
    share = seen.size_bytes / settings.usage_spool_limit_bytes
    said, normal = f"{seen.size_bytes:,} bytes, {share:.0%} of the limit", "below half of the limit"
    found.append(
        bad("spool-size", said, normal, "spool_half_full") if share > 0.5 else good("spool-size", said, normal)
    )
    for name, count, symptom in (
        ("stuck-segments", seen.stuck, "segments_stuck"),
        ("quarantined-segments", seen.quarantined, "segments_quarantined"),
    ):
        said = f"{count} segments"
        found.append(bad(name, said, "none", symptom) if count else good(name, said, "none"))  # type: ignore[arg-type]
    return found


def writes(sight: Sight) -> list[Finding]:
    """Failed writes and losses, as the gateway counts them."""
    figures, found = sight.figures, []
    rps, total = figures.rate("engram_usage_flush_failures_total"), figures.total("engram_usage_flush_failures_total")
    said = f"{rps:.2g} a second ({figures.window}); {total:,.0f} since the gateway's counters began"
    found.append(
        bad("usage-writes", said, "none fails", "flush_failures") if rps else good("usage-writes", said, "none fails")
    )
    lost = figures.total("engram_usage_lost_total")
    said = f"{lost:,.0f} events since the gateway's counters began"
    found.append(bad("usage-lost", said, "none", "usage_lost") if lost else good("usage-lost", said, "none"))
    return found


def partitions(sight: Sight) -> Finding:
    row = sight.control_plane.row("fleet_ages") or {}
    ahead = row.get("usage_partitions_ahead_days")
    ahead = -1 if ahead is None else int(ahead)
    seen = f"{ahead} days ahead" if ahead >= 0 else "none for today"
    normal = f"{sight.settings.usage_partitions_ahead_days} days ahead"
    few = ahead < min(FEW_DAYS, sight.settings.usage_partitions_ahead_days)
    return bad("partitions", seen, normal, "partitions_missing") if few else good("partitions", seen, normal)
