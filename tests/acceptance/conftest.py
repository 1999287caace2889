"""One whole stack for all acceptance tests: `engram up --detach`, as a person would start it."""

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from deployments import issuer
from shared import registry
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.environment_fixtures import bare
from tests.forked_python import ForkedPython

ENGRAM = (sys.executable, "-m", "deployments.cli")


@dataclass
class Stack:
    """The running stack, reached only from outside: command line, HTTP, PostgreSQL, files."""

    environment: dict[str, str]
    status: dict[str, Any]
    ca: Path | None = None
    program: tuple[str, ...] = ENGRAM

    @property
    def data_dir(self) -> Path:
        return Path(self.status["data_dir"])

    def engram(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.program, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        if check:
            assert done.returncode == 0, f"engram {' '.join(words)}: {done.returncode}\n{done.stderr}\n{done.stdout}"
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self.engram(*words, "--json").stdout)

    def prefect(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        user, _, password = self.environment.get("PREFECT_API_AUTH_STRING", "").partition(":")
        url, auth = f"{self.status['prefect_api_url']}/{path}", (user, password) if user else None
        # verify: no TLS is spoken, and reading all authorities takes longer than the answer
        answer = httpx.request(method, url, json=body, auth=auth, timeout=30, verify=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.status["control_plane_url"]) as connection:
            return connection.execute(statement, parameters).fetchall()  # type: ignore[call-overload, no-any-return]

    def without_the_minutes_sweep(self) -> None:
        """Pause its schedule: a process each minute on a machine that has enough to do. The resident drain sweeps every
        two seconds all the same."""
        sweep = self.prefect("GET", "deployments/name/sweep/sweep")
        self.prefect("POST", f"deployments/{sweep['id']}/pause_deployment")

    @property
    def settings(self) -> Settings:
        """Those with which a command beside the stack makes tenants and tokens."""
        machine_id = self.environment.get("ENGRAM_MACHINE_ID", Settings.model_fields["machine_id"].default)
        url, issuer_url = self.status["control_plane_url"], self.status["issuer"]
        return Settings(data_dir=self.data_dir, control_plane_url=url, jwt_issuer=issuer_url, machine_id=machine_id)

    def create(self, tenant_id: str) -> None:
        """What `engram tenant create` does (`tests/test_readme.py` runs it), without a process of its own."""
        with ControlPlane(self.settings) as control_plane:
            registry.create(control_plane, self.settings, tenant_id)

    def tenant(self, tenant_id: str) -> httpx.Client:
        """Make a tenant and return a client that carries its token."""
        self.create(tenant_id)
        token, _ = issuer.mint(self.settings, tenant_id)
        return httpx.Client(
            base_url=self.status["gateway_url"],
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
            verify=ssl.create_default_context(cafile=self.ca) if self.ca else True,
        )


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environment = bare()
    environment["ENGRAM_DATA_DIR"] = str(tmp_path_factory.mktemp("stack"))
    environment["ENGRAM_USAGE_STORAGE_SECONDS"] = "10"
    environment |= dict.fromkeys(("ENGRAM_DRAIN_RUN_SECONDS", "ENGRAM_DRAIN_LINGER_SECONDS"), "12")  # a minute, else
    environment["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "10"  # a minute, else
    with running(environment) as started:
        yield started


@contextmanager
def running(environment: dict[str, str], ca: Path | None = None) -> Iterator[Stack]:
    """A stack with these variables; `ca` signed its gateway's certificate."""
    started = Stack(environment, {}, ca)
    started.engram("up", "--detach")
    try:
        started.status = started.json("status")
        started.without_the_minutes_sweep()
        with closing(ForkedPython(environment)) as python:
            yield replace(started, program=(str(python.program),))
    finally:
        started.engram("down")
