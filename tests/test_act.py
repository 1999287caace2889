"""`engram act`: what it says about a change is what every worker of a real gateway does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import pytest

from shared import limits, workers
from shared.control_plane import ControlPlane
from shared.errors import Refused
from shared.limits import BadLimit
from shared.playbook import audit, limit
from shared.playbook.action import Request
from shared.playbook.perform import perform
from shared.settings import Settings
from tests.gateway_stack import ISSUER, Stack, eventually, stack  # noqa: F401
from tests.playbook_fixtures import ask, newest, settings  # noqa: F401


def engram(stack: Stack, settings: Settings, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:  # noqa: F811
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ENGRAM_")}
    environment |= {
        "ENGRAM_DATA_DIR": str(settings.data_dir),
        "ENGRAM_CONTROL_PLANE_URL": stack.control_plane_url,
        "ENGRAM_JWKS_URL": stack.issuer.url,
        "ENGRAM_JWT_ISSUER": ISSUER,
        "ENGRAM_GATEWAY_PORT": str(settings.gateway_port),
    }
    command = [sys.executable, "-m", "deployments.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120, **how)


def statuses(stack: Stack, headers: dict[str, str]) -> set[int]:  # noqa: F811
    """What searches over many new connections, and so of every worker, are answered."""
    url = f"{stack.gateway.url}/v1/search"
    return {
        httpx.post(url, json={"query": "x"}, headers=headers, trust_env=False, timeout=30).status_code
        for _ in range(12)
    }


def test_when_the_command_is_done_every_worker_obeys_and_its_undo_undoes_it(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
) -> None:
    """Not "soon": the command waits until each living worker says that it obeys; and the book has all of it."""
    headers = stack.headers(stack.idle_tenant)
    assert statuses(stack, headers) == {200}
    words = ["act", "shed", "search,list", "--ttl", "600", "--reason", "overload"]
    tried = json.loads(engram(stack, settings, *words, "--dry-run", "--json").stdout)
    assert tried["dry_run"] and tried["after"] == ["list", "search"] and limits.active(settings) == {}
    done = engram(stack, settings, *words, "--json")
    assert statuses(stack, headers) == {503}
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["action"], found["target"], found["before"], found["after"]) == (
        "shed",
        "shed",
        None,
        ["list", "search"],
    )
    assert list(found["workers"].values()) == [True, True] and found["expires_at"] and found["verified"]
    shown = json.loads(engram(stack, settings, "act", "limits", "show", "--json").stdout)
    assert shown["limits"]["shed"]["reason"] == "overload" and list(shown["workers"].values()) == [True, True]
    undamaged = limits.path_of(settings).read_bytes()
    limits.path_of(settings).write_bytes(b"{")
    try:
        damaged = json.loads(engram(stack, settings, "act", "limits", "show", "--json").stdout)
    finally:
        limits.path_of(settings).write_bytes(undamaged)
    assert damaged == {**shown, "damage": damaged["damage"]} and "cannot be read" in damaged["damage"]
    assert found["undo"] == ["engram", "act", "limits", "clear", "shed"]
    undone = engram(stack, settings, *found["undo"][1:])
    assert statuses(stack, headers) == {200}
    assert undone.returncode == 0 and "obeyed by 2 of 2 workers" in undone.stderr
    assert "--reason overload" in undone.stdout, "undoing the undo keeps the reason"
    last, before_that, *_ = json.loads(engram(stack, settings, "act", "history", "--json").stdout)
    assert (last["action"], before_that["action"]) == ("clear-limit", "shed")
    assert (before_that["state"], before_that["verified"], before_that["reason"]) == ("done", True, "overload")
    assert before_that["arguments"] == {"classes": ["search", "list"]} and before_that["door"] == "cli"
    assert before_that["undo"] == found["undo"] and before_that["action_id"] == found["action_id"]


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["limits", "set", "speed", "1", "--ttl", "60", "--reason", "r"], 2),
        (["limits", "set", "rate_limit", "rps=fast", "--ttl", "60", "--reason", "r"], 2),
        (["limits", "set", "pool_size", "5", "--ttl", "60"], 2),
        (["limits", "set", "pool_size", "5", "--ttl", "0.1", "--reason", "r"], 2),
        (["limits", "set", "shed", "search,list,write,get", "--ttl", "60", "--reason", "r"], 3),
        (["cap-pool", "--in-flight", "0", "--reason", "r"], 2),
        (["check-permissions", "../etc"], 2),
    ],
)
def test_nonsense_is_a_usage_error_and_an_outage_is_refused(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
    words: list[str],
    exit_code: int,
) -> None:
    """One line says why, and nothing was written."""
    done = engram(stack, settings, "act", *words)
    assert done.returncode == exit_code and done.stderr.strip() and not done.stdout
    assert limits.active(settings) == {}


def test_what_has_an_end_is_gone_at_it_by_itself(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """Nobody has to remember at four what was changed at three; the workers see the end themselves."""
    headers = stack.headers(stack.idle_tenant)
    done = ask(stack, settings, "shed", ttl_seconds=3.0)
    assert done.verified and limits.active(settings).keys() == {"shed"}
    eventually(lambda: limits.active(settings) == {} and statuses(stack, headers) == {200})
    version = limits.version_of({})
    eventually(lambda: set(workers.announced(settings).values()) == {version})


def test_a_token_is_explained_and_never_shown_or_stored(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """It comes by stdin; the answer names the check that fails, with what the configuration wants beside it."""
    token = stack.issuer.token(stack.idle_tenant, aud="another-service")
    done = engram(stack, settings, "act", "explain-token", "--json", input=f"Bearer {token}\n")
    found = json.loads(done.stdout)
    assert "reason audience" in found["summary"]
    audience = next(f for f in found["findings"] if f["name"] == "audience")
    assert audience["ok"] is False and audience["normal"] == "engram" and "another-service" in audience["seen"]
    assert {f["name"] for f in found["findings"] if f["ok"] is False} == {"audience"}
    row = newest(stack)
    assert row["action"] == "explain-token" and row["state"] == "done"
    for part in token.split("."):
        assert part not in done.stdout + done.stderr + str(row)


def test_a_tenants_rate_is_in_force_at_once_and_undo_brings_back_the_one_before(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
) -> None:
    """A second change names the first as what was before, with what was left of its time; what it leaves out stays."""
    tenant = stack.tenant()
    first = ask(stack, settings, "set-rate-limit", tenant, rps=50.0, burst=100, ttl_seconds=600, reason="first")
    second = ask(stack, settings, "set-rate-limit", tenant, burst=2, ttl_seconds=60, reason="second")
    assert second.before == first.after and second.verified and second.after["rps"] == 50.0
    with stack.client(tenant) as client:
        assert client.get("/v1/memories").headers["ratelimit-limit"] == "2"
    undo = dict(zip(second.undo[-4::2], second.undo[-3::2], strict=True))
    assert second.undo[:5] == ["engram", "act", "limits", "set", f"rate_limit:{tenant}"]
    assert undo["--reason"] == "first" and 500 < int(undo["--ttl"]) <= 600
    assert json.loads(second.undo[5]) == first.after


def test_a_rate_limit_that_would_refuse_nobody_is_refused(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """In shadow a tightened rate changes nothing; "done" would be a lie at three in the morning."""
    ask(stack, settings, "set-limit", limit="rate_limit_mode", value="shadow")
    with pytest.raises(Refused, match="shadow"):
        ask(stack, settings, "set-rate-limit", stack.idle_tenant, rps=1.0)
    row = newest(stack)
    assert row["state"] == "refused" and "shadow" in row["error"]


def test_a_cap_on_a_tenants_requests_is_every_workers(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """`inflight` of one tenant, of each, and the pool's size; each is one entry with its own end."""
    tenant = stack.tenant()
    assert ask(stack, settings, "cap-pool", tenant, in_flight=3).target == f"inflight:{tenant}"
    assert ask(stack, settings, "cap-pool", in_flight=7).target == "inflight"
    done = ask(stack, settings, "cap-pool", open_databases=9)
    assert done.target == "pool_size" and done.verified
    now = limits.Watch(settings)
    now.poll()
    assert (now.now.tenant_inflight, now.now.inflight, now.now.pool_size) == ({tenant: 3}, 7, 9)


