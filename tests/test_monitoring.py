"""What `engram up --monitoring` writes and starts, shortened rules for rehearsals, and what is counted for rules."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from deployments import monitoring, monitoring_rules, parts
from deployments.monitoring_rules import load, seconds_of, shorten, shorten_rules
from deployments.ports import PortReservations
from deployments.process import STACK_MARK
from shared import lease, registry
from shared.control_plane import ControlPlane
from shared.errors import Permanent
from shared.safety import NOT_A_GATEWAYS, OF_BACKUPS
from shared.settings import Settings, variable
from shared.tenant import TenantPaths
from tests.environment_fixtures import KEY_IDS, SECRET
from tests.gateway_stack import Stack, stack  # noqa: F401

PROGRAMS = pytest.mark.skipif(shutil.which("amtool") is None, reason="Alertmanager is not installed")


# --- the rules of a rehearsal ---


@given(st.floats(0.001, 4e6), st.floats(0.001, 4e6), st.floats(0.05, 59))
def test_a_longer_time_stays_longer_when_a_minute_is_shortened(one: float, other: float, minute_seconds: float) -> None:
    """A rehearsal whose windows change places rehearses other rules."""
    shorter, longer = sorted((one, other))
    if longer > shorter * 1.001:
        assert shorten(shorter, minute_seconds) < shorten(longer, minute_seconds)
    assert shorten(longer, minute_seconds) <= longer
    assert shorten(one, 60) == one


def test_shortened_rules_differ_in_their_times_alone() -> None:
    """Names, thresholds, labels and the order of everything are what is rehearsed."""
    times = re.compile(r"\b\d+(?:ms|[smhdw])\b")
    for document in load().values():
        shortened = shorten_rules(document, 2)
        before, after = (yaml.safe_dump(rules, width=10_000) for rules in (document, shortened))
        assert before != after
        assert times.sub("T", before) == times.sub("T", after)
        assert shorten_rules(document, 60) == document
    assert monitoring_rules.shorten_expression("x:rate5m{a='5m'} > 5 and y[1h:5m] offset 1d", 2) == (
        "x:rate5m{a='5m'} > 5 and y[5566ms:2991ms] offset 12320ms"
    )


@pytest.mark.parametrize("words", ["", "5", "5 m", "m5", "5m!", "-5m"])
def test_what_is_no_duration_is_refused(words: str) -> None:
    """It would silently become another window."""
    with pytest.raises(ValueError, match="not a duration"):
        seconds_of(words)
    assert seconds_of("1h30m") == 5_400


# --- what is written for the programs ---


def _settings(tmp_path: Path, **values: object) -> Settings:
    return Settings(data_dir=tmp_path, **values)  # type: ignore[arg-type]


@PROGRAMS
def test_the_configuration_of_a_stack_is_the_production_one_with_other_addresses(tmp_path: Path) -> None:
    """Routes, inhibitions, jobs and labels are not written down a second time; both programs accept the result."""
    settings = _settings(tmp_path, alertmanager_port=19_093, probe_port=19_115, bridge_port=18_082)
    rules_dir = tmp_path / "rules"
    rules_dir.mkdir()
    prometheus = monitoring.prometheus_configuration(settings, "http://127.0.0.1:18080", rules_dir)
    alertmanager = monitoring.alertmanager_configuration(settings)
    production = yaml.load((monitoring.SOURCE / "alertmanager.yml").read_text(), yaml.CSafeLoader)
    assert {k: v for k, v in alertmanager.items() if k != "receivers"} == {
        k: v for k, v in production.items() if k != "receivers"
    }
    webhooks = [r["webhook_configs"][0] for r in alertmanager["receivers"] if "webhook_configs" in r]
    assert [(w["url"], w["send_resolved"]) for w in webhooks] == [
        ("http://127.0.0.1:18082/alerts", True),
        ("http://127.0.0.1:18082/heartbeat", False),
    ]
    for webhook in webhooks:
        assert webhook["http_config"]["authorization"]["credentials_file"].startswith(str(tmp_path))
    text = yaml.safe_dump([prometheus, alertmanager])
    assert "internal" not in text and "example.com" not in text, "a host of the production example is left"
    assert prometheus["global"]["external_labels"] == {"prefect_ui": settings.prefect_ui_url}
    targets = [t for job in prometheus["scrape_configs"] for s in job["static_configs"] for t in s["targets"]]
    assert targets == ["127.0.0.1:18080", "http://127.0.0.1:18080/health", "http://127.0.0.1:18080/ready"]
    for name, document, check in (
        ("alertmanager.yml", alertmanager, ["amtool", "check-config"]),
        ("prometheus.yml", prometheus, ["promtool", "check", "config"]),
    ):
        (tmp_path / name).write_text(yaml.safe_dump(document))
        done = subprocess.run([*check, str(tmp_path / name)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_gateway_with_tls_is_watched_through_it(tmp_path: Path) -> None:
    """Its certificate is for its public name, so on the loopback it is not checked."""
    configuration = monitoring.prometheus_configuration(_settings(tmp_path), "https://127.0.0.1:8443", tmp_path)
    job = configuration["scrape_configs"][0]
    assert job["scheme"] == "https" and job["tls_config"] == {"insecure_skip_verify": True}
    assert "tls_config" in monitoring.probe_configuration("https://127.0.0.1:8443")["modules"]["engram"]["http"]
    assert "tls_config" not in monitoring.probe_configuration("http://127.0.0.1:8080")["modules"]["engram"]["http"]


@PROGRAMS
@pytest.mark.parametrize(
    ("alert", "beside", "silenced"),
    [
        (("EngramAuthBurnSlow", "ticket", "auth"), ("EngramAuthFailures", "page", "auth"), True),
        (("EngramAuthBurnSlow", "ticket", "auth"), ("EngramHighLatency", "page", "latency"), False),
        (("EngramHighErrorRate", "page", "errors"), ("EngramGatewayDown", "page", "gateway"), True),
        (("EngramUsageLost", "page", "usage-lost"), ("EngramGatewayDown", "page", "gateway"), False),
        (("EngramBackupCorrupt", "ticket", "backup-corrupt"), ("EngramGatewayDown", "page", "gateway"), False),
        (("EngramGatewayDown", "page", "gateway"), ("EngramGatewayDown", "page", "gateway"), False),
        (("EngramWatchdog", "none", "monitoring"), ("EngramGatewayDown", "page", "gateway"), False),
    ],
)
def test_who_is_awake_is_not_told_twice(
    alert: tuple[str, str, str], beside: tuple[str, str, str], silenced: bool
) -> None:
    """By the matchers of alertmanager.yml: a page covers tickets of its subject, a dead gateway all that follows."""

    def matches(matchers: list[str], labels: dict[str, str]) -> bool:
        for matcher in matchers:
            found = re.fullmatch(r'(\w+)(=|!~)"([^"]*)"', matcher)
            assert found, matcher
            same = re.fullmatch(found[3], labels[found[1]]) is not None
            if same != (found[2] == "="):
                return False
        return True

    target, source = (dict(zip(("alertname", "severity", "subject"), each, strict=True)) for each in (alert, beside))
    rules = yaml.load((monitoring.SOURCE / "alertmanager.yml").read_text(), yaml.CSafeLoader)["inhibit_rules"]
    assert silenced == any(
        matches(rule["source_matchers"], source)
        and matches(rule["target_matchers"], target)
        and all(source[name] == target[name] for name in rule.get("equal", ()))
        for rule in rules
    )


@PROGRAMS
def test_the_heartbeat_goes_to_the_switch_alone_and_everything_else_never_does() -> None:
    """An alert that always fires would be one more incident for everybody it reaches; and a switch that hears of others
    goes on hearing after the watchdog is gone."""

    def receivers(*labels: str) -> str:
        config = f"--config.file={monitoring.SOURCE / 'alertmanager.yml'}"
        done = subprocess.run(
            ["amtool", "config", "routes", "test", config, *labels], capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    assert receivers("alertname=EngramWatchdog", "severity=none", "subject=monitoring") == "heartbeat"
    assert receivers("alertname=EngramGatewayDown", "severity=page") == "bridge,pager"
    assert receivers("alertname=EngramUsageLate", "severity=ticket") == "bridge"
    [route] = [r for r in yaml.safe_load((monitoring.SOURCE / "alertmanager.yml").read_text())["route"]["routes"]
               if r["receiver"] == "heartbeat"]  # fmt: skip
    # Alertmanager compares with the time of the last one, which is a little after the round it was sent in.
    assert seconds_of(route["repeat_interval"]) < seconds_of(route["group_interval"]) <= 60


@PROGRAMS
def test_the_gateways_of_other_machines_are_watched_by_name_and_their_certificates_checked(tmp_path: Path) -> None:
    """A machine that is gone must stay a target, to be seen missing; and `instance` is its name, not an address."""
    settings = _settings(
        tmp_path,
        monitoring_targets="engram-data-1.internal:8080, engram-data-2.internal:8080",
        monitoring_probe_urls="https://one.example/,https://two.example",
    )
    configuration = monitoring.prometheus_configuration(settings, "", tmp_path)
    gateways, probe = configuration["scrape_configs"]
    assert gateways["static_configs"] == [{"targets": ["engram-data-1.internal:8080", "engram-data-2.internal:8080"]}]
    assert [(s["labels"]["probe"], s["targets"]) for s in probe["static_configs"]] == [
        ("health", ["https://one.example/health", "https://two.example/health"]),
        ("ready", ["https://one.example/ready", "https://two.example/ready"]),
    ]
    assert "tls_config" not in yaml.safe_dump([configuration, monitoring.probe_configuration("")])
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    check = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@PROGRAMS
def test_programs_of_others_are_given_no_setting_and_the_bridge_no_key_of_the_backups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They answer whoever reaches their port, and whoever breaks into one finds its environment."""
    for name in SECRET | KEY_IDS:
        monkeypatch.setenv(variable(name), "canary")
    monkeypatch.delenv(variable("control_plane_url"))  # read as a URL by who starts the parts, not as a key
    ports = PortReservations()
    started = parts.plan(_settings(tmp_path, prefect_api_url="http://127.0.0.1:1/api"), ports, monitoring=True)
    ports.release_all()
    held = {}
    for child, _ in started.monitoring:
        child.start()
        try:
            held[child.name] = psutil.Process(child.pid).environ()
        finally:
            child.stop(5)
    bridge = held.pop("bridge")
    assert held.keys() == {"probe", "alertmanager", "prometheus"}
    for environment in held.values():
        assert {name for name in environment if name.startswith(("ENGRAM_", "PREFECT_"))} == {STACK_MARK}
        assert environment["PATH"] == os.environ["PATH"] and "canary" not in environment.values()
    assert {name for name in SECRET | KEY_IDS if bridge.get(variable(name)) == "canary"} == (
        NOT_A_GATEWAYS - OF_BACKUPS
    )


