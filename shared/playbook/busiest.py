"""Who and what keeps this machine busy: routes by p95, rate and errors, tenants by their share of them.

Tenants come from the workers' own sketches of the last minute (`gateway.busiest`), routes from the counters that the
workers share, read twice: what is between the two is what happened meanwhile, not since the gateway started.
"""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from msgspec import Meta

from shared import counters, workers
from shared.playbook.action import Context, Finding, Outcome, Request
from shared.workers import Busy

_LISTED = 10
SLOW_MS = 250.0
_JUDGED_REQUESTS = 100  # fewer say nothing about who drowns whom


class Top(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`seconds` between the two looks at the routes; 0: since the gateway was started."""

    seconds: Annotated[float, Meta(ge=0, le=30)] = 5.0


class Route(msgspec.Struct, frozen=True):
    """`slow_ms` is the upper edge of the 95th percentile's bucket: None above the last; 0 when none was timed, because
    none had a good token."""

    route: str
    requests: float
    rps: float
    errors: float
    slow_ms: float | None


def top(context: Context, request: Request, arguments: Top) -> Outcome:
    settings = context.settings
    directory = counters.directory(settings)
    began = counters.by_route(directory) if arguments.seconds else {}
    started = time.monotonic()
    if arguments.seconds:
        time.sleep(arguments.seconds)
        elapsed_seconds = time.monotonic() - started
    else:
        since_us = counters.started_at_us(directory)
        elapsed_seconds = 0.0 if since_us is None else time.time() - since_us / 1e6
    routes = between(began, counters.by_route(directory), elapsed_seconds)
    reports = [report for report in workers.reports(settings).values() if report is not None]
    tenants = together([report.tenants for report in reports])
    window_seconds = max((report.window_seconds for report in reports), default=0.0)
    products = [route for route in routes if route.route.startswith("/v1/")]  # not its probes, nor its operators'
    requests = sum(route.requests for route in products)
    errors = sum(route.errors for route in products)
    slow = [route.route for route in products if route.slow_ms is None or route.slow_ms > SLOW_MS]
    served = sum(report.requests for report in reports)
    share = tenants[0].requests / served if tenants and served else 0.0
    comparable = len(tenants) > 1 and served >= _JUDGED_REQUESTS
    loudest = f"{tenants[0].tenant_id}, {share:.0%} of the requests" if tenants else "none"
    return Outcome(
        action=request.action,
        kind="read",
        target=settings.machine_id,
        summary=f"{requests:.0f} requests in {elapsed_seconds:.0f} s, {errors:.0f} errors; "
        + (f"slow: {', '.join(slow)}" if slow else "no route is slow")
        + f"; busiest tenant: {loudest}",
        findings=[
            Finding("workers", len(reports), "at least 1", bool(reports)),
            Finding("slow routes", slow, f"p95 at most {SLOW_MS:g} ms", not slow),
            Finding("errors", errors, "below 0.5% of the requests", errors <= 0.005 * requests),
            Finding("busiest tenant", loudest, "below half of the requests", share < 0.5 if comparable else None),
        ],
        tables={
            "routes": [msgspec.to_builtins(route) for route in routes[:_LISTED]],
            f"tenants (last {window_seconds:g} s)": [msgspec.to_builtins(tenant) for tenant in tenants[:_LISTED]],
        },
    )


def between(before: dict[str, counters.Route], after: dict[str, counters.Route], elapsed_seconds: float) -> list[Route]:
    """What the routes did meanwhile, the slowest first, then the busiest. Pure."""
    found: list[Route] = []
    for route, now in after.items():
        then = before.get(route, counters.NOTHING)
        requests = now.requests - then.requests
        if requests <= 0:
            continue
        seen = {edge: count - then.buckets.get(edge, 0.0) for edge, count in now.buckets.items()}
        found.append(
            Route(
                route,
                requests,
                round(requests / elapsed_seconds, 2) if elapsed_seconds else 0.0,
                now.errors - then.errors,
                _slow_ms(seen),
            )
        )
    return sorted(found, key=lambda r: (float("-inf") if r.slow_ms is None else -r.slow_ms, -r.requests))


def together(found: list[list[Busy]]) -> list[Busy]:
    """One row a tenant over all workers, most requests first; the slowest worker's p95 is the tenant's."""
    sums: dict[str, Busy] = {}
    for busy in (each for tenants in found for each in tenants):
        other = sums.get(busy.tenant_id)
        if other is None:
            sums[busy.tenant_id] = busy
            continue
        slow = None if None in (busy.slow_ms, other.slow_ms) else max(busy.slow_ms or 0.0, other.slow_ms or 0.0)
        sums[busy.tenant_id] = Busy(
            busy.tenant_id,
            busy.requests + other.requests,
            busy.errors + other.errors,
            busy.refused + other.refused,
            slow,
            round(busy.busy_seconds + other.busy_seconds, 6),
        )
    return sorted(sums.values(), key=lambda b: (-b.requests, b.tenant_id))


def _slow_ms(cumulative: dict[float, float]) -> float | None:
    """Of counts up to each edge in seconds."""
    edges = sorted(cumulative)
    if not edges or not cumulative[edges[-1]]:
        return 0.0
    wanted = 0.95 * cumulative[edges[-1]]
    for edge in edges:
        if cumulative[edge] >= wanted:
            return None if edge == float("inf") else edge * 1_000
    return None
