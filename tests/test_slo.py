"""Error budgets: the arithmetic as a table, and that the rules of Prometheus promise the same."""

from __future__ import annotations

import math

import pytest
import yaml

from shared.slo import OBJECTIVES, PERIOD_SECONDS, Objective, Seen, budget, forecast
from tests.prometheus_fixtures import ROOT

THREE_NINES = Objective("availability", 0.999, "")
DAY = 1 / 30


@pytest.mark.parametrize(
    ("case", "bad_share", "coverage", "state", "left"),
    [
        ("nothing failed", 0.0, 1.0, "kept", 1.0),
        ("half of what may fail", 0.0005, 1.0, "kept", 0.5),
        ("exactly all of it", 0.001, 1.0, "spent", 0.0),
        ("three times as much", 0.003, 1.0, "spent", -2.0),
        ("no traffic in the period", None, 1.0, "no traffic", 1.0),
        ("no traffic and hardly measured", None, 0.0, "no traffic", 1.0),
        ("everything failed for the first five minutes", 1.0, 5 / 43_200, "kept", 1 - 5 / 43.2),
        ("everything failed for the first hour", 1.0, 60 / 43_200, "spent", 1 - 60 / 43.2),
        ("a day at twice the allowed rate, then no more data", 0.002, DAY, "kept", 1 - 2 * DAY),
        ("more was measured than there is", 0.0005, 1.2, "kept", 0.5),
    ],
)
def test_what_is_left_of_a_budget(case: str, bad_share: float | None, coverage: float, state: str, left: float) -> None:
    """A cold start counts what it measured, silence is neither failure nor success, and nothing is ever NaN."""
    found = budget(THREE_NINES, Seen(bad_share), {"1h": Seen(None)}, coverage=coverage)
    assert found.state == state, case
    assert found.left is not None and math.isclose(found.left, left, abs_tol=1e-9), case
    assert found.burns == {"1h": None} and found.bad_share == bad_share


def test_what_could_not_be_read_has_no_budget() -> None:
    """Neither whole nor spent: nobody knows."""
    found = budget(THREE_NINES, Seen(None, measured=False), {"1h": Seen(0.5)}, coverage=1.0)
    assert (found.state, found.left, found.forecasts_seconds) == ("not measured", None, {"1h": None})


def test_burn_is_said_window_by_window() -> None:
    """An hour that is bad now shows beside a month that was good."""
    windows = {"1h": Seen(0.0144), "6h": Seen(0.001), "1d": Seen(0.0), "30d": Seen(None)}
    found = budget(THREE_NINES, Seen(0.0001), windows, coverage=1.0)
    assert found.burns["30d"] is None and found.forecasts_seconds["30d"] is None
    assert [round(found.burns[w] or 0, 6) for w in ("1h", "6h", "1d")] == [14.4, 1.0, 0.0]
    assert found.forecasts_seconds["1h"] == pytest.approx(0.9 * PERIOD_SECONDS / 14.4)
    assert found.forecasts_seconds["1d"] is None


@pytest.mark.parametrize(
    ("left", "rate", "seconds"),
    [
        (1.0, 1.0, PERIOD_SECONDS),
        (1.0, 14.4, PERIOD_SECONDS / 14.4),
        (0.5, 0.4, None),  # not within a period
        (0.5, 1.0, PERIOD_SECONDS / 2),
        (0.5, 0.0, None),
        (0.5, None, None),
        (0.0, 0.0, 0.0),
        (-1.0, None, 0.0),
    ],
)
def test_when_a_budget_will_be_spent(left: float, rate: float | None, seconds: float | None) -> None:
    """What is spent is spent now; what does not burn is never spent."""
    assert forecast(left, rate) == (None if seconds is None else pytest.approx(seconds))


def test_the_objectives_are_those_of_the_rules() -> None:
    """A promise changed in one place alone would be alerted on and reported differently."""
    groups = yaml.load((ROOT / "deployments/prometheus/rules/slo.yml").read_text(), yaml.CSafeLoader)["groups"]
    promised = {
        rule["labels"]["slo"]: float(rule["expr"].removeprefix("vector(").removesuffix(")"))
        for group in groups
        for rule in group["rules"]
        if rule.get("record") == "engram:slo:objective"
    }
    assert promised == {objective.name: objective.good_share for objective in OBJECTIVES}
