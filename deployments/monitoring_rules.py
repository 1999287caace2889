"""The rules with shorter windows, so that a rehearsal (or a test) sees in seconds what production sees in hours.

`ENGRAM_MONITORING_MINUTE_SECONDS` says what becomes of a minute. Shorter times shrink alike; of longer ones the ratio
to a minute shrinks to its fourth root: with 2 seconds to the minute an hour is 5.6 s, a day 12, thirty days 29. So the
order of all windows is kept, no two become one, and a day of data is there before anybody loses patience. Thresholds,
names, labels and everything else stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

RULES_DIR = Path(__file__).parent / "prometheus" / "rules"
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_PART = re.compile(r"(\d+)(ms|[smhdw])")
_DURATION = r"(?:\d+(?:ms|[smhdw]))+"
_IN_EXPRESSION = re.compile(rf"\[{_DURATION}(?::{_DURATION})?\]|\boffset {_DURATION}")
_NORMAL_MINUTE_SECONDS = 60.0
_TIMES_OF_A_RULE = ("for", "keep_firing_for")


def shorten(seconds: float, minute_seconds: float) -> float:
    """What becomes of a time when a minute becomes `minute_seconds`; rises with `seconds`."""
    minutes = seconds / _NORMAL_MINUTE_SECONDS
    if minute_seconds == _NORMAL_MINUTE_SECONDS:
        return seconds
    return minute_seconds * (minutes if minutes <= 1 else minutes**0.25)


def seconds_of(duration: str) -> float:
    """Prometheus' way to write times: `90s`, `1h30m`. Raises `ValueError`."""
    parts = _PART.findall(duration)
    if "".join(number + unit for number, unit in parts) != duration or not duration:
        raise ValueError(f"not a duration: {duration!r}")
    return sum(int(number) * _UNITS[unit] for number, unit in parts)


def shorten_duration(duration: str, minute_seconds: float) -> str:
    """The same for a duration as Prometheus writes it; whole milliseconds."""
    if minute_seconds == _NORMAL_MINUTE_SECONDS:
        return duration
    return f"{max(1, round(shorten(seconds_of(duration), minute_seconds) * 1_000))}ms"


def shorten_expression(expression: str, minute_seconds: float) -> str:
    """PromQL with its ranges, subqueries and offsets shortened; names of metrics keep the window they speak of."""

    def shortened(found: re.Match[str]) -> str:
        return re.sub(_DURATION, lambda m: shorten_duration(m[0], minute_seconds), found[0])

    return _IN_EXPRESSION.sub(shortened, expression)


def shorten_rules(document: dict[str, Any], minute_seconds: float) -> dict[str, Any]:
    """One rules file with every time in it shortened."""
    groups = []
    for group in document["groups"]:
        rules = []
        for rule in group["rules"]:
            times = {k: shorten_duration(rule[k], minute_seconds) for k in _TIMES_OF_A_RULE if k in rule}
            rules.append(rule | {"expr": shorten_expression(rule["expr"], minute_seconds)} | times)
        interval = {"interval": shorten_duration(group["interval"], minute_seconds)} if "interval" in group else {}
        groups.append(group | {"rules": rules} | interval)
    return document | {"groups": groups}


def load(directory: Path = RULES_DIR) -> dict[str, dict[str, Any]]:
    """Every rules file by its name."""
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted(directory.glob("*.yml"))}
