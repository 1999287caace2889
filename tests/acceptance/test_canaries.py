"""Secrets, tokens and memories never lie where they do not belong: canaries are let loose on the whole stack, then
everything it wrote is read. What other acceptance tests did before on the same stack is read as well."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import psycopg
import pytest
from psycopg import sql

from deployments.leftovers import marked
from tests.acceptance.conftest import CANARIES, Stack
from tests.gateway_stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TENANT = "canary"
MEMORY = f"canarymemory{secrets.token_hex(12)}"
FORGED = f"canarytoken{secrets.token_hex(12)}"
# Any token at all: two parts that are JSON objects in base64.
JWT = rb"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}"


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
    own = [MEMORY.encode(), FORGED.encode(), token.encode()]
    repeated = [a.text for a in answers if strings_in(a.content + str(dict(a.headers)).encode(), own)]
    assert repeated == []

    stack.engram("backup", TENANT)
    with ThreadPoolExecutor() as pool:
        said = list(
            pool.map(
                lambda words: stack.engram(*words, check=False),
                [
                    ("restore", TENANT, "--json"),
                    ("restore-test", TENANT, "--json"),
                    ("diagnose", "tenant-db", TENANT, "--json"),
                ],
            )
        )
    assert json.loads(said[0].stdout)["outcome"] == "restored"
    # A person's terminal ends up in tickets.
    every = [MEMORY.encode(), FORGED.encode(), token.encode(), *(value.encode() for value in CANARIES.values())]
    for done in said:
        assert not strings_in((done.stdout + done.stderr).encode(), every), done.args
    return every


def test_a_canary_would_be_found(stack: Stack) -> None:
    """The search itself: a planted canary, and a token nobody planted."""
    assert strings_in(b"x" + MEMORY.encode() + b"x", [MEMORY.encode()]) == {MEMORY.encode()}
    token = stack.json("token", TENANT)["token"]
    assert strings_in(f'{{"authorization": "Bearer {token}"}}'.encode(), [])


def test_logs_and_what_processes_share_hold_no_canary(stack: Stack, canaries: list[bytes]) -> None:
    """Memories belong into the tenant's database and its backups; secrets and tokens into no file at all."""
    belongs = {stack.data_dir / name for name in ("tenants", "objects")}
    password = unquote(urlsplit(stack.status["control_plane_url"]).password or "").encode()
    seen = b""
    for path in files_below(stack.data_dir):
        if path.is_relative_to(stack.data_dir / "postgres") or belongs & set(path.parents):
            continue
        data = path.read_bytes()
        assert not strings_in(data, canaries), path
        if path.parent.name == "logs":
            assert not password or password not in data, path
            seen += data
    # Were they looked for where they could have been?
    assert TENANT.encode() in seen
    kept = [path for directory in belongs for path in files_below(directory) if TENANT in path.parts]
    assert any(MEMORY.encode() in path.read_bytes() for path in kept)


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


def test_no_process_shows_a_canary_in_its_arguments(stack: Stack, canaries: list[bytes]) -> None:
    """Every user of the machine can read them."""
    password = unquote(urlsplit(stack.status["control_plane_url"]).password or "").encode()
    processes = {p["name"]: psutil.Process(p["pid"]) for p in stack.status["processes"]}
    assert set(CANARIES.items()) <= set(processes["worker"].environ().items()), "where they belong"
    for process in (*processes.values(), *marked(stack.data_dir)):
        try:
            arguments = " ".join(process.cmdline()).encode()
        except psutil.Error:
            continue  # one that just ended
        assert not strings_in(arguments, canaries), process
        assert not password or password not in arguments, process
