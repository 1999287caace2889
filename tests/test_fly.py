"""The files for Fly.io, held to the code: nothing of Fly runs here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from deployments import monitoring
from deployments import parts as composition
from deployments.ports import PortReservations
from deployments.postgres import EmbeddedPostgres
from deployments.stack import _HURRIED_STOP_SECONDS
from gateway.proxies import Proxies
from shared.metrics import ROUTES
from shared.safety import NOT_WATCHERS, unsafe
from shared.settings import Settings
from tests.environment_fixtures import REDIS_URLS, SAFE, engram

DIRECTORY = Path(__file__).resolve().parent.parent / "deployments" / "fly"
MACHINE_TEXT = (DIRECTORY / "engram.toml").read_text()
MACHINE = tomllib.loads(MACHINE_TEXT)
PREFECT_TEXT = (DIRECTORY / "prefect.toml").read_text()
PREFECT = tomllib.loads(PREFECT_TEXT)
MONITORING_TEXT = (DIRECTORY / "monitoring.toml").read_text()
MONITORING = tomllib.loads(MONITORING_TEXT)
PREFECT_SECRETS = set(re.findall(r"([A-Z][A-Z0-9_]+)=…", PREFECT_TEXT))
FLY_KILL_TIMEOUT_MOST_SECONDS = 300
SECRETS = re.findall(r"([A-Z][A-Z0-9_]+)=…", MACHINE_TEXT)


def configured(tmp_path: Path, **more: Any) -> Settings:
    """prod on a data machine, with a free port and a directory that exists here."""
    given = {k.removeprefix("ENGRAM_").lower(): v for k, v in (SAFE | MACHINE["env"]).items()}
    return Settings(**{**given, "data_dir": tmp_path, "gateway_port": 0, "gateway_host": "127.0.0.1", **more})


def test_the_named_secrets_and_the_file_are_a_safe_environment_and_each_is_needed() -> None:
    """Whoever follows the file's own comment gets a machine that starts; whoever forgets one is told which."""
    secrets = {name: SAFE[name] for name in SECRETS}
    done = engram("config", "check", **MACHINE["env"], **secrets)
    assert (done.returncode, done.stdout) == (0, "prod: nothing to object to\n"), done.stderr
    for name in SECRETS:
        if name == "ENGRAM_S3_ENDPOINT":
            continue  # without it, AWS's own
        lacking = engram("config", "check", **MACHINE["env"], **{k: v for k, v in secrets.items() if k != name})
        assert lacking.returncode == 3 and name in lacking.stderr, name


def test_no_secret_has_a_value_in_the_files() -> None:
    """They are committed, and Fly shows [env] to everybody in the organisation."""
    secret = {
        f"ENGRAM_{name.upper()}" for name, field in Settings.model_fields.items() if field.annotation is SecretStr
    }
    for text, file in ((MACHINE_TEXT, MACHINE), (PREFECT_TEXT, PREFECT), (MONITORING_TEXT, MONITORING)):
        assert not (secret | PREFECT_SECRETS) & set(file["env"])
        assert not re.search(r"://[^/\s]*:[^/\s]*@", text)


@pytest.mark.parametrize("point_in_time", ["off", "litestream"])
def test_fly_waits_longer_than_a_stop_can_take(tmp_path: Path, point_in_time: str) -> None:
    """SIGKILL before the drain's last pass leaves usage on the volume until the next start, at best."""
    settings = configured(tmp_path, point_in_time=point_in_time)
    ports = PortReservations()
    try:
        planned = composition.plan(settings, ports)
    finally:
        ports.release_all()
    assert (planned.postgres, planned.issuer, planned.prefect) == (None, None, None), "no embedded part in prod"
    parts = [p for p in (planned.worker, planned.drain, planned.litestream, planned.gateway) if p is not None]
    longest = len(parts) * settings.stop_timeout_seconds + _HURRIED_STOP_SECONDS
    assert longest < MACHINE["kill_timeout"] <= FLY_KILL_TIMEOUT_MOST_SECONDS
    # And within the gateway's own share: its requests, then its usage on disk.
    flush = settings.usage_flush_seconds + settings.usage_fsync_seconds
    assert settings.gateway_kill_timeout_seconds + flush < settings.stop_timeout_seconds
    assert MACHINE["kill_signal"] == "SIGTERM"


