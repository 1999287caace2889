"""What the dashboard shows: its rows, and the panels of each.

A query names metrics of shared/metrics.py or recording rules of deployments/prometheus/rules; a test runs each against
a Prometheus that scraped a gateway. A panel that belongs to an alert names its runbook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

_API = 'route=~"/v1/.*"'
_RATE = "[$__rate_interval]"


class Panel(NamedTuple):
    """`queries` by legend. `limit` is drawn as a line, red on that `side` of it. `width` of 24."""

    title: str
    queries: Mapping[str, str]
    about: str
    unit: str = "short"
    limit: float | None = None
    side: Literal["above", "below"] = "above"
    kind: Literal["lines", "number"] = "lines"
    width: int = 8


def _number(title: str, query: str, about: str, unit: str, limit: float, side: Literal["above", "below"]) -> Panel:
    return Panel(title, {"": query}, about, unit, limit, side, "number", 6)


ROWS: Mapping[str, tuple[Panel, ...]] = {
    "Service levels and error budgets": (
        *(
            _number(
                f"Budget left: {slo}",
                f'engram:slo:budget_remaining30d{{slo="{slo}"}}',
                f"{promise} Of 30 days; 0 is spent. `engram slo-report` says when it will be.",
                "percentunit",
                0.1,
                "below",
            )
            for slo, promise in (
                ("availability", "99.9% of requests are served."),
                ("latency", "95% of requests within 250 ms."),
                ("errors", "Less than 0.5% server errors."),
                ("auth", "Less than 2% refused for their token."),
            )
        ),
        Panel(
            "Budget left",
            {"{{slo}}": "engram:slo:budget_remaining30d"},
            "How the budgets went.",
            "percentunit",
            0,
            "below",
        ),
        Panel(
            "Burn of the last hour",
            {"{{slo}}": "engram:slo:burn_rate1h"},
            "1 spends the budget in 30 days; 14.4 wakes somebody. Runbooks *-burn-fast.md.",
            limit=14.4,
        ),
        Panel(
            "Burn of the last three days",
            {"{{slo}}": "engram:slo:burn_rate3d"},
            "Above 1 the budget will be spent. Runbooks *-burn-slow.md.",
            limit=1,
        ),
    ),
    "Traffic": (
        Panel(
            "Requests by route",
            {"{{route}}": f"sum by (route) (rate(engram_requests_total{{{_API}}}{_RATE}))"},
            "What clients ask for.",
            "reqps",
        ),
        Panel(
            "Answers by status",
            {"{{status}}": f"sum by (status) (rate(engram_requests_total{{{_API}}}{_RATE}))"},
            "2xx served, 4xx the caller's, 5xx ours.",
            "reqps",
        ),
        Panel(
            "Reached from outside",
            {
                "probe": "engram:probe:success",
                "{{instance}} scraped": 'up{job="engram-gateway"}',
            },
            "0: the gateway does not answer. Runbook gateway-down.md.",
            "percentunit",
            1,
            "below",
        ),
    ),
    "Latency": (
        Panel(
            "p50, p95, p99",
            {
                f"p{q}": f"histogram_quantile(0.{q}, sum by (le) "
                f"(rate(engram_request_duration_seconds_bucket{{{_API}}}{_RATE})))"
                for q in (50, 95, 99)
            },
            "An alert above 500 ms at p95. Runbook high-latency.md.",
            "s",
            0.5,
        ),
        Panel(
            "p95 by route",
            {
                "{{route}}": "histogram_quantile(0.95, sum by (le, route) "
                f"(rate(engram_request_duration_seconds_bucket{{{_API}}}{_RATE})))"
            },
            "Which route is slow. `engram act top` says which tenants.",
            "s",
            0.5,
        ),
        Panel(
            "Slower than 250 ms",
            {"share": "1 - engram:latency:ratio_rate5m"},
            "5% are allowed.",
            "percentunit",
            0.05,
        ),
    ),
    "Errors": (
        Panel(
            "Server errors",
            {"share": "engram:errors:ratio_rate5m"},
            "An alert above 1% for 5 minutes; maintenance is left out. Runbook high-error-rate.md.",
            "percentunit",
            0.01,
        ),
        Panel(
            "Server errors by route and status",
            {"{{route}} {{status}}": f'sum by (route, status) (rate(engram_requests_total{{status=~"5.."}}{_RATE}))'},
            "503 is maintenance, shed or a database that cannot be opened; 507 a full disk; 500 a fault of ours.",
            "reqps",
        ),
        Panel(
            "Refused for maintenance",
            {"{{route}}": f"sum by (route) (rate(engram_maintenance_refused_total{_RATE}))"},
            "Planned, and in no budget.",
            "reqps",
        ),
    ),
    "Tokens": (
        Panel(
            "Refused tokens by reason",
            {"{{reason}}": f"sum by (reason) (rate(engram_auth_failures_total{_RATE})) > 0"},
            "Runbook auth-failures.md.",
            "reqps",
        ),
        Panel(
            "Refused tokens and what is usual",
            {
                "now": "engram:auth_failures:rate5m",
                "three times usual": "3 * engram:auth_failures:baseline1d",
            },
            "An alert above three times the median of the last day.",
            "reqps",
        ),
        Panel(
            "Fetches of the issuer's keys",
            {"{{outcome}}": f"sum by (outcome) (increase(engram_jwks_fetch_total{_RATE}))"},
            "Only errors: known keys go on, new ones are refused.",
        ),
    ),
    "Limits": (
        Panel(
            "Refused with 429",
            {"{{scope}}": f"sum by (scope) (rate(engram_rate_limited_total{_RATE}))"},
            "Runbook rate-limit-anomaly.md.",
            "reqps",
        ),
        Panel(
            "Over the limit in shadow mode, decided without the lock",
            {
                "quota, {{counter}}": f"sum by (counter) (rate(engram_quota_shadowed_total{_RATE}))",
                "shadow, {{scope}}": f"sum by (scope) (rate(engram_rate_limit_shadowed_total{_RATE}))",
                "unlocked": f"sum(rate(engram_rate_limit_unlocked_total{_RATE}))",
            },
            "What enforcing would refuse.",
            "reqps",
        ),
        Panel(
            "Quotas and shedding",
            {
                "quota, {{counter}}": f"sum by (counter) (rate(engram_quota_exceeded_total{_RATE})) > 0",
                "shed, {{route}}": f"sum by (route) (rate(engram_shed_total{_RATE})) > 0",
                "quota unchecked": f"sum(rate(engram_quota_unchecked_total{_RATE}))",
            },
            "402, 503 under load, and requests let through because quotas were stale.",
            "reqps",
        ),
        Panel(
            "For tenants of other machines",
            {
                "by {{how}}": f"sum by (how) (rate(engram_requests_routed_total{_RATE}))",
                "refused, {{reason}}": f"sum by (reason) (rate(engram_requests_unrouted_total{_RATE}))",
            },
            "Passed on, and so counted there and not here; and refused. Machines disagree for seconds after a move.",
            "reqps",
        ),
    ),
    "Tenants' databases and workers": (
        Panel(
            "Databases that could not be opened",
            {"a minute": "sum(increase(engram_db_open_failures_total[1m]))"},
            "Any is an alert. Runbook database-open-failures.md.",
            limit=1,
        ),
        Panel(
            "Workers that took a dead one's place",
            {"in 15 minutes": "sum(increase(engram_worker_restarts_total[15m]))"},
            "Runbook workers-restarting.md.",
            limit=3,
        ),
        Panel(
            "Longest silence of a worker",
            {"{{instance}}": "max by (instance) (engram_worker_oldest_beat_seconds)"},
            "An event loop that stands still; above 10 s it is replaced.",
            "s",
            10,
        ),
    ),
    "Usage": (
        Panel(
            "Events",
            {"spooled": f"sum(rate(engram_usage_events_total{_RATE}))"},
            "One for each request of an active tenant.",
            "cps",
        ),
        Panel(
            "Oldest event not in PostgreSQL",
            {"{{instance}}": "max by (instance) (engram_usage_oldest_unflushed_seconds)"},
            "Runbook usage-late.md.",
            "s",
            120,
        ),
        Panel(
            "Spool in use",
            {
                "{{instance}}": "max by (instance) (engram_usage_spool_bytes) "
                "/ max by (instance) (engram_usage_spool_limit_bytes)"
            },
            "At 100% writes are refused. Runbook usage-spool-half-full.md.",
            "percentunit",
            0.5,
        ),
        Panel(
            "Failed writes and lost events",
            {
                "failed writes or fsyncs": f"sum(increase(engram_usage_flush_failures_total{_RATE}))",
                "lost": f"sum(increase(engram_usage_lost_total{_RATE}))",
            },
            "Lost must stay 0. Runbooks usage-flush-failures.md, usage-lost.md.",
            limit=1,
        ),
        Panel(
            "Segments that wait for a person",
            {
                "stuck": "max(engram_usage_stuck_segments)",
                "quarantined": "max(engram_usage_quarantined_segments)",
            },
            "Runbook usage-stuck.md.",
            limit=1,
        ),
        Panel(
            "Days ahead with a partition",
            {"days": "min(engram_usage_partitions_ahead_days)"},
            "Runbook few-partitions.md.",
            limit=3,
            side="below",
        ),
    ),
    "Backups and restore tests": (
        Panel(
            "Oldest last good backup",
            {"age": "max(engram_backup_oldest_success_age_seconds)"},
            "What the worst tenant would lose now. Runbook backup-too-old.md.",
            "s",
            93_600,
        ),
        Panel(
            "Corrupt or missing backups",
            {"backups": "max(engram_backups_corrupt)"},
            "Runbook backup-corrupt.md.",
            limit=1,
        ),
        Panel(
            "Restore tests",
            {
                "oldest passed one of a tenant": "max(engram_restore_test_oldest_success_age_seconds)",
                "newest passed one of all": "min(engram_restore_test_last_success_age_seconds)",
            },
            "Runbook restore-test-too-old.md.",
            "s",
        ),
    ),
    "Maintenance leases": (
        Panel(
            "Tenants held",
            {"leases": "max(engram_maintenance_locks)"},
            "A restore holds one for seconds.",
            limit=1,
        ),
        Panel(
            "Longest held, longest overdue",
            {
                "held": "max(engram_maintenance_held_seconds)",
                "past its end": "max(engram_maintenance_overdue_seconds)",
            },
            "Writes of that tenant are refused. Runbook stuck-lease.md.",
            "s",
            300,
        ),
    ),
}
