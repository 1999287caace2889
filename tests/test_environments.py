"""dev, staging and prod as their clients meet them: one real gateway each, asked the same things over HTTP.

dev speaks plain HTTP, staging stands behind a proxy that ends TLS, prod ends TLS itself; nothing else is set but what
an environment must bring. The README's table is read here too: it says what was seen, not what was meant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from pydantic import SecretStr

from deployments import parts as composition
from deployments.ports import PortReservations
from shared import dry_run, environment, metering, segment
from shared.environment import ENVIRONMENTS
from shared.safety import unsafe
from shared.settings import Settings, variable
from tests.core_fixtures import ROOT
from tests.environment_fixtures import SAFE, engram
from tests.gateway_stack import ISSUER, Gateway, Issuer, Stack, assert_problem, eventually, gateway
from tests.gateway_stack import stack as shared_stack  # noqa: F401
from tests.http_fixtures import Handler, Server
from tests.metering_fixtures import query
from tests.test_gateway_quota import plan
from tests.tls_fixtures import Pair, pair

APP = "https://app.example"
README = (ROOT / "README.md").read_text()


@dataclass
class Place:
    """One environment's gateway, and what a browser or an agent adds to reach it the way its clients do."""

    env: str
    gateway: Gateway
    settings: Settings
    through: dict[str, str]

    def ask(self, path: str, method: str = "GET", **options: Any) -> httpx.Response:
        headers = self.through | options.pop("headers", {})
        return self.gateway.client.request(method, path, headers=headers, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("environments"))


@contextlib.contextmanager
def over_tls(issuer: Issuer, files: Pair) -> Iterator[str]:
    """The issuer's keys at an https address, as staging and prod insist."""

    class Keys(Handler):
        def do_GET(self) -> None:
            body = json.dumps({"keys": [key.jwk() for key in issuer.keys]}).encode()
            self.reply(200, body)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with Server(Keys, context) as server:
        yield f"https://{socket.gethostname()}:{server.server_port}/jwks.json"  # an issuer on localhost is refused


MACHINE = "here"  # "local" is refused outside dev, and another machine's tenants are not served


@pytest.fixture
def stack(shared_stack: Stack) -> Stack:  # noqa: F811
    """The session's, whose new tenants are on the machine that the gateways here are."""
    return dataclasses.replace(shared_stack, settings=shared_stack.settings.model_copy(update={"machine_id": MACHINE}))


_PLACES = pytest.StashKey[dict[str, Place]]()


