"""`engram act`: what it says about a change is what every worker of a real gateway does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from shared import action, limits, workers
from shared.errors import Refused
from shared.limits import BadLimit, Rate
from shared.settings import Settings
from tests.gateway_stack import Stack, eventually, stack  # noqa: F401


@pytest.fixture
def settings(stack: Stack) -> Iterator[Settings]:  # noqa: F811
    """The running gateway's; what a test sets there is gone afterwards."""
    yield stack.settings
    for name in limits.active(stack.settings):
        action.clear_limit(stack.settings, name)


def engram(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ENGRAM_")}
    environment["ENGRAM_DATA_DIR"] = str(settings.data_dir)
    command = [sys.executable, "-m", "deployments.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def statuses(stack: Stack, headers: dict[str, str]) -> set[int]:  # noqa: F811
    """What searches over many new connections, and so of every worker, are answered."""
    url = f"{stack.gateway.url}/v1/search"
    return {
        httpx.post(url, json={"query": "x"}, headers=headers, trust_env=False, timeout=30).status_code
        for _ in range(12)
    }


def test_when_the_command_is_done_every_worker_obeys_and_its_undo_undoes_it(
    stack: Stack,  # noqa: F811
    settings: Settings,
) -> None:
    """Not "soon": the command waits until each living worker says that it obeys."""
    headers = stack.headers(stack.idle_tenant)
    assert statuses(stack, headers) == {200}
    words = ["act", "limits", "set", "shed", "search,list", "--ttl", "600", "--reason", "overload"]
    tried = json.loads(engram(settings, *words, "--dry-run", "--json").stdout)
    assert tried["dry_run"] and tried["after"] == ["search", "list"] and limits.active(settings) == {}
    done = engram(settings, *words, "--json")
    assert statuses(stack, headers) == {503}
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["action"], found["limit"], found["before"], found["after"]) == (
        "limits set",
        "shed",
        None,
        ["search", "list"],
    )
    assert list(found["workers"].values()) == [True, True] and found["expires_at"]
    shown = json.loads(engram(settings, "act", "limits", "show", "--json").stdout)
    assert shown["limits"]["shed"]["reason"] == "overload" and list(shown["workers"].values()) == [True, True]
    assert found["undo"] == ["engram", "act", "limits", "clear", "shed"]
    undone = engram(settings, *found["undo"][1:])
    assert statuses(stack, headers) == {200}
    assert undone.returncode == 0 and "obeyed by 2 of 2 workers" in undone.stderr
    assert "--reason overload" in undone.stdout, "undoing the undo keeps the reason"


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["set", "speed", "1", "--ttl", "60", "--reason", "r"], 2),
        (["set", "rate_limit", "rps=fast", "--ttl", "60", "--reason", "r"], 2),
        (["set", "pool_size", "5", "--ttl", "60"], 2),
        (["set", "shed", "search,list,write,get", "--ttl", "60", "--reason", "r"], 3),
    ],
)
def test_nonsense_is_a_usage_error_and_an_outage_is_refused(
    settings: Settings, words: list[str], exit_code: int
) -> None:
    """One line says why, and nothing was written."""
    done = engram(settings, "act", "limits", *words)
    assert done.returncode == exit_code and done.stderr.strip() and not done.stdout
    assert limits.active(settings) == {}


def test_a_tenants_rate_is_in_force_at_once_and_undo_brings_back_the_one_before(
    stack: Stack,  # noqa: F811
    settings: Settings,
) -> None:
    """A second change names the first as what was before, with what was left of its time."""
    tenant = stack.tenant()
    first = action.limit_rate(settings, Rate(50, 100), tenant, ttl_seconds=600, reason="first")
    second = action.limit_rate(settings, Rate(1, 2), tenant, ttl_seconds=60, reason="second")
    assert second.before == first.after and not second.disobeying
    with stack.client(tenant) as client:
        assert client.get("/v1/memories").headers["ratelimit-limit"] == "2"
    undo = dict(zip(second.undo[-4::2], second.undo[-3::2], strict=True))
    assert second.undo[:5] == ["engram", "act", "limits", "set", f"rate_limit:{tenant}"]
    assert undo["--reason"] == "first" and 500 < int(undo["--ttl"]) <= 600
    assert json.loads(second.undo[5]) == first.after


def test_a_forced_refresh_reaches_every_worker(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """As many fetches as there are workers, each time."""
    before = stack.issuer.fetches
    for n in (1, 2):
        done = action.refresh_jwks(settings, reason="rotated")
        assert len(done.workers) == 2 and not done.disobeying and not done.undo
        eventually(lambda wanted=before + 2 * n: stack.issuer.fetches >= wanted)


def test_a_worker_that_does_not_obey_is_named(
    stack: Stack,  # noqa: F811
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped worker lives but has not seen the change: saying "done" would be a lie."""
    monkeypatch.setattr(action, "OBEYED_SECONDS", 0.5)
    stopped = stack.gateway.workers()[0]
    stopped.suspend()
    try:
        done = action.set_limit(settings, "pool_size", 100, ttl_seconds=60, reason="r")
    finally:
        stopped.resume()
    assert done.disobeying == [stopped.pid] and len(done.workers) == 2
    version = limits.version_of(limits.active(settings))
    eventually(lambda: all(workers.wait_until_obeyed(settings, version, 1).values()))


def test_without_a_gateway_a_change_waits_for_one(tmp_path: Any) -> None:
    """It is written, and no worker is claimed to obey it. Dead workers' files are removed."""
    settings = Settings(data_dir=tmp_path)
    (settings.run_dir / "workers").mkdir(parents=True)
    (settings.run_dir / "workers" / "1").write_text("of the dead")
    began = time.monotonic()
    done = action.set_limit(settings, "pool_size", 5, ttl_seconds=60, reason="r")
    assert done.workers == {} and time.monotonic() - began < action.OBEYED_SECONDS
    assert not list((settings.run_dir / "workers").iterdir())
    assert action.clear_limit(settings, "pool_size").before == 5
    assert action.clear_limit(settings, "pool_size").before is None
    for refused, error in (("speed", BadLimit), ("rate_limit:../x", BadLimit)):
        with pytest.raises(error):
            action.clear_limit(settings, refused)
    with pytest.raises(Refused):
        action.shed(settings, ["get", "write", "list", "search"], ttl_seconds=60, reason="r")
