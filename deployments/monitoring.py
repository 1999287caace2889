"""What `engram up --monitoring` adds: Prometheus, Alertmanager, a probe from outside, and the bridge to Prefect; and
what `engram monitor` runs alone (`deployments.monitoring_process`).

    {data_dir}/monitoring/prometheus.yml, rules/*.yml, alertmanager.yml, probe.yml   written at every start
    {data_dir}/monitoring/prometheus/, alertmanager/                                 their data

The production files of `deployments/prometheus/` are read and only addresses are put in, so what is rehearsed here is
what runs there. The programs come from the operating system or the image; all listen on the loopback only, but for
Prometheus where `ENGRAM_PROMETHEUS_HOST` says so, for reports and diagnoses of other machines.

A `gateway_url` is that of this machine's gateway; empty, the gateways are those of `ENGRAM_MONITORING_TARGETS` and
`ENGRAM_MONITORING_PROBE_URLS`. They are named one by one, and not looked up: one that is gone must be seen to be.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deployments.bridge import token_file
from deployments.monitoring_rules import load, shorten, shorten_duration, shorten_rules
from deployments.orchestration import http_ok
from deployments.process import STACK_MARK, Child
from shared import durable
from shared.errors import Permanent
from shared.settings import Settings, words

LOOPBACK = "127.0.0.1"
SOURCE = Path(__file__).parent / "prometheus"
PORTS = ("prometheus_port", "alertmanager_port", "probe_port", "bridge_port")
_PROGRAMS = {  # as Debian calls them, as their makers do, Debian's package
    "prometheus": ("prometheus", "prometheus", "prometheus"),
    "alertmanager": ("prometheus-alertmanager", "alertmanager", "prometheus-alertmanager"),
    "probe": ("prometheus-blackbox-exporter", "blackbox_exporter", "prometheus-blackbox-exporter"),
}
# What those programs are given of the environment: no setting, so no key.
_GIVEN = frozenset(
    {
        *("PATH", "HOME", "TMPDIR", "TZ", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("GOMAXPROCS", "GOMEMLIMIT", "GOGC", STACK_MARK),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),  # on the way to a pager
    }
)
_TIMES_OF_A_ROUTE = ("group_wait", "group_interval", "repeat_interval")


def programs() -> dict[str, str]:
    """Where each program is. Raises `Permanent` naming the packages of those that are missing."""
    found = {part: shutil.which(debian) or shutil.which(maker) for part, (debian, maker, _) in _PROGRAMS.items()}
    missing = [_PROGRAMS[part][2] for part, path in found.items() if path is None]
    if missing:
        raise Permanent(f"--monitoring needs programs that are not installed: apt-get install {' '.join(missing)}")
    return {part: path for part, path in found.items() if path is not None}


def children(settings: Settings, environment: Mapping[str, str], gateway_url: str) -> list[tuple[Child, str]]:
    """The parts in order of start, each with the setting of its port. Only the bridge gets the whole environment."""
    program = programs()
    given = {name: environment[name] for name in _GIVEN & environment.keys()}
    directory = settings.data_dir / "monitoring"
    timeout_seconds = _scrape_times(settings)[1]
    host = settings.prometheus_host

    def child(
        name: str,
        argv: list[str],
        port: int,
        ready_path: str,
        write: Callable[[], None],
        env: Mapping[str, str] = given,
    ) -> Child:
        return Child(
            name,
            argv,
            env=env,
            log_path=settings.data_dir / "logs" / f"{name}.log",
            ready=lambda: http_ok(f"http://{LOOPBACK}:{port}{ready_path}"),
            before_start=write,
        )

    probe = child(
        "probe",
        [
            program["probe"],
            f"--config.file={directory / 'probe.yml'}",
            f"--web.listen-address={LOOPBACK}:{settings.probe_port}",
            f"--timeout-offset={min(0.5, timeout_seconds / 10):g}",  # how much sooner than Prometheus it gives up
        ],
        settings.probe_port,
        "/-/healthy",
        lambda: _write(directory / "probe.yml", probe_configuration(gateway_url)),
    )
    bridge = child(
        "bridge",
        [sys.executable, "-m", "deployments.cli", "bridge"],
        settings.bridge_port,
        "/health",
        lambda: None,
        environment,
    )
    alertmanager = child(
        "alertmanager",
        [
            program["alertmanager"],
            f"--config.file={directory / 'alertmanager.yml'}",
            f"--storage.path={directory / 'alertmanager'}",
            f"--web.listen-address={LOOPBACK}:{settings.alertmanager_port}",
            "--cluster.listen-address=",  # one instance: no gossip, no second port
        ],
        settings.alertmanager_port,
        "/-/ready",
        lambda: _write(directory / "alertmanager.yml", alertmanager_configuration(settings)),
    )
    prometheus = child(
        "prometheus",
        [
            program["prometheus"],
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'prometheus'}",
            f"--storage.tsdb.retention.time={settings.monitoring_retention_days}d",
            f"--web.listen-address={f'[{host}]' if ':' in host else host}:{settings.prometheus_port}",
            # How often Alertmanager is told again of what goes on; with a whole minute a rehearsal would wait for it.
            f"--rules.alert.resend-delay={shorten_duration('1m', settings.monitoring_minute_seconds)}",
            "--log.level=warn",
        ],
        settings.prometheus_port,
        "/-/ready",
        lambda: _write_prometheus(settings, gateway_url, directory),
    )
    return [
        (probe, "probe_port"),
        (bridge, "bridge_port"),
        (alertmanager, "alertmanager_port"),
        (prometheus, "prometheus_port"),
    ]


def prometheus_configuration(settings: Settings, gateway_url: str, rules_dir: Path) -> dict[str, Any]:
    """`prometheus.yml` with the addresses of this stack."""
    configuration = _source("prometheus.yml")
    interval, timeout = (f"{max(1, round(seconds * 1_000))}ms" for seconds in _scrape_times(settings))
    configuration["global"] |= {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": timeout}
    configuration["global"]["external_labels"]["prefect_ui"] = settings.prefect_ui_url
    configuration["rule_files"] = [str(rules_dir / "*.yml")]
    managers = configuration["alerting"]["alertmanagers"]
    managers[0]["static_configs"][0]["targets"] = [f"{LOOPBACK}:{settings.alertmanager_port}"]
    jobs = {job["job_name"]: job for job in configuration["scrape_configs"]}
    scheme, _, address = gateway_url.partition("://")
    targets = [address] if gateway_url else words(settings.monitoring_targets)
    jobs["engram-gateway"]["static_configs"][0]["targets"] = targets
    if scheme == "https":
        jobs["engram-gateway"] |= {"scheme": scheme, "tls_config": {"insecure_skip_verify": True}}
    probed = [gateway_url] if gateway_url else [url.rstrip("/") for url in words(settings.monitoring_probe_urls)]
    for target in jobs["engram-probe"]["static_configs"]:
        target["targets"] = [f"{url}/{target['labels']['probe']}" for url in probed]
    jobs["engram-probe"]["relabel_configs"][-1]["replacement"] = f"{LOOPBACK}:{settings.probe_port}"
    return configuration


def probe_configuration(gateway_url: str) -> dict[str, Any]:
    """`probe.yml`; a certificate is for the gateway's public name, which the loopback is not."""
    configuration = _source("probe.yml")
    if gateway_url.startswith("https:"):
        configuration["modules"]["engram"]["http"]["tls_config"] = {"insecure_skip_verify": True}
    return configuration