@pytest.fixture(scope="module")
def closing() -> Iterator[contextlib.ExitStack]:
    """Ends the three gateways and removes what they kept, with this file."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def places(
    request: pytest.FixtureRequest, stack: Stack, files: Pair, closing: contextlib.ExitStack
) -> dict[str, Place]:
    """`engram serve` in each environment, as production runs it."""
    stash = request.config.stash
    if _PLACES not in stash:
        jwks_url = closing.enter_context(over_tls(stack.issuer, files))
        starts = {}
        for env in ENVIRONMENTS:
            # Not in /tmp, where staging and prod refuse to keep tenants.
            directory = tempfile.TemporaryDirectory(prefix=f"engram-{env}-", dir="/var/tmp")
            data_dir = Path(closing.enter_context(directory))
            stack.lend_tenants(data_dir)
            values = {
                "env": env,
                "gateway_workers": 1,
                "gateway_host": "127.0.0.1",
                "machine_id": MACHINE,
                "cors_allowed_origins": APP,
                "rate_limit_rps": 0.001,  # a tenant's first requests alone, so that the mode shows
                "rate_limit_burst": 20,
                "quota_refresh_seconds": 0.2,
            }
            if env != "dev":
                kept = {"ENGRAM_OBJECT_STORE_URL", "ENGRAM_S3_ENDPOINT", "ENGRAM_PROMETHEUS_URL"}
                values |= {k.removeprefix("ENGRAM_").lower(): v for k, v in SAFE.items() if k in kept}
                values |= {"jwks_url": jwks_url}
            if env == "staging":
                values |= {"trusted_proxies": "127.0.0.0/8", "usage_dry_run": True}
            if env == "prod":
                values |= files.settings()
            starts[env] = (data_dir, values)
        for env, (data_dir, values) in starts.items():
            running = closing.enter_context(
                gateway(
                    data_dir,
                    stack.control_plane_url,
                    stack.issuer,
                    module="deployments.cli",
                    arguments=("serve",),
                    variables={"PREFECT_API_URL": SAFE["PREFECT_API_URL"], "SSL_CERT_FILE": str(files.ca)},
                    ca=files.ca if env == "prod" else None,
                    **values,
                )
            )
            through = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Proto": "https"} if env == "staging" else {}
            given = {f"ENGRAM_{name.upper()}": str(value) for name, value in values.items()}
            given |= {"ENGRAM_DATA_DIR": str(data_dir), "ENGRAM_CONTROL_PLANE_URL": stack.control_plane_url}
            with mock.patch.dict(os.environ, given):
                settings = Settings()
            place = Place(env, running, settings, through)
            request.config.stash.setdefault(_PLACES, {})[env] = place
    return stash[_PLACES]


def seen(places: dict[str, Place], what: Any) -> list[Any]:
    """The same question in dev, staging and prod."""
    return [what(places[env]) for env in ENVIRONMENTS]


def test_browsers_of_localhost_may_call_in_dev_alone(places: dict[str, Place]) -> None:
    """The configured origin may everywhere, strangers nowhere; a preflight is judged alike."""

    def allowed(origin: str) -> list[bool]:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answers = seen(places, lambda p: p.ask("/health", headers={"Origin": origin}))
        preflights = seen(places, lambda p: p.ask("/v1/search", "OPTIONS", headers=asked))
        found = [a.headers.get("access-control-allow-origin") == origin for a in answers]
        assert [p.status_code == 204 for p in preflights] == found
        return found

    assert allowed("http://localhost:5173") == [True, False, False]
    assert allowed(APP) == [True, True, True]
    assert allowed("https://app.example.evil") == [False, False, False]


def test_hsts_is_sent_where_there_is_tls(places: dict[str, Place]) -> None:
    """On every answer, errors too; for as long as the value file says."""
    for path in ("/health", "/v1/memories", "/nothing"):
        sent = seen(places, lambda p, path=path: p.ask(path).headers.get("strict-transport-security"))
        assert sent == [None, "max-age=86400; includeSubDomains", "max-age=31536000; includeSubDomains"]


def test_plain_http_is_refused_where_tokens_are_worth_something(places: dict[str, Place], stack: Stack) -> None:
    """staging's proxy says how it was spoken to; prod's port speaks TLS and nothing else."""
    headers = stack.headers(stack.idle_tenant)
    assert places["dev"].ask("/v1/usage", headers=headers).status_code == 200
    assert_problem(places["staging"].ask("/v1/usage", headers=headers | {"X-Forwarded-Proto": "http"}), 403)
    with pytest.raises(httpx.HTTPError):
        httpx.get(places["prod"].gateway.url.replace("https:", "http:") + "/health", trust_env=False)


def test_the_description_of_the_api_is_hidden_in_prod(places: dict[str, Place]) -> None:
    """404, as for any path that is not there."""
    for path in ("/schema", "/schema/openapi.json"):
        assert seen(places, lambda p, path=path: p.ask(path).status_code) == [200, 200, 404]


def test_a_rate_limit_is_enforced_shadowed_enforced(places: dict[str, Place], stack: Stack) -> None:
    """In staging the client sees nothing, the operator whom prod would have refused."""

    def statuses(place: Place) -> set[int]:
        headers = stack.headers(tenant)
        return {place.ask("/v1/memories", headers=headers).status_code for _ in range(25)}

    tenant = stack.tenant()
    assert seen(places, lambda p: p.ask("/v1/memories", headers=stack.headers(tenant)).status_code) == [200] * 3
    assert seen(places, statuses) == [{200, 429}, {200}, {200, 429}]
    name = "engram_rate_limit_shadowed_total"
    assert [n > 0 for n in seen(places, lambda p: p.gateway.metric(name, scope="tenant"))] == [False, True, False]


def test_a_hard_quota_is_enforced_shadowed_enforced(places: dict[str, Place], stack: Stack) -> None:
    """402, a warning beside the answer, 402."""
    tenant = stack.tenant()
    plan(stack.control_plane, "nothing", tenant, memories_created_hard=0)

    def made(place: Place) -> tuple[int, bool]:
        def tried() -> httpx.Response | None:
            answer = place.ask("/v1/memories", "POST", json={"content": "x"}, headers=stack.headers(tenant))
            return answer if answer.status_code == 402 or "x-engram-quota-warning" in answer.headers else None

        answer = eventually(tried)  # the plan is read every 0.2 s
        return answer.status_code, "x-engram-quota-warning" in answer.headers

    assert seen(places, made) == [(402, False), (201, True), (402, False)]
    counted = seen(places, lambda p: p.gateway.metric("engram_quota_shadowed_total", counter="memories_created"))
    assert [n > 0 for n in counted] == [False, True, False]


def test_usage_is_billed_unless_staging_runs_dry(places: dict[str, Place], stack: Stack) -> None:
    """What each environment's drain makes of requests its gateway served; the dry run keeps them."""

    def billed(place: Place) -> bool:
        tenant = stack.tenant()
        headers = stack.headers(tenant)
        eventually(lambda: place.ask("/v1/memories", headers=headers).status_code == 200)

        def drained() -> bool:
            list(metering.drain_all(stack.control_plane, place.settings))
            kept = [e.tenant_id for path in dry_run.segments(place.settings) for e in segment.read(path).events]
            [(counted,)] = query(
                stack.control_plane, "SELECT count(*) AS n FROM usage_events WHERE tenant_id = %s", tenant
            )
            return tenant in kept or counted != 0

        eventually(drained)
        answer = place.ask("/v1/usage", headers=headers).json()
        return bool(answer["api_calls"])

    assert seen(places, billed) == [True, False, True]