def test_a_forced_refresh_reaches_every_worker(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many fetches as there are workers, each time; with an issuer that fails it is not verified."""
    before = stack.issuer.fetches
    for n in (1, 2):
        done = ask(stack, settings, "refresh-jwks")
        assert len(done.workers) == 2 and done.verified and not done.undo
        assert stack.issuer.fetches >= before + 2 * n
    stack.issuer.failing = True
    monkeypatch.setattr(limit, "OBEYED_SECONDS", 0.5)
    try:
        failed = ask(stack, settings.model_copy(update={"jwks_timeout_seconds": 0.2}), "refresh-jwks")
    finally:
        stack.issuer.failing = False
    monkeypatch.undo()
    assert failed.verified is False and newest(stack)["verified"] is False
    assert ask(stack, settings, "refresh-jwks").verified


def test_a_worker_that_does_not_obey_is_named(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped worker lives but has not seen the change: saying "done" would be a lie."""
    stopped, other = stack.gateway.workers()
    waited = workers.wait_until_obeyed

    def half_a_second_longer_than_for_the_other(settings: Settings, version: str, _: float) -> Mapping[int, bool]:
        eventually(lambda: workers.announced(settings)[other.pid] == version)
        return waited(settings, version, 0.5)

    monkeypatch.setattr(workers, "wait_until_obeyed", half_a_second_longer_than_for_the_other)
    stopped.suspend()
    try:
        done = ask(stack, settings, "cap-pool", open_databases=100)
    finally:
        stopped.resume()
    assert done.disobeying == [stopped.pid] and len(done.workers) == 2 and done.verified is False
    monkeypatch.undo()
    version = limits.version_of(limits.active(settings))
    eventually(lambda: all(workers.wait_until_obeyed(settings, version, 1).values()))


def test_without_a_gateway_a_change_waits_for_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written, and no worker is claimed to obey it, nor waited for. Dead workers' files are removed."""
    alone = Settings(data_dir=tmp_path)
    (alone.run_dir / "workers").mkdir(parents=True)
    (alone.run_dir / "workers" / "1").write_text("of the dead")
    (alone.run_dir / "workers" / "1.json").write_text("{}")
    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(workers, "time", clock)

    def asked(action: str, **arguments: Any) -> Any:
        return perform(alone, None, Request(action, arguments=arguments, reason="r"))

    done = asked("cap-pool", open_databases=5)
    assert done.workers == {} and done.verified is None
    assert not list((alone.run_dir / "workers").iterdir())
    assert asked("clear-limit", limit="pool_size").before == 5
    assert asked("clear-limit", limit="pool_size").before is None
    with pytest.raises(BadLimit):
        asked("set-limit", limit="speed", value=1)
    with pytest.raises(Refused):
        asked("set-limit", limit="shed", value=["get", "write", "list", "search"])


def test_without_postgresql_a_person_still_acts_and_the_book_catches_up(
    stack: Stack,  # noqa: F811
    tmp_path: Any,
) -> None:
    """An outage of the control plane is no reason why load may not be shed; nor is it one to forget who did."""
    away = Settings(
        data_dir=tmp_path, control_plane_url="postgresql://127.0.0.1:1/x", control_plane_connect_timeout_seconds=0.3
    )  # type: ignore[arg-type]
    with ControlPlane(away) as control_plane:
        done = perform(away, control_plane, Request("shed", reason="postgresql is down", who="someone"))
    assert not done.recorded and limits.active(away).keys() == {"shed"}
    assert audit.file_of(away).stat().st_size > 0
    again = perform(away, stack.control_plane, Request("clear-limit", arguments={"limit": "shed"}, reason="back"))
    assert again.recorded and audit.file_of(away).stat().st_size == 0
    row = stack.control_plane.row("action_get", action_id=UUID(done.action_id))
    assert row is not None
    assert (row["state"], row["who"], row["reason"]) == ("done", "someone", "postgresql is down")
