"""Service levels: what is promised, and how much of the error budget is left. Pure; shared/slo_report.py does the asking.

An objective says which share of requests has to be good over a period (30 days). The rest is the budget:

    burn      = share of bad requests / share that may be bad; 1 spends exactly the budget in one period
    consumed  = burn since measuring began × how much of the period was measured
    left      = 1 − consumed; below 0 more was spent than there was
    forecast  = left × period / burn: when it is spent if this burn goes on and nothing leaves the period before.
                Earlier than the truth rather than later, and None beyond one period.

So five minutes in which everything failed cost 5 / 43.2 of the budget of 99.9% (43.2 minutes), on the first day as on the
thirtieth: a cold start is neither red after its first error nor measured against traffic it never had. Where nothing
was asked nothing failed: no share, no burn, and the budget is whole.

What counts as bad is written once, in the recording rules (deployments/prometheus); requests that a maintenance lease
refused are in neither side of a share and are reported apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from shared.receipt import Receipt

DAY_SECONDS = 86_400.0
PERIOD_DAYS = 30.0
State = Literal["kept", "spent", "no traffic", "not measured"]


class Objective(Receipt, frozen=True):
    """`good_share` of the requests are to be good; `promise` says it for a reader."""

    name: str
    good_share: float
    promise: str

    @property
    def bad_share(self) -> float:
        """What may be bad: the budget."""
        return 1.0 - self.good_share


OBJECTIVES = (
    Objective("availability", 0.999, "99.9% of requests are served"),
    Objective("latency", 0.95, "95% of requests are answered within 250 ms"),
    Objective("errors", 0.995, "less than 0.5% of requests end in a server error"),
    Objective("auth", 0.98, "less than 2% of requests are refused for their token"),
)


class Seen(Receipt, frozen=True):
    """Requests of one window; None where it could not be read."""

    bad: float | None
    total: float | None

    @property
    def bad_share(self) -> float | None:
        """None without traffic, and when it was not read."""
        if self.bad is None or not self.total or self.total <= 0:
            return None
        return min(1.0, max(0.0, self.bad / self.total))


class Budget(Receipt, frozen=True):
    """`burns` and `forecasts_seconds` by window, None where there was no traffic (or, of a forecast, not in a period)."""

    objective: Objective
    state: State
    seen: Seen
    left: float | None
    burns: Mapping[str, float | None]
    forecasts_seconds: Mapping[str, float | None]


def burn(objective: Objective, seen: Seen) -> float | None:
    """How many times faster than allowed the budget goes; None without traffic."""
    share = seen.bad_share
    return None if share is None else share / objective.bad_share


def budget(
    objective: Objective,
    period: Seen,
    windows: Mapping[str, Seen],
    *,
    measured_seconds: float,
    period_seconds: float = PERIOD_DAYS * DAY_SECONDS,
) -> Budget:
    """What is left after `period`, of which `measured_seconds` were measured, and how fast it went in each window."""
    burns = {name: burn(objective, seen) for name, seen in windows.items()}
    if period.bad is None or period.total is None:
        return Budget(objective, "not measured", period, None, burns, dict.fromkeys(burns))
    over_all = burn(objective, period)
    consumed = (over_all or 0.0) * min(1.0, measured_seconds / period_seconds)
    left = 1.0 - consumed
    state: State = "spent" if left <= 0 else "no traffic" if over_all is None else "kept"
    forecasts = {name: forecast(left, rate, period_seconds) for name, rate in burns.items()}
    return Budget(objective, state, period, left, burns, forecasts)


def forecast(left: float, rate: float | None, period_seconds: float) -> float | None:
    """Seconds until the budget is spent at this burn; 0 when it is, None when not within one period."""
    if left <= 0:
        return 0.0
    if not rate:
        return None
    seconds = left * period_seconds / rate
    return seconds if seconds <= period_seconds else None
