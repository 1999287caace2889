"""Prefect as production runs it: PostgreSQL, Redis, two API replicas behind a balancer, the services apart,
authentication on, one machine's workers."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from prefect import flow
from pydantic import SecretStr

from deployments import orchestration
from deployments.postgres import EmbeddedPostgres
from deployments.process import Child
from shared import queues
from shared.settings import Settings
from tests.environment_fixtures import REDIS_URLS
from tests.ports import free_ports
from tests.prefect_proxies import balancer

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 200.0
MACHINE = "here"
WORKER_LIMIT = 2
# What one replica is told must reach all: the names of the brokers are the shipped file's, so that they are tried.
REPLICA: dict[str, str] = tomllib.loads((ROOT / "deployments/fly/prefect.toml").read_text())["env"]


@flow(name="busy")
def busy(file: str) -> None:
    """What fills a worker: it runs until `file` is gone."""
    deadline = time.monotonic() + 200
    while Path(file).exists() and time.monotonic() < deadline:
        time.sleep(0.1)


@contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """With a password, as production's; nothing is kept but every command, so that it can be asked who came."""
    program, port, password = shutil.which("redis-server"), free_ports(1)[0], secrets.token_hex(8)
    if program is None:
        pytest.fail("redis-server is missing: apt-get install redis-server")
    configuration = directory / "redis.conf"
    lines = ("bind 127.0.0.1", f"port {port}", f"requirepass {password}", 'save ""', f"dir {directory}")
    every_command = ("slowlog-log-slower-than 0", "slowlog-max-len 1000000")
    configuration.write_text("\n".join((*lines, *every_command)) + "\n")
    server = subprocess.Popen([program, str(configuration)], stdout=subprocess.DEVNULL)
    try:
        yield f"redis://:{password}@127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(30)