def test_the_release_command_migrates_an_empty_control_plane_and_needs_no_volume(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Fly runs it on a machine of its own, before anything is replaced; its words follow the image's entrypoint."""
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE released")
    url, volume = postgres.url("released"), tmp_path / "volume"
    here = {
        "ENGRAM_ENV": "dev",
        "ENGRAM_CONTROL_PLANE_URL": url,
        "ENGRAM_DATA_DIR": str(volume),
    }  # prod takes no local one
    command = MACHINE["deploy"]["release_command"].split()
    for said in ("applied 0001", "up to date"):
        done = engram(*command, **{**SAFE, **MACHINE["env"], **here})
        assert done.returncode == 0 and done.stderr.startswith(said), done.stderr
    assert not volume.exists()


def test_checks_and_metrics_ask_for_routes_that_exist_where_the_gateway_listens() -> None:
    """A check of a path that is gone takes the machine out of service."""
    port = Settings.model_fields["gateway_port"].default
    service, alive, metrics = MACHINE["http_service"], MACHINE["checks"]["alive"], MACHINE["metrics"]
    assert service["internal_port"] == alive["port"] == metrics["port"] == port
    assert [service["checks"][0]["path"], alive["path"], metrics["path"]] == ["/ready", "/health", "/metrics"]
    assert {"/ready", "/health", "/metrics"} <= set(ROUTES)
    assert MACHINE["mounts"]["destination"] == MACHINE["env"]["ENGRAM_DATA_DIR"]


def test_a_machine_is_never_stopped_for_want_of_requests_nor_limited_below_the_gateway() -> None:
    """The drain and the schedules need no request; who is to be refused the gateway decides, by class."""
    settings = Settings()
    assert MACHINE["http_service"]["auto_stop_machines"] == PREFECT["services"][0]["auto_stop_machines"] == "off"
    most = settings.gateway_workers * settings.inflight_requests
    assert MACHINE["http_service"]["concurrency"]["soft_limit"] > most


def test_a_request_for_a_tenant_of_another_machine_finds_its_app_and_its_gateway() -> None:
    """The setting derives both from a machine's id; the comment tells which id belongs to which app."""
    env = MACHINE["env"]
    assert env["ENGRAM_ROUTING"] == "fly-replay"
    apps, urls = env["ENGRAM_ROUTING_APPS"], env["ENGRAM_ROUTING_URLS"]
    assert apps.format(machine_id="data-1") == MACHINE["app"] and "Set ENGRAM_MACHINE_ID (data-1)" in MACHINE_TEXT
    assert "-a engram-data-2 and ENGRAM_MACHINE_ID=data-2" in MACHINE_TEXT
    port = MACHINE["http_service"]["internal_port"]
    assert urls == f"http://{apps}.internal:{port}"
    # .internal is IPv6 and comes around the proxy, which asks over IPv4 (fly.io/docs/networking/app-services).
    assert env["ENGRAM_GATEWAY_HOST"] == "::"


def test_what_another_machine_passes_on_is_believed_and_what_a_stranger_sends_is_not() -> None:
    """Over the private network (fdaa::/16) requests travel in plain text, and whose they are stands in a field."""
    proxies = Proxies(Settings(**{k.removeprefix("ENGRAM_").lower(): v for k, v in MACHINE["env"].items()}))

    def client(peer: str) -> tuple[str, str]:
        headers = [(b"fly-client-ip", b"198.51.100.1"), (b"x-forwarded-proto", b"https")]
        scope = {"client": (peer, 5), "scheme": "http", "headers": headers}
        proxies.settle(scope)
        return scope["client"][0], scope["scheme"]  # type: ignore[return-value]

    assert client("fdaa:0:1:a7b::2") == client("172.19.0.1") == ("198.51.100.1", "https")
    assert client("2001:db8::1") == ("2001:db8::1", "http")


def test_the_machine_finds_the_prefect_server_in_the_private_network() -> None:
    """Two files that must agree; the server has no public address, and asks for a credential all the same."""
    assert MACHINE["env"]["PREFECT_API_URL"] == f"http://{PREFECT['app']}.flycast/api"
    service = PREFECT["services"][0]
    assert service["ports"] == [{"port": 80, "handlers": ["http"]}]
    assert service["internal_port"] == int(PREFECT["processes"]["api"].split()[-1])
    assert service["processes"] == ["api"]
    assert "--no-public-ips" in PREFECT_TEXT and "http_service" not in PREFECT
    assert {"PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"} <= PREFECT_SECRETS


def test_the_prefect_server_has_replicas_one_process_for_the_services_and_its_migrations_before_them() -> None:
    """Of two replicas that migrate an empty database one dies; without the services nothing is scheduled."""
    processes = {name: words.split() for name, words in PREFECT["processes"].items()}
    assert processes["api"][:3] == ["server", "start", "--no-services"]
    assert processes["services"] == ["server", "services", "start"]
    assert PREFECT["deploy"]["release_command"] == "server database upgrade --yes"
    assert PREFECT["experimental"]["entrypoint"] == ["prefect"], "all three are arguments of it"
    assert set(REDIS_URLS) <= PREFECT_SECRETS
    assert f"api={PREFECT['services'][0]['min_machines_running']} services=1" in PREFECT_TEXT


def test_the_machine_that_watches_is_given_what_it_uses_and_each_of_it_is_needed() -> None:
    """No key of the backups or the control plane; without the heartbeat nobody would miss it, so it does not start."""
    secrets = re.findall(r"([A-Z][A-Z0-9_]+)=…", MONITORING_TEXT)
    assert secrets == ["PREFECT_API_AUTH_STRING", "ENGRAM_BRIDGE_TOKEN", "ENGRAM_HEARTBEAT_URL"]
    values = {name: SAFE.get(name, "https://switch.test/a-long-key") for name in secrets}
    given = {k.removeprefix("ENGRAM_").lower(): v for k, v in (MONITORING["env"] | values).items()}
    assert unsafe(Settings(**given), NOT_WATCHERS) == []
    for name in ("PREFECT_API_AUTH_STRING", "ENGRAM_HEARTBEAT_URL", "PREFECT_API_URL"):
        lacking = {k: v for k, v in (MONITORING["env"] | values).items() if k != name}
        done = engram("monitor", **lacking)
        assert done.returncode == 3 and name in done.stderr, name
    for name in ("ENGRAM_MONITORING_TARGETS", "ENGRAM_MONITORING_PROBE_URLS"):
        lacking = {k: v for k, v in (MONITORING["env"] | values).items() if k != name}
        done = engram("monitor", **lacking)
        assert done.returncode == 1 and name in done.stderr, name


def test_the_machine_that_watches_is_found_by_those_it_watches_and_finds_them() -> None:
    """Three files that must agree; nothing of it has a public address."""
    port = Settings.model_fields["prometheus_port"].default
    assert MACHINE["env"]["ENGRAM_PROMETHEUS_URL"] == f"http://{MONITORING['app']}.internal:{port}"
    env = MONITORING["env"]
    assert env["ENGRAM_PROMETHEUS_HOST"] == "::", "the private network is IPv6"
    assert env["ENGRAM_MONITORING_TARGETS"] == f"{MACHINE['app']}.internal:{MACHINE['metrics']['port']}"
    assert env["ENGRAM_MONITORING_PROBE_URLS"] == f"https://{MACHINE['app']}.fly.dev"
    assert env["PREFECT_API_URL"] == MACHINE["env"]["PREFECT_API_URL"]
    assert MONITORING["checks"]["alive"]["port"] == port
    assert not {"http_service", "services"} & MONITORING.keys() and "--no-public-ips" in MONITORING_TEXT
    assert MONITORING["primary_region"] != MACHINE["primary_region"]


def test_the_machine_that_watches_runs_its_image_on_its_volume_and_is_given_time_to_stop(tmp_path: Path) -> None:
    """The wrong target has none of the programs; SIGKILL costs Prometheus its last samples and a long start."""
    target = re.findall(r"--build-target (\w+)", MONITORING_TEXT)
    assert target == ["monitoring"]
    assert re.search(rf" AS {target[0]}$", (DIRECTORY.parent / "Dockerfile").read_text(), re.MULTILINE)
    assert MONITORING["mounts"]["destination"] == MONITORING["env"]["ENGRAM_DATA_DIR"]
    assert "-v engram_monitoring:/data" in MONITORING_TEXT and MONITORING["mounts"]["source"] == "engram_monitoring"
    longest = len(monitoring.PORTS) * (Settings().stop_timeout_seconds + 2 * _HURRIED_STOP_SECONDS)
    assert longest < MONITORING["kill_timeout"] <= FLY_KILL_TIMEOUT_MOST_SECONDS
    assert MONITORING["kill_signal"] == "SIGTERM"
    assert MONITORING["restart"] == [{"policy": "always"}], "it ends with any of its parts"
