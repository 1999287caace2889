"""Secrets, tokens and memories never lie where they do not belong: canaries are let loose on a whole stack that uses
every secret there is (S3 by role, encrypted backups, TLS, Prefect's credential, the bridge's), then everything it wrote
is read."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import psycopg
import pytest
from psycopg import sql
from pyrage.x25519 import Identity

from deployments.leftovers import marked
from shared.safety import NOT_A_GATEWAYS
from shared.settings import variable
from tests.acceptance.conftest import Stack, running
from tests.environment_fixtures import bare
from tests.gateway_stack import eventually
from tests.ports import free_ports
from tests.s3_fixtures import ROLE_ACTIONS, seaweedfs
from tests.tls_fixtures import pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
TENANT, BROKEN, REFUSED = "canary", "broken", "refused"
MEMORY = f"canarymemory{secrets.token_hex(12)}"
FORGED = f"canarytoken{secrets.token_hex(12)}"
KEYS = {role: (f"canaryid{secrets.token_hex(8)}", f"canarykey{secrets.token_hex(16)}") for role in ROLE_ACTIONS}
SECRETS = {
    "ENGRAM_S3_ACCESS_KEY_ID": KEYS["write"][0],
    "ENGRAM_S3_SECRET_ACCESS_KEY": KEYS["write"][1],
    "ENGRAM_S3_READ_ACCESS_KEY_ID": KEYS["read"][0],
    "ENGRAM_S3_READ_SECRET_ACCESS_KEY": KEYS["read"][1],
    "ENGRAM_S3_DELETE_ACCESS_KEY_ID": KEYS["delete"][0],
    "ENGRAM_S3_DELETE_SECRET_ACCESS_KEY": KEYS["delete"][1],
    "ENGRAM_BACKUP_MASTER_KEY": str(Identity.generate()),
    "ENGRAM_BACKUP_MASTER_KEYS_OLDER": str(Identity.generate()),
    "ENGRAM_BRIDGE_TOKEN": f"canarybridge{secrets.token_hex(16)}",
    "PREFECT_API_AUTH_STRING": f"engram:canaryprefect{secrets.token_hex(16)}",
}
# Files of mode 0600 that are there to hold one.
HOLDERS = {"run/stack.json": "PREFECT_API_AUTH_STRING", "bridge/token": "ENGRAM_BRIDGE_TOKEN"}
# Any token at all: two parts that are JSON objects in base64.
JWT = rb"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One that needs all of its secrets; its writer may store nothing but what is the tenant's, `TENANT`."""
    directory = tmp_path_factory.mktemp("canaries")
    (directory / "weed").mkdir()
    files = pair(directory)
    with seaweedfs(directory / "weed", KEYS, write_below=f"engram/kept/tenants/{TENANT}/*") as s3:
        environment = bare() | SECRETS
        environment |= {f"ENGRAM_{name.upper()}": str(s3[name]) for name in ("s3_endpoint", "s3_region")}
        environment |= {
            "ENGRAM_DATA_DIR": str(directory / "data"),
            "ENGRAM_OBJECT_STORE_URL": "s3://engram/kept",
            "ENGRAM_BACKUP_ENCRYPTION": "age",
            "ENGRAM_TLS_CERTIFICATE": str(files.certificate),
            "ENGRAM_TLS_KEY": str(files.key),
            "ENGRAM_BRIDGE_PORT": str(free_ports(1)[0]),
            "ENGRAM_GATEWAY_WORKERS": "1",
        }
        with running(environment, files.ca) as started:
            yield started


def secret_canaries(stack: Stack) -> list[bytes]:
    """Each secret, of Prefect's credential the password, of the gateway's key a line that is its own."""
    key = Path(stack.environment["ENGRAM_TLS_KEY"]).read_bytes().splitlines()[2]
    return [key, *(value.removeprefix("engram:").encode() for value in SECRETS.values())]


def wrong_requests(api: httpx.Client) -> Iterator[httpx.Response]:
    """Each has a canary where an error message might repeat what it was given."""
    as_json = {"content-type": "application/json"}
    yield api.post("/v1/memories", content=f'{{"content": "{MEMORY}"'.encode(), headers=as_json)
    yield api.post("/v1/memories", json={"content": {"of": MEMORY}})
    yield api.post("/v1/memories", json={"content": MEMORY, "no_such_field": MEMORY})
    yield api.post("/v1/memories", json={"content": "x", "importance": MEMORY})
    yield api.post("/v1/memories", content=MEMORY.encode(), headers={"content-type": MEMORY})
    yield api.post("/v1/memories", content=(MEMORY * 60_000).encode(), headers=as_json)
    yield api.post("/v1/search", json={"query": f'"{MEMORY}', "limit": MEMORY})
    yield api.get("/v1/memories", params={"cursor": MEMORY, "limit": MEMORY})
    yield api.get(f"/v1/memories/{MEMORY}")
    yield api.get("/v1/usage", params={"from": MEMORY})
    yield api.get("/v1/memories", headers={"x-engram-tenant": MEMORY})
    yield api.get("/v1/memories", headers={"authorization": f"Bearer {FORGED}"})
    yield api.get("/v1/memories", headers={"authorization": f"Basic {FORGED}"})
    token = api.headers["authorization"]
    yield api.get("/v1/memories", headers={"authorization": f"{token[:-8]}{FORGED}"})
    yield api.get("/v1/memories", headers={"authorization": f"{token} {FORGED}"})
    call = {"name": "memory_create", "arguments": {"content": {"of": MEMORY}, "importance": MEMORY}}
    yield api.post(
        "/v1/mcp",
        json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call},
        headers={"accept": "application/json, text/event-stream"},
    )