@dataclass
class Production:
    """The processes and how to reach them. Replica 0 and 1 are the API's, None is the balancer before them."""

    directory: Path
    database_url: str
    control_plane_url: str
    redis_url: str
    ports: list[int]
    balanced: int
    auth: str = field(default_factory=lambda: f"engram:{secrets.token_hex(16)}")
    children: dict[str, Child] = field(default_factory=dict)

    def api(self, replica: int | None = None) -> str:
        return f"http://127.0.0.1:{self.balanced if replica is None else self.ports[replica]}/api"

    def settings(self, replica: int | None = None, **more: Any) -> Settings:
        given: dict[str, Any] = {
            "data_dir": self.directory / "data",
            "control_plane_url": SecretStr(self.control_plane_url),
            "prefect_api_url": self.api(replica),
            "prefect_api_auth_string": SecretStr(self.auth),
            "machine_id": MACHINE,
        }
        return Settings(**(given | more))

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
        ours = {
            "ENGRAM_DATA_DIR": str(self.directory / "data"),
            "ENGRAM_CONTROL_PLANE_URL": self.control_plane_url,
            "ENGRAM_MACHINE_ID": MACHINE,
            "ENGRAM_PREFECT_WORKER_LIMIT": str(WORKER_LIMIT),
            "PYTHONPATH": str(ROOT),
            "PATH": os.defpath,  # a service's: nobody activated this environment
        }
        return kept | ours | orchestration.client_environment(self.settings())

    def call(self, method: str, path: str, body: Any = None, *, replica: int | None = None) -> Any:
        user, _, password = self.auth.partition(":")
        url, auth = f"{self.api(replica)}/{path}", (user, password)
        # verify: no TLS is spoken, and reading all authorities takes longer than the answer
        answer = httpx.request(method, url, json=body, auth=auth, timeout=30, verify=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def start_run(self, deployment: str, parameters: dict[str, Any], **more: Any) -> str:
        found = self.call("GET", f"deployments/name/{deployment}")["id"]
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}} | more
        return str(self.call("POST", f"deployments/{found}/create_flow_run", body)["id"])

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("POST", "flow_runs/filter", filters)
        return found

    def state(self, run_id: str) -> str:
        return str(self.call("GET", f"flow_runs/{run_id}")["state_type"])

    def rows(self, statement: str, *parameters: object, **named: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            done = connection.execute(statement, parameters or named)  # type: ignore[call-overload]
            return list(done.fetchall()) if done.description else []

    def child(self, name: str, argv: list[str], ready: Callable[[], bool], more: dict[str, str] | None = None) -> Child:
        env = self.environment() | (more or {})
        made = Child(name, argv, env=env, log_path=self.directory / f"{name}.log", ready=ready)
        self.children[name] = made
        return made

    def server(self, name: str, *words: str, ready: Callable[[], bool] = lambda: True, **more: str) -> Child:
        """A process of the server, not started, with the settings that the Fly file gives."""
        told = REPLICA | orchestration.server_environment(self.settings(), self.database_url)
        redis = dict.fromkeys(REDIS_URLS, self.redis_url)
        told |= {"PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "4"}  # instead of half a minute
        told |= {"PREFECT_HOME": str(self.directory / name)}  # they are machines of their own
        argv = [sys.executable, "-m", "prefect", "server", *words]
        return self.child(name, argv, ready, told | redis | more)

    def replica(self, n: int) -> Child:
        return self.server(
            f"api-{n}",
            *("start", "--no-services", "--host", "127.0.0.1", "--port", str(self.ports[n])),
            ready=lambda: orchestration.http_ok(f"{self.api(n)}/health"),
        )

    def services(self) -> Child:
        loops = {"DB_VACUUM": "2", "SCHEDULER": "5"}  # instead of an hour and a minute
        return self.server(
            *("services", "services", "start"),
            **{f"PREFECT_SERVER_SERVICES_{name}_LOOP_SECONDS": seconds for name, seconds in loops.items()},
        )

    def done(self, child: Child) -> None:
        """Run it to its end."""
        child.start()
        wait_for(lambda: not child.alive(), READY_SECONDS)
        assert child.exit_reason() == "exit code 0", child.failure("failed")


def wait_for(holds: Callable[[], object], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


@contextmanager
def running(postgres: EmbeddedPostgres, control_plane_url: str) -> Iterator[Production]:
    """Everything but the workers, with the deployments applied. The control plane is migrated."""
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE prefect_production")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefect-")))
        ports = free_ports(2)
        found = Production(
            directory,
            postgres.url("prefect_production"),
            control_plane_url,
            stack.enter_context(redis_server(directory)),
            ports,
            stack.enter_context(balancer(ports)),
        )
        stack.callback(lambda: [child.stop(10.0) for child in reversed(found.children.values())])
        found.done(found.server("upgrade", "database", "upgrade", "--yes"))
        for servers in ([found.replica(0), found.services()], [found.replica(1)]):  # of two at the first start one dies
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready(READY_SECONDS)
        found.done(found.child("deploy", orchestration.deploy_argv(found.settings()), lambda: True))
        sweep = found.call("GET", "deployments/name/sweep/sweep")["id"]
        found.call("PATCH", f"deployments/{sweep}", {"paused": True})  # one a minute would take the time of the others
        yield found


def start_worker(production: Production) -> Child:
    """This machine's two workers, in their one process; ready."""
    assert orchestration.ensure_queues(production.settings())
    started_at = time.time()
    child = production.child(
        "worker",
        orchestration.worker_argv(),
        lambda: orchestration.worker_online(production.settings(), started_at),
    )
    child.start()
    child.wait_ready(READY_SECONDS)
    return child


@pytest.fixture(scope="module")
def production(migrated_template: EmbeddedPostgres) -> Iterator[Production]:
    with psycopg.connect(migrated_template.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE prefect_tenants TEMPLATE migrated")
    with running(migrated_template, migrated_template.url("prefect_tenants")) as found:
        yield found


@pytest.fixture(scope="module")
def worker(production: Production) -> Child:
    return start_worker(production)


def deploy_busy(production: Production) -> str:
    """A deployment on `default` that fills places for as long as a file is there."""
    flow_id = production.call("POST", "flows/", {"name": "busy"})["id"]
    body = {
        "name": "busy",
        "flow_id": flow_id,
        "entrypoint": "tests.prefect_fixtures.busy",
        "pull_steps": [],
        "work_pool_name": "engram",
        "work_queue_name": queues.SHARED,
        "job_variables": yaml.safe_load((ROOT / "prefect.yaml").read_text())["definitions"]["work_pool"][
            "job_variables"
        ],
    }
    production.call("POST", "deployments/", body)
    return "busy/busy"
