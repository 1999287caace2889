"""A real OpenID provider (npm `oidc-provider`) whose keys rotate and whose key set breaks on demand."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway_stack import AUDIENCE, SCOPES
from tests.node_fixtures import npm_install

SOURCE = Path(__file__).parent / "oidc_provider"


class Provider:
    """`keys` maps a key's id to its algorithm; who may ask for tokens are the `clients`, named as their tenants."""

    def __init__(self, origin: str, secret: str) -> None:
        self.origin = origin
        self._secret = secret
        self._http = httpx.Client(base_url=origin, timeout=30, trust_env=False)

    @property
    def url(self) -> str:
        """Where its key set is."""
        return f"{self.origin}/jwks"

    @property
    def fetches(self) -> int:
        """How often the key set was asked for."""
        count: int = self._ask().get("fetches", 0)
        return count

    def publish(self, **keys: str) -> None:
        self._ask(keys=[{"kid": kid, "alg": algorithm} for kid, algorithm in keys.items()])

    def admit(self, *clients: str) -> None:
        self._ask(clients=clients)

    def break_down(self, fault: str) -> None:
        """500, hang, drip, slow, garbage, oversized or empty; "" is well again, and ends what hangs."""
        self._ask(fault=fault)

    def token(self, client: str, kid: str, ttl_seconds: int = 600) -> str:
        """An access token for this client's tenant, signed with that key."""
        self._ask(ttl=ttl_seconds)
        form = {"grant_type": "client_credentials", "scope": SCOPES, "resource": f"urn:engram:{kid}"}
        answer = self._http.post("/token", data=form, auth=(client, self._secret))
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["access_token"]
        return token

    def close(self) -> None:
        self._http.close()

    def _ask(self, **changes: Any) -> dict[str, Any]:
        answer = self._http.post("/control", json=changes) if changes else self._http.get("/control")
        assert answer.status_code == 200, answer.text
        state: dict[str, Any] = answer.json()
        return state


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    """One process for the session; it ends with the pipe to it, however the tests end."""
    directory = tmp_path_factory.mktemp("oidc-provider")
    for name in ("package.json", "server.mjs"):
        shutil.copy(SOURCE / name, directory)
    node = npm_install(directory)
    secret = secrets.token_hex(16)
    environment = os.environ | {"AUDIENCE": AUDIENCE, "SECRET": secret, "TENANT_CLAIM": "tenant_id"}
    log_path = directory / "stderr.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(node), "server.mjs"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin is not None and process.stdout is not None
    origin = process.stdout.readline().decode().strip()
    assert origin, log_path.read_text()
    running = Provider(origin, secret)
    yield running
    running.close()
    process.stdin.close()
    try:
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
