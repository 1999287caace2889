"""What clients meet: does the gateway answer, how fast, what does it refuse, is the machine up to it."""

from __future__ import annotations

import os
from pathlib import Path

from shared import limits
from shared.diagnosis.finding import Finding, Symptom, bad, good, unseen
from shared.diagnosis.sight import Figures, NotSeen, Sight
from shared.prometheus import Prometheus, PrometheusRefused, PrometheusUnavailable

# Of the SLOs and the six alerts.
P95_SECONDS = 0.25
ERROR_SHARE = 0.01
AUTH_FAILURE_SHARE = 0.02
# Of this product's own limits: a handful of refusals is what limits are for.
REFUSED_SHARE = 0.05
LOAD_PER_CORE = 2.0
MEMORY_SHARE = 0.05
NOISE_RPS = 0.05  # less than three in a minute is not a rate

_DURATION = "engram_request_duration_seconds"
# What a reason of engram_auth_failures_total points at (shared/metrics.py has them all).
_REASONS: dict[str, Symptom] = {
    "unknown_kid": "keys_unknown",
    "signature": "keys_unknown",
    "jwks_unavailable": "keys_unknown",
    "expired": "tokens_refused",
    "not_yet_valid": "tokens_refused",
    "issuer": "tokens_refused",
    "audience": "tokens_refused",
    "claims": "tokens_refused",
    "missing": "tokens_missing",
    "malformed": "tokens_missing",
    "too_large": "tokens_missing",
    "algorithm": "tokens_missing",
}
_ROUTES: dict[str, tuple[str, Symptom]] = {
    "/v1/search": ("p95-search", "searches_slow"),
    "/v1/memories": ("p95-list-and-create", "slow"),
    "/v1/memories/{id}": ("p95-by-id", "slow"),
    "/v1/mcp": ("p95-mcp", "slow"),
}
_NOT_READY: dict[str, Symptom] = {"tenants": "control_plane_down", "jwks": "keys_unknown", "spool": "flush_failures"}


def ready(sight: Sight) -> Finding:
    name, normal = "gateway", "/ready answers 200"
    try:
        answer = sight.gateway("/ready")
    except NotSeen as e:
        return bad(name, str(e), normal, "gateway_down")
    if answer.status_code == 200:
        return good(name, f"ready, in {answer.elapsed.total_seconds() * 1000:.0f} ms", normal)
    try:
        failing = [str(one) for one in answer.json().get("failing", [])]
    except (ValueError, AttributeError):
        failing = []
    if not failing:
        return bad(name, f"/ready answers {answer.status_code}", normal, "gateway_down")
    return bad(name, f"not ready: {', '.join(failing)}", normal, _NOT_READY.get(failing[0], "gateway_down"))


def prometheus(sight: Sight) -> list[Finding]:
    """Without an address there is nothing to check: the figures say where they are from."""
    if not Prometheus.configured(sight.settings):
        return []
    try:
        with Prometheus(sight.settings) as asked:
            asked.value("vector(1)")
    except (PrometheusUnavailable, PrometheusRefused) as e:
        return [unseen("prometheus", e, "answers")]
    return [good("prometheus", "answers", "answers")]


def errors(sight: Sight) -> Finding:
    """5xx, without what is refused on purpose while a tenant is in maintenance."""
    figures, name, normal = sight.figures, "errors", f"5xx below {ERROR_SHARE:.0%} of requests"
    all_rps, failed_rps = _requests(figures)
    failed_rps = max(0.0, failed_rps - figures.rate("engram_maintenance_refused_total"))
    if all_rps == 0:
        return good(name, f"no requests ({figures.window})", normal)
    seen = f"{failed_rps / all_rps:.1%} of {all_rps:.1f} a second ({figures.window})"
    if failed_rps / all_rps > ERROR_SHARE:
        return bad(name, seen, normal, "errors")
    return good(name, seen, normal)


def latency(sight: Sight) -> list[Finding]:
    """p95 of searches and of everything else."""
    figures, found = sight.figures, []
    for route, (name, symptom) in _ROUTES.items():
        normal = f"below {P95_SECONDS * 1000:.0f} ms"
        p95 = figures.quantile(_DURATION, 0.95, route=route)
        if p95 is None:
            found.append(good(name, f"no requests with a good token ({figures.window})", normal))
            continue
        seen = f"{p95 * 1000:,.0f} ms ({figures.window})"
        found.append(good(name, seen, normal) if p95 < P95_SECONDS else bad(name, seen, normal, symptom))
    return found


