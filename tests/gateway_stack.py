"""A real gateway for tests: PostgreSQL, an issuer over HTTP with keys made here, Granian with two workers.

`stack` is started once a session. Tests that kill things start a gateway of their own with `gateway(...)`, on
the same PostgreSQL and issuer. Nothing is mocked; a test that needs a broken part breaks the part.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from deployments.postgres import EmbeddedPostgres
from shared import registry, spool
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.usage import UsageEvent
from tests.core_fixtures import poll_seconds
from tests.http_fixtures import Handler, Server
from tests.ports import free_port

AUDIENCE = "engram"
ISSUER = "https://issuer.test"
SCOPES = "memories:read memories:write search"
_numbers = itertools.count(1)


def eventually(check: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Poll until `check` answers something true; an exception counts as no. The limit only ends a broken test."""
    began = time.monotonic()
    last: object = None
    while time.monotonic() < began + seconds:
        try:
            last = check()
            if last:
                return last
        except (httpx.HTTPError, AssertionError, OSError, psutil.Error) as e:
            last = e
        time.sleep(max(0.05, poll_seconds(began)))
    raise AssertionError(f"never came true: {last!r}")


@contextlib.contextmanager
def control_plane_url(directory: Path) -> Iterator[str]:
    """A PostgreSQL of our own, migrated by the caller."""
    with EmbeddedPostgres(directory, free_port()) as postgres:
        yield postgres.url()


@dataclass
class SigningKey:
    kid: str | None
    algorithm: str
    private: Any

    def jwk(self) -> dict[str, Any]:
        algorithm = jwt.get_algorithm_by_name(self.algorithm)
        found: dict[str, Any] = algorithm.to_jwk(self.private.public_key(), as_dict=True)
        found.pop("key_ops", None)
        return {**found, **({} if self.kid is None else {"kid": self.kid}), "use": "sig"}


def new_key(algorithm: str, kid: str | None = None, bits: int = 2_048) -> SigningKey:
    kid = kid or f"key-{next(_numbers)}"
    match algorithm:
        case "RS256":
            return SigningKey(kid, algorithm, rsa.generate_private_key(65_537, bits))
        case "ES256":
            return SigningKey(kid, algorithm, ec.generate_private_key(ec.SECP256R1()))
        case _:
            return SigningKey(kid, algorithm, ed25519.Ed25519PrivateKey.generate())