def strings_in(data: bytes, canaries: list[bytes]) -> set[bytes]:
    return {canary for canary in canaries if canary in data} | set(re.findall(JWT, data))


def files_below(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink())


def rows_with(url: str, patterns: list[str]) -> dict[str, int]:
    """{table: rows} of a whole database whose text matches one of the patterns."""
    found = {}
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        for names in tables:
            table = sql.Identifier(*names)
            count = sql.SQL("SELECT count(*) FROM {} t WHERE t::text ~ ANY(%s)").format(table)
            row = connection.execute(count, (patterns,)).fetchone()
            if row is not None and row[0]:
                found[".".join(names)] = row[0]
    return found


@pytest.fixture(scope="module")
def canaries(stack: Stack) -> list[bytes]:
    """Every canary, after a tenant's whole day: requests right and wrong, backup, restore, drill, diagnosis."""
    answers: list[httpx.Response] = []
    with stack.tenant(TENANT) as api:
        made = api.post("/v1/memories", json={"content": MEMORY, "tags": [MEMORY], "metadata": {MEMORY: MEMORY}})
        assert made.status_code == 201
        assert api.post("/v1/search", json={"query": MEMORY}).json()["count"] == 1
        answers.extend(wrong_requests(api))
        token = api.headers["authorization"].removeprefix("Bearer ")
    assert {a.status_code for a in answers} >= {400, 401, 403, 404, 413, 415}
    with stack.tenant(BROKEN) as other:
        assert other.post("/v1/memories", json={"content": MEMORY}).status_code == 201
        stack.engram("act", "restart-tenant", BROKEN, "--reason", "its file is exchanged")
        spoil(stack.data_dir / "tenants" / BROKEN / "engram.db")
        answers.append(eventually(lambda: failed(other.post("/v1/memories", json={"content": MEMORY}))))
        tokens = [token.encode(), other.headers["authorization"].removeprefix("Bearer ").encode()]
    with stack.tenant(REFUSED) as third:
        assert third.post("/v1/memories", json={"content": MEMORY}).status_code == 201
        tokens.append(third.headers["authorization"].removeprefix("Bearer ").encode())
    answers.append(
        httpx.get(f"{stack.status['gateway_url']}/metrics", verify=ssl.create_default_context(cafile=stack.ca))
    )
    assert b"engram_requests_total" in answers[-1].content
    own = [MEMORY.encode(), FORGED.encode(), *tokens]
    repeated = [a.text for a in answers if strings_in(a.content + str(dict(a.headers)).encode(), own)]
    assert repeated == []

    stack.engram("backup", TENANT)
    bridge_alerts(stack)
    with ThreadPoolExecutor() as pool:
        said = list(
            pool.map(
                lambda words: stack.engram(*words, check=False),
                [
                    ("restore", TENANT, "--json"),
                    ("restore-test", TENANT, "--json"),
                    ("diagnose", "tenant-db", TENANT, "--json"),
                    ("backup", REFUSED, "--json"),
                    ("config", "show"),
                    ("status",),
                ],
            )
        )
    assert json.loads(said[0].stdout)["outcome"] == "restored"
    assert said[1].returncode == 0, said[1].stdout
    assert said[3].returncode == 1 and "403 Forbidden: AccessDenied" in said[3].stdout + said[3].stderr
    # A person's terminal ends up in tickets.
    every = [MEMORY.encode(), FORGED.encode(), *tokens, *secret_canaries(stack)]
    for done in said:
        assert not strings_in((done.stdout + done.stderr).encode(), every), done.args
    return every


def failed(answer: httpx.Response) -> httpx.Response | None:
    return answer if answer.status_code >= 500 else None


def spoil(database: Path) -> None:
    """Make it no database at all, under its name."""
    with database.resolve().open("r+b") as file:
        file.write(b"no database any more" * 200)


