"""Service levels: what is promised, and how much of the error budget is left. Pure; shared/slo_report.py asks.

An objective says which share of requests has to be good over a period of 30 days. The rest is the budget:

    burn      = share that was bad / share that may be bad; 1 spends exactly the budget in one period
    consumed  = burn over the period × coverage, how much of the period was measured
    left      = 1 − consumed; below 0 more was spent than there was
    forecast  = left × period / burn: when it is spent if this burn goes on and nothing leaves the period before.
                Earlier than the truth rather than later, and None beyond one period.

So five minutes in which everything failed cost 5 / 43.2 of the budget of 99.9% (43.2 minutes), on the first day as on
the thirtieth: a cold start is neither red after its first error nor excused. Where nothing was asked nothing failed:
there is no share and no burn, and the budget is whole.

What counts as bad is written once, in the recording rules (deployments/prometheus/rules); the objectives there are
these. Requests refused under a maintenance lease are in neither side of a share and are reported apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from shared.receipt import Receipt

PERIOD_SECONDS = 30 * 86_400.0
State = Literal["kept", "spent", "no traffic", "not measured"]


class Objective(Receipt, frozen=True):
    """`good_share` of the requests are to be good; `promise` says it for a reader."""

    name: str
    good_share: float
    promise: str

    @property
    def bad_share(self) -> float:
        """What may be bad: the budget."""
        return round(1.0 - self.good_share, 9)


OBJECTIVES = (
    Objective("availability", 0.999, "99.9% of requests are served"),
    Objective("latency", 0.95, "95% of requests are answered within 250 ms"),
    Objective("errors", 0.995, "less than 0.5% of requests end in a server error"),
    Objective("auth", 0.98, "less than 2% of requests are refused for their token"),
)


class Seen(Receipt, frozen=True):
    """One window. `bad_share` is None without traffic; `measured` False: it could not be read."""

    bad_share: float | None
    measured: bool = True


class Budget(Receipt, frozen=True):
    """`left` is None where the period could not be read. `burns` and `forecasts_seconds` are by window: None without
    traffic; a forecast also when not within a period."""

    objective: Objective
    state: State
    bad_share: float | None
    left: float | None
    burns: Mapping[str, float | None]
    forecasts_seconds: Mapping[str, float | None]


def burn(objective: Objective, bad_share: float | None) -> float | None:
    """How many times faster than allowed the budget goes; None without traffic."""
    return None if bad_share is None else bad_share / objective.bad_share


def budget(objective: Objective, period: Seen, windows: Mapping[str, Seen], *, coverage: float) -> Budget:
    """What is left after the `period`, of which `coverage` (0 to 1) was measured, and how fast it goes by window."""
    burns = {name: burn(objective, seen.bad_share) for name, seen in windows.items()}
    if not period.measured:
        return Budget(objective, "not measured", None, None, burns, dict.fromkeys(burns))
    over_all = burn(objective, period.bad_share)
    left = 1.0 - (over_all or 0.0) * min(1.0, max(0.0, coverage))
    state: State = "spent" if left <= 0 else "no traffic" if over_all is None else "kept"
    forecasts = {name: forecast(left, rate) for name, rate in burns.items()}
    return Budget(objective, state, period.bad_share, left, burns, forecasts)


def forecast(left: float, rate: float | None) -> float | None:
    """Seconds until the budget is spent at this burn; 0 when it is, None when not within one period."""
    if left <= 0:
        return 0.0
    if not rate:
        return None
    seconds = left * PERIOD_SECONDS / rate
    return seconds if seconds <= PERIOD_SECONDS else None
