"""Prometheus' rules: what promtool says of them, and that each alert is proven to fire and to stay silent."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from deployments import cli
from deployments.monitoring_rules import RULES_DIR, load
from shared import metrics
from shared.diagnosis.finding import SUBJECTS
from shared.settings import Settings

TESTS_DIR = RULES_DIR.parent / "tests"
TESTS = sorted(TESTS_DIR.glob("*.yml"))
ALL_RULES = [rule for document in load().values() for group in document["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]
RECORDS = {rule["record"] for rule in ALL_RULES if "record" in rule}
FROM_PROMETHEUS = {"up", "probe_success"}
WATCHDOG = "EngramWatchdog"  # fires always: its silence is the alert, and is noticed elsewhere
SIX = {
    "EngramHighErrorRate": ("0.01", "5m"),
    "EngramHighLatency": ("0.5", "10m"),
    "EngramAuthFailures": ("3 *", "5m"),
    "EngramUsageFlushFailures": ("> 0", "5m"),
    "EngramDatabaseOpenFailures": ("> 0", "1m"),
    "EngramRateLimitAnomaly": ("3 *", "5m"),
}


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    environment = os.environ | {"GOGC": "800"}  # a quarter of its time would go into collecting what little it holds
    command = ["promtool", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_promtool_accepts_the_rules_and_the_production_configuration() -> None:
    """One wrong word and Prometheus does not start, at the next restart, which is in an outage."""
    for words in (
        ("check", "rules", *sorted(RULES_DIR.glob("*.yml"))),
        ("check", "config", RULES_DIR.parent / "prometheus.yml"),
    ):
        done = promtool(*words)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_stay_silent_as_their_scenarios_say(path: Path) -> None:
    """promtool plays each scenario: what happens to the counters, and which alerts are there when."""
    done = promtool("test", "rules", path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3_000:]


def _cases() -> list[tuple[str, str, bool]]:
    """(scenario, alert, fires) of every expectation."""
    found = []
    for path in TESTS:
        for scenario in yaml.load(path.read_text(), yaml.CSafeLoader)["tests"]:
            for case in scenario["alert_rule_test"]:
                found.append((scenario["name"], case["alertname"], bool(case["exp_alerts"])))
    return found


def test_every_alert_is_seen_to_fire_and_to_stay_silent() -> None:
    """An alert nobody saw firing may never fire; one nobody saw silent may always. One must: the watchdog, whatever
    happens and even where nothing does."""
    names, cases = {rule["alert"] for rule in ALERTS}, _cases()
    assert names == {alert for _, alert, fires in cases if fires}
    for quiet in ("idle", "busy and well", "cold start", "blip"):
        seen = {(alert, fires) for scenario, alert, fires in cases if scenario == quiet}
        assert seen == {(name, name == WATCHDOG) for name in names}, quiet


def test_the_six_alerts_say_what_was_agreed() -> None:
    """The thresholds and times are part of the promise; a rule that was tuned away from them must be noticed."""
    rules = {rule["alert"]: rule for rule in ALERTS}
    for name, (threshold, hold) in SIX.items():
        assert threshold in rules[name]["expr"] and rules[name]["for"] == hold, name


def test_every_metric_a_rule_names_exists() -> None:
    """A renamed metric makes no noise: its alert just never fires again."""
    exposed = set()
    for family in metrics._registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        exposed |= {family.name + suffix for suffix in suffixes}
    unknown = {name for rule in ALL_RULES for name in _metrics(rule["expr"])} - exposed - RECORDS - FROM_PROMETHEUS
    assert unknown == set()


def test_every_alert_says_what_to_do_and_who_is_woken() -> None:
    """At 3 a.m. an alert without its one command is only noise."""
    for rule in ALERTS:
        labels, annotations = rule["labels"], rule["annotations"]
        assert labels["severity"] in (("none",) if rule["alert"] == WATCHDOG else ("page", "ticket")), rule["alert"]
        assert labels["subject"], rule["alert"]
        assert labels.get("diagnosis", "auth") in SUBJECTS, rule["alert"]
        assert rule["alert"] != WATCHDOG or "diagnosis" not in labels, "there is nothing to diagnose"
        assert annotations["summary"], rule["alert"]
        assert re.fullmatch(r"[a-z-]+\.md", annotations["runbook"]), rule["alert"]
        link = f"{{{{ $externalLabels.prefect_ui }}}}/artifacts/key/diagnose-{labels.get('diagnosis')}"
        assert annotations.get("diagnosis_url") == (link if "diagnosis" in labels else None), rule["alert"]
        assert "\n" not in annotations["command"] and annotations["command"].startswith("engram "), rule["alert"]
    assert max(Counter(rule["alert"] for rule in ALERTS).values()) == 1


def test_the_command_of_every_alert_exists() -> None:
    """With the subject and the options it is given: nobody reads a manual at 3 a.m."""
    app = typer.Typer()
    for name in cli.COMMANDS:
        importlib.import_module(f"deployments.cli.{name}").register(app)
    for command in sorted({rule["annotations"]["command"] for rule in ALERTS}):
        done = CliRunner().invoke(app, [*command.split()[1:], "--help"])
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_thresholds_follow_the_settings_they_name() -> None:
    """An alert that contradicts the setting it watches fires too early or too late; the rules are not templates."""
    expressions = {rule["alert"]: rule["expr"] for rule in ALERTS}
    defaults = Settings.model_fields
    assert f"> {defaults['backup_stale_hours'].default:g} * 3600" in expressions["EngramBackupTooOld"]
    assert f"> {2 * 7 / defaults['restore_test_share'].default:g} * 86400" in expressions["EngramRestoreTestTooOld"]
    few = int(expressions["EngramFewPartitions"].rpartition("<")[2])
    assert 1 < few < defaults["usage_partitions_ahead_days"].default
    overdue = int(re.findall(r"overdue_seconds\) > (\d+)", expressions["EngramStuckLease"])[0])
    assert overdue > 2 * defaults["lease_seconds"].default
    beat = int(re.findall(r"beat_seconds\) > (\d+)", expressions["EngramWorkersRestarting"])[0])
    assert beat > 2 * defaults["worker_silence_seconds"].default


def test_the_rules_of_every_window_are_the_same_but_for_the_window() -> None:
    """They are written out eight times; a slip in one would tell of a burn that is not there, or hide one that is."""
    groups = {g["name"]: g["rules"] for g in load()["slo.yml"]["groups"]}
    windows = ("30m", "1h", "2h", "6h", "1d", "3d", "30d")
    plain = [
        [_without(rule, window) for rule in groups[f"engram-slo-{window}"] if ":filled" not in rule["record"]]
        for window in windows
    ]
    assert all(rules == plain[0] for rules in plain)
    assert len(plain[0]) == 9
    filled = [rule["record"] for rules in groups.values() for rule in rules if ":filled" in rule.get("record", "")]
    used = {name for rule in ALERTS for name in _metrics(rule["expr"]) if ":filled" in name}
    assert set(filled) == used


def _without(rule: dict[str, Any], window: str) -> dict[str, Any]:
    text = yaml.safe_dump(rule).replace(f"[{window}]", "[W]")
    return dict(yaml.load(re.sub(rf"(ratio_rate|burn_rate|weight){window}\b", r"\1W", text), yaml.CSafeLoader))


def _metrics(expression: str) -> set[str]:
    """Names of metrics in PromQL: ours and Prometheus' own, without label matchers and ranges."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    return set(re.findall(r"\b(?:engram[_:][a-z0-9_:]+|up|probe_success)\b", bare))
