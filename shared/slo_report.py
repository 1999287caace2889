"""The service level report: budgets and routes from Prometheus, tenants, RPO, drills and RTO from the control plane.

What could not be read is named in `unread` and missing from the report, never filled in; each side is reported without
the other. `state` is `spent` when a budget is, else `not measured` when something is unread, else `kept`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec

from shared import slo
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable
from shared.prometheus import Prometheus, PrometheusRefused, PrometheusUnavailable
from shared.receipt import Receipt
from shared.settings import Settings, redact_url
from shared.slo import OBJECTIVES, PERIOD_SECONDS, Budget, Objective, Seen

PERIOD = "30d"
WINDOWS = ("1h", "6h", "1d", PERIOD)  # of the recording rules
AGE_BUCKETS = ("< 1 h", "1–6 h", "6–12 h", "12–26 h", "26–48 h", "> 48 h")  # those of slo_backup_ages
PARTS = ("download", "decrypt", "verify", "smoke", "total")
# The recorded share of each objective; of these the good share is recorded, of the others the bad one.
_RATIOS = {"availability": "availability", "latency": "latency", "errors": "errors", "auth": "auth_failures"}
_GOOD = ("availability", "latency")
_TENANTS = 10
_CHART_STEPS = 120
State = Literal["kept", "spent", "not measured"]


class Point(Receipt, frozen=True):
    """`left`: what was left of the budget at `at`; None while nothing was measured."""

    at: datetime
    left: float | None


class Route(Receipt, frozen=True):
    """One route in the last 24 hours; None where it had no traffic to say it of."""

    route: str
    requests: float
    error_share: float | None
    slow_share: float | None
    p95_seconds: float | None


class Measured(Receipt, frozen=True):
    """What Prometheus says. `coverage` is how much of the 30 days it saw, 0 to 1, and `fresh` whether of the last hour
    anything. `requests` were made in the period; those `maintenance_refused` are in no budget. `history` is by
    objective, oldest first."""

    coverage: float
    fresh: bool
    requests: float | None
    maintenance_refused: float | None
    budgets: list[Budget]
    history: dict[str, list[Point]]
    routes: list[Route]


class Quantiles(Receipt, frozen=True):
    median: float
    p95: float
    longest: float


class Tenant(Receipt, frozen=True):
    tenant_id: str
    api_calls: int
    share: float
    search_queries: int
    memories_created: int
    storage_bytes: int | None


class Recovery(Receipt, frozen=True):
    """RPO: ages in seconds of the last good backups of the `tenants` active ones, spread over `AGE_BUCKETS`. RTO in
    ms of the drills that passed, by part. None where there was none."""

    tenants: int
    never: int
    stale: int
    age_seconds: Quantiles | None
    age_buckets: list[int]
    drills: dict[str, int]
    drill_pass_rate: float | None
    last_drill_at: datetime | None
    rto_ms: dict[str, Quantiles]
    restores: dict[str, int]


class Books(Receipt, frozen=True):
    """What the control plane says."""

    tenants: int
    top: list[Tenant]
    recovery: Recovery


class Report(Receipt, frozen=True):
    made_at: datetime
    measured: Measured | None
    books: Books | None
    unread: dict[str, str]

    @property
    def spent(self) -> list[str]:
        """The objectives whose budget is gone."""
        return [b.objective.name for b in self.measured.budgets if b.state == "spent"] if self.measured else []

    @property
    def state(self) -> State:
        return "spent" if self.spent else "not measured" if self.unread else "kept"

    @property
    def sentence(self) -> str:
        """What a reader has to know, in one line."""
        said = [f"error budget spent: {', '.join(self.spent)}"] if self.spent else []
        said += [f"{what} not measured: {cause}" for what, cause in self.unread.items()]
        return "; ".join(said) or "every error budget is kept"

    def as_dict(self) -> dict[str, Any]:
        """The public shape: plain values, times in ISO 8601."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {"state": self.state, "summary": self.sentence, "spent": self.spent, **plain}


def make(settings: Settings, control_plane: ControlPlane, *, now: datetime | None = None) -> Report:
    """Ask both sides. Never raises for one that does not answer."""
    now = now or datetime.now(UTC)
    unread: dict[str, str] = {}
    measured = books = None
    if not Prometheus.configured(settings):
        unread["service levels"] = "ENGRAM_PROMETHEUS_URL is not set"
    else:
        try:
            with Prometheus(settings) as prometheus:
                measured = measure(prometheus, now)
        except (PrometheusUnavailable, PrometheusRefused) as e:
            unread["service levels"] = str(e)
    if measured is not None:
        missing = [_rule(b.objective, PERIOD) for b in measured.budgets if b.state == "not measured"]
        where = redact_url(settings.prometheus_url)
        if missing:
            unread["service levels"] = f"Prometheus at {where} has no {', '.join(missing)}"
        elif not measured.fresh:
            unread["service levels"] = f"Prometheus at {where} has seen no gateway within the last hour"
    try:
        books = read_books(control_plane, settings, now - timedelta(seconds=PERIOD_SECONDS), now)
    except ControlPlaneUnavailable as e:
        unread["tenants, backups and drills"] = str(e)
    return Report(now, measured, books, unread)