def test_the_dev_issuer_signs_in_dev_alone(tmp_path: Path) -> None:
    """A skeleton key must not exist anywhere else."""
    assert [_token(env, tmp_path) for env in ENVIRONMENTS] == [0, 3, 3]


def test_the_table_of_the_readme_says_what_the_environments_do(tmp_path: Path) -> None:
    """A row with a setting holds its value in each file; the others were seen above and are looked up here."""
    table = README.partition("| | dev | staging | prod |")[2].partition("\n\n")[0]
    rows = {row[0]: row[1:] for line in table.splitlines()[2:] if (row := [c.strip() for c in line.split("|")[1:-1]])}
    assert len(rows) == 13
    known = frozenset(Settings.model_fields)
    files = {env: environment.read(environment.value_file(env), known) for env in ENVIRONMENTS}
    compared = set()
    for first, cells in rows.items():
        for name in re.findall(r"`ENGRAM_([A-Z_]+)`", first):
            field = name.lower()
            for env, cell in zip(ENVIRONMENTS, cells, strict=True):
                assert cell.startswith(f"`{files[env][field]}`"), (first, env)
            compared.add(field)
    how_not_what = {"gateway_host", "backup_compression", "rate_limit_burst"}
    assert compared == set().union(*files.values()) - how_not_what
    assert rows["`engram token`"] == ["yes", "exit 3", "exit 3"]
    assert rows["start with an unsafe value"] == ["yes", "exit 3", "exit 3"]
    brought = ("control_plane_url", "prefect_api_url", "jwks_url", "jwt_issuer", "object_store_url")
    must = [{variable(name) for name in brought} <= {f.name for f in unsafe(Settings(env=env))} for env in ENVIRONMENTS]
    given = [cell.startswith("given: ") for cell in rows["PostgreSQL, Prefect, token issuer, object store"]]
    assert given == must == [False, True, True]
    assert rows["PostgreSQL, Prefect, token issuer, object store"][0] == "embedded, or given"
    assert _embedded(tmp_path) and not _embedded(tmp_path, **dict.fromkeys(brought[:3], "postgresql://x"))
    watched = [
        {f.name for f in unsafe(Settings(env=env, bridge_token=SecretStr("t")))}
        >= {"ENGRAM_PROMETHEUS_URL", "ENGRAM_HEARTBEAT_URL"}
        for env in ENVIRONMENTS
    ]
    said = rows["a Prometheus that watches; where its alerts arrive, a dead man's switch"]
    assert [cell == "given" for cell in said] == watched == [False, False, True]
    dry = rows["usage examined and not billed, `ENGRAM_USAGE_DRY_RUN`"]
    assert ["may be `true`" in cell for cell in dry] == [_starts_dry(env) for env in ENVIRONMENTS]


def _embedded(directory: Path, **given: Any) -> bool:
    """Whether `engram up` in dev would start parts of its own; all of them or none."""
    ports = PortReservations()
    try:
        planned = composition.plan(Settings(data_dir=directory, gateway_port=0, **given), ports)
    finally:
        ports.release_all()
    assert planned.settings.object_store_url == (directory / "objects").as_uri()
    own = {part is not None for part in (planned.postgres, planned.prefect, planned.issuer)}
    assert len(own) == 1
    return own.pop()


def _token(env: str, directory: Path) -> int:
    data_dir = str(directory / env)
    return engram("token", "acme", ENGRAM_ENV=env, ENGRAM_DATA_DIR=data_dir, ENGRAM_JWT_ISSUER=ISSUER).returncode


def _starts_dry(env: str) -> bool:
    given = {name.removeprefix("ENGRAM_").lower(): value for name, value in SAFE.items()}
    return not unsafe(Settings(**{**given, "env": env, "usage_dry_run": True}))