def alertmanager_configuration(settings: Settings) -> dict[str, Any]:
    """`alertmanager.yml` with the bridge of this stack; everybody else in it stays as they are."""
    configuration = _source("alertmanager.yml")
    receivers = {receiver["name"]: receiver for receiver in configuration["receivers"]}
    for name, path in (("bridge", "alerts"), ("heartbeat", "heartbeat")):
        webhook = receivers[name]["webhook_configs"][0]
        webhook["url"] = f"http://{LOOPBACK}:{settings.bridge_port}/{path}"
        webhook["http_config"]["authorization"]["credentials_file"] = str(token_file(settings))
    minute_seconds = settings.monitoring_minute_seconds
    for route in (configuration["route"], *configuration["route"]["routes"]):
        for name in _TIMES_OF_A_ROUTE:
            if name in route:
                route[name] = shorten_duration(route[name], minute_seconds)
    return configuration


def _scrape_times(settings: Settings) -> tuple[float, float]:
    """The interval and the time-out, which must not be longer."""
    interval_seconds = shorten(settings.monitoring_scrape_seconds, settings.monitoring_minute_seconds)
    return interval_seconds, min(10.0, interval_seconds)


def _write_prometheus(settings: Settings, gateway_url: str, directory: Path) -> None:
    rules_dir = directory / "rules"
    rules_dir.mkdir(parents=True, exist_ok=True)
    rules = load()
    for stale in rules_dir.glob("*.yml"):
        if stale.name not in rules:
            stale.unlink()
    for name, document in rules.items():
        _write(rules_dir / name, shorten_rules(document, settings.monitoring_minute_seconds))
    _write(directory / "prometheus.yml", prometheus_configuration(settings, gateway_url, rules_dir))


def _source(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((SOURCE / name).read_text())
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_file(path, yaml.safe_dump(document, sort_keys=False, width=1_000).encode())