class Issuer:
    """Publishes `keys` over HTTP; `failing` answers 500, `delay` holds an answer back. Counts fetches."""

    def __init__(self) -> None:
        self.keys = [new_key("ES256"), new_key("RS256"), new_key("EdDSA")]
        self.extra: list[Any] = []
        self.failing = False
        self.fetches = 0
        self.delay = threading.Event()
        self.delay.set()
        issuer = self

        class Keys(Handler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                body = json.dumps({"keys": [k.jwk() for k in issuer.keys] + issuer.extra}).encode()
                issuer.delay.wait(10)
                self.reply(500 if issuer.failing else 200, body)

        self._server = Server(Keys)

    @property
    def url(self) -> str:
        return f"{self._server.url}/jwks.json"

    def close(self) -> None:
        self.delay.set()
        self._server.close()

    def claims(self, tenant_id: str, /, **changes: Any) -> dict[str, Any]:
        """Good claims with `changes`; a change to `...` removes the claim."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "exp": now + 600,
            "iat": now,
            "tenant_id": tenant_id,
            "scope": SCOPES,
        }
        return {k: v for k, v in (claims | changes).items() if v is not ...}

    def token(
        self, tenant_id: str, /, *, key: SigningKey | None = None, header: dict[str, Any] | None = None, **changes: Any
    ) -> str:
        key = key or self.keys[0]
        return sign(key, self.claims(tenant_id, **changes), header)


def sign(key: SigningKey, claims: Any, header: dict[str, Any] | None = None) -> str:
    """A token with exactly these claims; our own assembly, because PyJWT refuses to make the bad ones."""
    head = {"alg": key.algorithm, "typ": "JWT", "kid": key.kid} | (header or {})
    head = {k: v for k, v in head.items() if v is not ...}
    payload = claims if isinstance(claims, str) else json.dumps(claims)
    signed = segment(json.dumps(head)) + "." + segment(payload)
    signature = jwt.get_algorithm_by_name(key.algorithm).sign(signed.encode(), key.private)
    return signed + "." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


def segment(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


@dataclass
class Gateway:
    """A running gateway; `client` speaks to it as whoever the headers say."""

    process: subprocess.Popen[bytes]
    url: str
    data_dir: Path
    log_path: Path
    ca: Path | None = None  # of a gateway that ends TLS itself
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        verify = ssl.create_default_context(cafile=self.ca) if self.ca else True
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=verify)

    def workers(self) -> list[psutil.Process]:
        """The worker processes: children with a listening socket."""
        children = psutil.Process(self.process.pid).children()
        return [c for c in children if any(x.status == psutil.CONN_LISTEN for x in c.net_connections("tcp"))]

    def log(self) -> list[dict[str, Any]]:
        """The whole lines; the last one may be half written."""
        return [json.loads(line) for line in self.log_path.read_text().rpartition("\n")[0].splitlines()]

    def access_line(self, request_id: str) -> dict[str, Any]:
        """The access line of one request, once the worker wrote it."""
        found: dict[str, Any] = eventually(
            lambda: next((x for x in self.log() if x.get("request_id") == request_id and "latency_ms" in x), None)
        )
        return found

    def events(self, tenant_id: str) -> list[UsageEvent]:
        """The tenant's events in all segments, sealed or not."""
        directory = self.data_dir / "spool"
        for _ in range(20):  # a segment may be sealed (renamed) between listing and reading
            with contextlib.suppress(FileNotFoundError):
                # In this order: one that is sealed between the two listings is then in both, and read again.
                paths = sorted([*directory.glob("*.open"), *directory.glob("*.seg")])
                return [e for p in paths for e in spool.read(p).events if e.tenant_id == tenant_id]
        raise AssertionError("segments keep moving")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def serves(self, path: str) -> bool:
        """Whether it answers 200. One that has ended never will, and says in its log why."""
        if self.process.poll() is not None:
            raise RuntimeError(
                f"the gateway ended with {self.process.returncode}: {self.log_path.read_text()[-4_000:]}"
            )
        return self.client.get(path).status_code == 200

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


@contextlib.contextmanager
def gateway(
    data_dir: Path,
    control_plane: str,
    issuer: Issuer,
    *,
    ready_path: str = "/ready",
    module: str = "gateway.serve",
    arguments: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
    ca: Path | None = None,
    **settings: Any,
) -> Iterator[Gateway]:
    """`engram serve` in a process of its own, ready; killed with its workers if it is still there at the end. With
    `ca`, whose certificate the settings name, it is spoken to over TLS; `variables` are not settings."""
    port = settings.get("gateway_port") or free_port()
    values = {
        "data_dir": data_dir,
        "control_plane_url": control_plane,
        "jwks_url": issuer.url,
        "jwt_issuer": ISSUER,
        "gateway_port": port,
        "gateway_workers": 2,
        "usage_flush_seconds": 0.2,
        "usage_fsync_seconds": 0.1,
        "tenant_refresh_seconds": 0.3,
        "tenant_lock_wait_seconds": 1,
        "database_wait_seconds": 20,  # a fsync may take seconds where others test too
        "jwks_cooldown_seconds": 0.2,
        "body_limit_bytes": 500_000,
        "gateway_kill_timeout_seconds": 10,
        "metrics_cache_seconds": 0,
        "admin_rps": 1_000,
        "admin_burst": 1_000,
        "mcp_at_start": False,  # most of these gateways are never asked for it
    } | settings
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PROMETHEUS_"))}
    environment |= {f"ENGRAM_{k.upper()}": str(v) for k, v in values.items()} | dict(variables or {})
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = data_dir / f"gateway-{port}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=environment, stderr=log, stdout=subprocess.DEVNULL
        )
    started = Gateway(process, f"{'https' if ca else 'http'}://127.0.0.1:{port}", data_dir, log_path, ca)
    workers: list[psutil.Process] = []
    try:
        eventually(lambda: started.serves(ready_path), 150)
        workers = eventually(lambda: w if len(w := started.workers()) == values["gateway_workers"] else None)
        yield started
    finally:
        started.client.close()
        with contextlib.suppress(psutil.Error):
            workers += psutil.Process(process.pid).children()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.kill()


@dataclass
class Stack:
    gateway: Gateway
    issuer: Issuer
    control_plane: ControlPlane
    control_plane_url: str
    settings: Settings

    def tenant(self) -> str:
        """A new active tenant with an empty database."""
        tenant_id = f"tenant-{next(_numbers)}"
        registry.create(self.control_plane, self.settings, tenant_id)
        return tenant_id

    @functools.cached_property
    def idle_tenant(self) -> str:
        """One tenant for all tests that leave nothing behind in its database."""
        return self.tenant()

    def lend_tenants(self, data_dir: Path) -> Path:
        """Make it a data directory with the stack's tenants, and with a spool and limits of its own, for another
        gateway beside the stack's."""
        data_dir.mkdir(exist_ok=True)
        (data_dir / "tenants").symlink_to(self.settings.tenants_dir)
        return data_dir

    def headers(self, tenant_id: str, /, **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.issuer.token(tenant_id, **claims)}"}

    def client(self, tenant_id: str, /, **claims: Any) -> httpx.Client:
        """A client with a good token of this tenant."""
        return httpx.Client(
            base_url=self.gateway.url, headers=self.headers(tenant_id, **claims), timeout=30, trust_env=False
        )


_STACK = pytest.StashKey[Stack]()


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> Stack:
    """The session's stack. Kept in the stash: a session fixture imported by many modules would start many."""
    if _STACK not in request.config.stash:
        closing = contextlib.ExitStack()
        request.config.add_cleanup(closing.close)
        directory = Path(closing.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        url = closing.enter_context(control_plane_url(directory / "control-plane"))
        settings = Settings(data_dir=directory / "data", control_plane_url=url)  # type: ignore[arg-type]
        control_plane = closing.enter_context(ControlPlane(settings))
        control_plane.migrate()
        issuer = Issuer()
        closing.callback(issuer.close)
        running = closing.enter_context(gateway(settings.data_dir, url, issuer, mcp_at_start=True))
        request.config.stash[_STACK] = Stack(running, issuer, control_plane, url, settings)
    return request.config.stash[_STACK]


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Every error is a problem document that carries its own request id."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "request_id"} <= document.keys()
    assert document["status"] == status
    assert document["request_id"] == response.headers["x-request-id"]
    if status in (429, 503):
        assert response.headers["retry-after"] == str(document["retry_after"])
    return document