# --- what may be missing ---


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line, before anything is started."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Permanent, match="apt-get install prometheus prometheus-alertmanager prometheus-blackbox"):
        monitoring.programs()


def test_a_prometheus_that_is_there_already_is_not_started_beside(tmp_path: Path) -> None:
    """Reports would ask one and alerts come from the other."""
    ports = PortReservations()
    try:
        with pytest.raises(Permanent, match="ENGRAM_PROMETHEUS_URL"):
            parts.plan(_settings(tmp_path, prometheus_url="http://prometheus:9090"), ports, monitoring=True)
    finally:
        ports.release_all()


# --- what is counted for the rules ---


def test_a_refusal_for_maintenance_is_counted_apart_and_other_refusals_are_not(stack: Stack) -> None:  # noqa: F811
    """The objectives leave them out: planned work must not use up the error budget, nor hide what does."""
    tenant = stack.tenant()
    name, routes = "engram_maintenance_refused_total", ("/v1/memories", "/v1/search", "/v1/mcp")
    before = {route: stack.gateway.metric(name, route=route) for route in routes}
    mark = TenantPaths.of(stack.settings.tenants_dir, tenant).mark
    call = {"name": "memory_create", "arguments": {"content": "x"}}
    rpc = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    with stack.client(tenant) as api:
        mark.write_text("test")
        assert api.post("/v1/memories", json={"content": "x"}).json()["reason"] == "maintenance"
        accept = {"Accept": "application/json, text/event-stream"}
        assert "maintenance" in api.post("/v1/mcp", json=rpc, headers=accept).text
        mark.unlink()
        assert api.post("/v1/memories", json={"content": 1}).status_code == 400
    after = {route: stack.gateway.metric(name, route=route) - before[route] for route in routes}
    assert after == {"/v1/memories": 1, "/v1/search": 0, "/v1/mcp": 1}


def test_a_lease_is_seen_to_be_held_and_to_be_overdue(control_plane_url: str, tmp_path: Path) -> None:
    """A holder that died leaves a tenant whose writes are refused; nobody else would say so."""
    settings = _settings(tmp_path, control_plane_url=SecretStr(control_plane_url))
    with ControlPlane(settings) as control_plane:

        def seen() -> tuple[float, float]:
            row = control_plane.row("fleet_ages")
            assert row is not None
            return float(row["maintenance_held_seconds"]), float(row["maintenance_overdue_seconds"])

        registry.create(control_plane, settings, "held")
        assert seen() == (0, 0)
        lease.acquire(control_plane, "held", holder="a", reason="test", seconds=30)
        held, overdue = seen()
        assert held > 0 and overdue == 0
        with control_plane.transaction() as connection:
            connection.execute(
                "UPDATE maintenance_locks SET acquired_at = now() - interval '1 hour',"
                " expires_at = now() - interval '10 minutes'"
            )
        held, overdue = seen()
        assert held > 3_590 and overdue > 590
        assert lease.release(control_plane, "held", "a")
        assert seen() == (0, 0)