def measure(prometheus: Prometheus, now: datetime) -> Measured:
    """Ask for everything of one instant. Raises `PrometheusUnavailable`, `PrometheusRefused`."""

    seen_at_all = "engram:requests:rate5m or engram:probe:success"
    # By five minutes, so that a stack of ten minutes is not taken for one of an hour.
    coverage = prometheus.value(f"count_over_time(({seen_at_all})[{PERIOD}:5m]) / (30 * 288)", now) or 0.0
    budgets = []
    for objective in OBJECTIVES:
        seen = {window: _seen(prometheus, objective, window, now) for window in WINDOWS}
        budgets.append(slo.budget(objective, seen[PERIOD], seen, coverage=coverage))
    return Measured(
        coverage=min(1.0, coverage),
        fresh=prometheus.value(f"count_over_time(({seen_at_all})[1h:1m])", now) is not None,
        requests=prometheus.value(f'sum(increase(engram_requests_total{{route=~"/v1/.*"}}[{PERIOD}]))', now),
        maintenance_refused=prometheus.value(f"sum(increase(engram_maintenance_refused_total[{PERIOD}]))", now),
        budgets=budgets,
        history=_history(prometheus, now),
        routes=_routes(prometheus, now),
    )


def _rule(objective: Objective, window: str) -> str:
    return f"engram:{_RATIOS[objective.name]}:ratio_rate{window}"


def _seen(prometheus: Prometheus, objective: Objective, window: str, now: datetime) -> Seen:
    """The rules say 0 errors of nothing where there was no traffic; here that is no share. Without a good token
    a request is not timed. The probe from outside measures availability without traffic too."""
    share = prometheus.value(_rule(objective, window), now)
    if share is None:
        return Seen(None, measured=False)
    counted = "timed" if objective.name == "latency" else "requests"
    asked = f"avg_over_time(engram:{counted}:rate5m[{window}]) > 0"
    if objective.name == "availability":
        asked = f"{asked} or avg_over_time(engram:probe:success[{window}])"
    if prometheus.value(asked, now) is None:
        return Seen(None)
    return Seen(min(1.0, max(0.0, 1.0 - share if objective.name in _GOOD else share)))


def _history(prometheus: Prometheus, now: datetime) -> dict[str, list[Point]]:
    """How the budgets went, from the first time anything was measured; with its gaps."""
    start, step_seconds = now - timedelta(seconds=PERIOD_SECONDS), PERIOD_SECONDS / _CHART_STEPS
    found: dict[str, list[Point]] = {}
    for one in prometheus.series("engram:slo:budget_remaining30d", start, now, step_seconds):
        left = {round((at - start).total_seconds() / step_seconds): value for at, value in one.points}
        steps = range(min(left, default=_CHART_STEPS), _CHART_STEPS + 1)
        found[one.labels["slo"]] = [Point(start + timedelta(seconds=n * step_seconds), left.get(n)) for n in steps]
    return found


def _routes(prometheus: Prometheus, now: datetime) -> list[Route]:
    """The worst first: by share of errors, then by share of slow answers, then by p95."""

    def by_route(query: str) -> dict[str, float]:
        return {sample.labels.get("route", ""): sample.value for sample in prometheus.samples(query, now)}

    of = 'route=~"/v1/.*"'
    requests = by_route(f"sum by (route) (increase(engram_requests_total{{{of}}}[1d])) > 0")
    errors = by_route(f'sum by (route) (increase(engram_requests_total{{{of},status=~"5.."}}[1d]))')
    timed = by_route(f"sum by (route) (increase(engram_request_duration_seconds_count{{{of}}}[1d])) > 0")
    fast = by_route(f'sum by (route) (increase(engram_request_duration_seconds_bucket{{{of},le="0.25"}}[1d]))')
    p95 = by_route(
        f"histogram_quantile(0.95, sum by (le, route) (rate(engram_request_duration_seconds_bucket{{{of}}}[1d])))"
    )
    found = [
        Route(
            route,
            count,
            min(1.0, errors.get(route, 0.0) / count),
            max(0.0, 1.0 - fast.get(route, 0.0) / timed[route]) if route in timed else None,
            p95.get(route),
        )
        for route, count in requests.items()
    ]
    return sorted(found, key=lambda r: (-(r.error_share or 0), -(r.slow_share or 0), -(r.p95_seconds or 0), r.route))


def read_books(control_plane: ControlPlane, settings: Settings, since: datetime, until: datetime) -> Books:
    """Tenants by use (whole UTC days), and how well they could be recovered. Raises `ControlPlaneUnavailable`."""
    first = since.replace(hour=0, minute=0, second=0, microsecond=0)
    used = control_plane.rows("slo_usage_top", **{"from": first, "to": until, "limit": _TENANTS})
    top = [
        Tenant(
            row["tenant_id"],
            row["api_calls"],
            row["api_calls"] / row["api_calls_of_all"] if row["api_calls_of_all"] else 0.0,
            row["search_queries"],
            row["memories_created"],
            row["storage_bytes"],
        )
        for row in used
    ]
    [ages] = control_plane.rows("slo_backup_ages", older_than_seconds=settings.backup_stale_hours * 3600)
    [drills] = control_plane.rows("slo_drills", **{"from": since})
    restores = control_plane.rows("slo_restores", **{"from": since})
    judged = drills["passed"] + drills["failed"]
    recovery = Recovery(
        tenants=ages["tenants"],
        never=ages["never"],
        stale=ages["stale"],
        age_seconds=_quantiles(ages["quantiles"]),
        age_buckets=list(ages["buckets"]),
        drills={outcome: drills[outcome] for outcome in ("passed", "failed", "inconclusive")},
        drill_pass_rate=drills["passed"] / judged if judged else None,
        last_drill_at=drills["last_at"],
        rto_ms={part: found for part in PARTS if (found := _quantiles(drills[part])) is not None},
        restores={row["state"]: row["restores"] for row in restores},
    )
    return Books(used[0]["tenants"] if used else 0, top, recovery)


def _quantiles(found: list[float | None] | None) -> Quantiles | None:
    if found is None or any(value is None for value in found):
        return None
    return Quantiles(*(float(value) for value in found if value is not None))