def refusals(sight: Sight) -> list[Finding]:
    """429 and shed 503."""
    figures, found = sight.figures, []
    all_rps, _ = _requests(figures)
    limited, shed = figures.rate("engram_rate_limited_total"), figures.rate("engram_shed_total")
    for name, rps, symptom in (("rate-limited", limited, "rate_limited"), ("shed", shed, "machine_busy")):
        normal = f"below {REFUSED_SHARE:.0%} of requests"
        seen = f"{rps:.2g} of {all_rps:.1f} a second ({figures.window})"
        if rps <= NOISE_RPS or rps <= REFUSED_SHARE * all_rps:
            found.append(good(name, seen, normal))
        elif name == "shed" and (active := limits.standing(sight.settings)[0].get("shed")):
            found.append(good(name, f"{seen}, as an operator asked: {active.reason}", normal))
        else:
            found.append(bad(name, seen, normal, symptom))  # type: ignore[arg-type]  # two literals of Symptom
    return found


def auth_failures(sight: Sight) -> Finding:
    """401 by reason; the reason with the most decides what it points at."""
    figures, name, normal = sight.figures, "auth-failures", f"401 below {AUTH_FAILURE_SHARE:.0%} of requests"
    by_reason = figures.by("engram_auth_failures_total", "reason")
    all_rps, _ = _requests(figures)
    failed_rps = sum(by_reason.values())
    said = ", ".join(f"{reason} {rps:.2g}/s" for reason, rps in sorted(by_reason.items(), key=lambda r: -r[1])[:4])
    if failed_rps > NOISE_RPS and failed_rps > AUTH_FAILURE_SHARE * max(all_rps, failed_rps):
        most: dict[Symptom, float] = {}
        for reason, rps in by_reason.items():
            symptom = _REASONS.get(reason, "tokens_refused")
            most[symptom] = most.get(symptom, 0.0) + rps
        return bad(
            name, f"{said} of {all_rps:.1f} a second ({figures.window})", normal, max(most, key=most.__getitem__)
        )
    total = sum(figures.totals("engram_auth_failures_total", "reason").values())
    return good(name, f"{said or 'none'} ({figures.window}); {total:,.0f} since the gateway's counters began", normal)


def open_failures(sight: Sight) -> Finding:
    figures, name = sight.figures, "open-failures"
    rps, total = figures.rate("engram_db_open_failures_total"), figures.total("engram_db_open_failures_total")
    seen = f"{rps:.2g} a second ({figures.window}); {total:,.0f} since the gateway's counters began"
    if rps > 0:
        return bad(name, seen, "none", "open_failures", tenant_id=sight.tenant_id)
    return good(name, seen, "none")


def workers(sight: Sight) -> Finding:
    name = "workers"
    silent = sight.figures.gauge("engram_worker_oldest_beat_seconds")
    longest = sight.settings.worker_silence_seconds
    normal = f"each beats within {longest:g} s, none restarts" if longest else "none restarts"
    if silent is None:
        return unseen(name, "the gateway does not say when its workers beat", normal)
    restarts = sight.figures.rate("engram_worker_restarts_total")
    seen = f"the most silent for {silent:.1f} s, {sight.figures.total('engram_worker_restarts_total'):.0f} restarts"
    if (longest and silent > longest) or restarts > 0:
        return bad(name, seen, normal, "worker_silent")
    return good(name, seen, normal)


def machine(sight: Sight) -> list[Finding]:
    """Load and memory of this machine. Load alone harms nobody: it is wrong while requests are slow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    found = []
    seen, normal = f"{load:.1f} on {cores} cores (1 min)", f"below {LOAD_PER_CORE:g} a core while requests are slow"
    high = load > LOAD_PER_CORE * cores and is_slow(sight.figures)
    found.append(bad("load", seen, normal, "machine_busy") if high else good("load", seen, normal))
    memory = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    }
    free, all_ = memory["MemAvailable"], memory["MemTotal"]
    seen, normal = f"{free / all_:.0%} of {all_ >> 20:,} MiB available", f"above {MEMORY_SHARE:.0%}"
    short = free < MEMORY_SHARE * all_
    found.append(bad("memory", seen, normal, "memory_short") if short else good("memory", seen, normal))
    return found


def is_slow(figures: Figures) -> bool:
    """Whether any of the routes that are measured against the SLO misses it."""
    found = (figures.quantile(_DURATION, 0.95, route=route) for route in _ROUTES)
    return any(p95 is not None and p95 >= P95_SECONDS for p95 in found)


def _requests(figures: Figures) -> tuple[float, float]:
    """All requests of clients, and those answered 5xx, a second. Not /ready, which says 503 while a worker starts;
    the rules count the same."""
    by_status = figures.by("engram_requests_total", "status", routes="/v1/")
    return sum(by_status.values()), sum(rps for status, rps in by_status.items() if status.startswith("5"))