def bridge_alerts(stack: Stack) -> None:
    """A bridge beside the stack, told of an alert by who may and by who may not."""
    url = f"http://127.0.0.1:{stack.environment['ENGRAM_BRIDGE_PORT']}/alerts"
    body = {"version": "4", "alerts": [], "token": FORGED}
    with (stack.data_dir / "logs" / "bridge.log").open("ab") as log:
        bridge = subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", "bridge"], env=stack.environment, stdout=log, stderr=log
        )
    try:

        def ask(token: str) -> int | None:
            with contextlib.suppress(httpx.TransportError):
                return httpx.post(url, json=body, headers={"authorization": f"Bearer {token}"}).status_code
            return None

        assert eventually(lambda: ask(FORGED), 60) == 401
        assert ask(SECRETS["ENGRAM_BRIDGE_TOKEN"]) in (200, 204, 400)
        assert not strings_in(" ".join(psutil.Process(bridge.pid).cmdline()).encode(), secret_canaries(stack))
    finally:
        bridge.terminate()
        bridge.wait(30)


def test_a_canary_would_be_found(stack: Stack) -> None:
    """The search itself: a planted canary, and a token nobody planted."""
    assert strings_in(b"x" + MEMORY.encode() + b"x", [MEMORY.encode()]) == {MEMORY.encode()}
    token = stack.json("token", TENANT)["token"]
    assert strings_in(f'{{"authorization": "Bearer {token}"}}'.encode(), [])


def test_logs_and_what_processes_share_hold_no_canary(stack: Stack, canaries: list[bytes]) -> None:
    """Memories belong into the tenant's database and its backups; secrets and tokens into no file at all."""
    belongs = {stack.data_dir / "tenants"}
    holders = {}
    password = unquote(urlsplit(stack.status["control_plane_url"]).password or "").encode()
    seen = b""
    for path in files_below(stack.data_dir):
        if path.is_relative_to(stack.data_dir / "postgres") or belongs & set(path.parents):
            continue
        data, allowed = path.read_bytes(), set()
        if holder := HOLDERS.get(name := str(path.relative_to(stack.data_dir))):
            allowed = {SECRETS[holder].removeprefix("engram:").encode()}
            holders[name] = path.stat().st_mode & 0o777
        assert strings_in(data, canaries) <= allowed, path
        if path.parent.name == "logs":
            assert not password or password not in data, path
            seen += data
    # Were they looked for where they could have been?
    assert TENANT.encode() in seen
    assert holders == dict.fromkeys(HOLDERS, 0o600)
    kept = [path for directory in belongs for path in files_below(directory) if TENANT in path.parts]
    assert any(MEMORY.encode() in path.read_bytes() for path in kept)


def test_what_the_object_store_has_is_encrypted(stack: Stack, canaries: list[bytes]) -> None:
    """Its operator reads neither memories nor keys; that a backup is there is seen from its key."""
    stored = b"".join(path.read_bytes() for path in files_below(stack.data_dir.parent / "weed" / "data"))
    assert f"tenants/{TENANT}/db".encode() in stored or b"age-encryption.org" in stored
    assert strings_in(stored, canaries) == set()


def test_neither_database_holds_a_canary(stack: Stack, canaries: list[bytes]) -> None:
    """Prefect's has parameters, artifacts, logs, states and events, and shows them to whoever can open the UI."""
    patterns = [*(re.escape(canary.decode()) for canary in canaries), JWT.decode()]
    control_plane = stack.status["control_plane_url"]
    prefect = re.sub(r"/engram(?=\?|\Z)", "/prefect", control_plane)
    assert prefect != control_plane
    for url in (control_plane, prefect):
        # Prefect writes events and logs in batches; the tenant's name arrives with them.
        assert eventually(lambda url=url: rows_with(url, [TENANT])), "the tenant's own name is there"  # type: ignore[misc]
        assert rows_with(url, patterns) == {}


def test_no_process_shows_a_canary_in_its_arguments_and_the_gateway_has_no_key(
    stack: Stack, canaries: list[bytes]
) -> None:
    """Every user of the machine can read arguments. Whoever breaks into a gateway finds its environment."""
    password = unquote(urlsplit(stack.status["control_plane_url"]).password or "").encode()
    processes = {p["name"]: psutil.Process(p["pid"]) for p in stack.status["processes"]}
    assert set(SECRETS.items()) <= set(processes["worker"].environ().items()), "where they belong"
    gateway = processes["gateway"]
    for process in (gateway, *gateway.children(recursive=True)):
        environment = process.environ()
        assert not {variable(name) for name in NOT_A_GATEWAYS} & environment.keys()
        assert not strings_in(str(environment).encode(), secret_canaries(stack))
    for process in (*processes.values(), *marked(stack.data_dir)):
        try:
            arguments = " ".join(process.cmdline()).encode()
        except psutil.Error:
            continue  # one that just ended
        assert not strings_in(arguments, canaries), process
        assert not password or password not in arguments, process
