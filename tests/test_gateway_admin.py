"""The admin API: the playbook over HTTP, for operators alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.admin import OFFERED
from gateway.ratelimit import RateLimiter
from shared import limits, registry
from shared.errors import Refused
from shared.playbook.table import ACTIONS
from shared.settings import Settings
from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401
from tests.openapi_fixtures import compared
from tests.playbook_fixtures import newest, settings  # noqa: F401

ACT = "/v1/admin/actions"


@pytest.fixture
def operator(stack: Stack) -> Iterator[httpx.Client]:  # noqa: F811
    with stack.client("operators", scope="admin", sub="on-call@example.test") as client:
        yield client


def test_what_is_offered_is_the_whole_playbook_but_for_what_only_a_terminal_has() -> None:
    """One implementation behind every door: an action that one door forgot would be missing when it is needed."""
    assert set(ACTIONS) - {action.name for action in OFFERED} == {"set-limit"}


@pytest.mark.parametrize(
    ("tenant", "scope", "headers", "status"),
    [
        ("customer", "admin", {}, 403),
        ("customer", "memories:read memories:write search admin", {}, 403),
        ("operators", "memories:read memories:write search", {}, 403),
        ("operators", "", {}, 403),
        ("operators", "administrator", {}, 403),
        ("operators", "admin", {"X-Engram-Tenant": "customer"}, 403),
        ("operators", "admin", {"X-Engram-Tenant": "operators"}, 200),
    ],
)
def test_a_customers_token_opens_nothing_whatever_its_scope(
    stack: Stack,  # noqa: F811
    tenant: str,
    scope: str,
    headers: dict[str, str],
    status: int,
) -> None:
    """The scope alone is not enough, the claim alone is not enough."""
    tenant = stack.idle_tenant if tenant == "customer" else tenant
    headers = {name: stack.idle_tenant if value == "customer" else value for name, value in headers.items()}
    with stack.client(tenant, scope=scope) as client:
        answer = client.post(f"{ACT}/volume-health", json={}, headers=headers)
    if status != 200:
        assert_problem(answer, status)
    assert answer.status_code == status


def test_without_a_good_token_the_answer_is_401_as_everywhere(stack: Stack) -> None:  # noqa: F811
    """None, one of another issuer, one that has expired."""
    url = f"{stack.gateway.url}{ACT}/shed"
    for headers in ({}, stack.headers("operators", scope="admin", iss="x"), stack.headers("operators", exp=1)):
        assert_problem(httpx.post(url, json={"reason": "r"}, headers=headers, trust_env=False, timeout=30), 401)


def test_no_customer_can_be_called_as_the_operators_are(stack: Stack) -> None:  # noqa: F811
    """Else its own tokens would be half of an operator's."""
    with pytest.raises(Refused):
        registry.create(stack.control_plane, stack.settings, "operators")


def test_should_there_be_such_a_tenant_nobody_is_an_operator(stack: Stack) -> None:  # noqa: F811
    """One from before this build, or written by hand: its tokens open nothing, and the door stays shut."""
    stack.control_plane.execute(
        "tenant_insert", tenant_id="operators", plan_id="standard", schema_version=1, machine_id="elsewhere"
    )
    try:
        with stack.client("operators", scope="admin") as client:
            eventually(lambda: client.post(f"{ACT}/volume-health", json={}).status_code == 403)
    finally:
        with stack.control_plane.transaction() as connection:
            connection.execute("DELETE FROM tenants WHERE tenant_id = 'operators'")

    def opens() -> bool:
        with stack.client("operators", scope="admin") as client:  # a connection of its own, so any worker
            return client.post(f"{ACT}/volume-health", json={}).status_code == 200

    eventually(lambda: all(opens() for _ in range(10)), 90)  # a removed row is seen at the next read of everything


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("shed", {}, 400),
        ("shed", {"reason": "  "}, 400),
        ("shed", {"reason": "r", "arguments": {"classes": []}}, 400),
        ("shed", {"reason": "r", "arguments": {"classes": ["search", "list", "write", "get"]}}, 400),
        ("shed", {"reason": "r", "ttl_seconds": 0}, 400),
        ("shed", {"reason": "r", "ttl_seconds": 1e9}, 400),
        ("shed", {"reason": "r", "tenant_id": "acme"}, 400),
        ("cap-pool", {"reason": "r"}, 400),
        ("set-rate-limit", {"reason": "r", "arguments": {"rps": -1}}, 400),
        ("check-permissions", {"tenant_id": "../../etc"}, 400),
        ("check-permissions", {"tenant_id": "nobody-has-this"}, 404),
        ("volume-health", {"token": "x"}, 400),
        ("explain-token", {}, 400),
        ("set-limit", {"reason": "r"}, 404),
        ("restore", {"reason": "r"}, 404),
        ("restart-tenant", {"reason": "r", "tenant_id": "nobody-has-this"}, 404),
    ],
)
def test_bad_input_is_a_problem_document_and_changes_nothing(
    operator: httpx.Client,
    settings: Settings,  # noqa: F811
    name: str,
    body: dict[str, Any],
    status: int,
) -> None:
    """400 for what makes no sense, 404 for a tenant or an action that is not there."""
    assert_problem(operator.post(f"{ACT}/{name}", json=body), status)
    assert limits.active(settings) == {}


def test_an_action_over_http_is_done_recorded_and_not_billed(
    stack: Stack,  # noqa: F811
    operator: httpx.Client,
    settings: Settings,  # noqa: F811
) -> None:
    """The same answer as from a terminal; the book says through which door and whose token it was."""
    body = {"reason": "overload", "arguments": {"classes": ["list"]}, "ttl_seconds": 60}
    tried = operator.post(f"{ACT}/shed", json=body | {"dry_run": True}).json()
    assert tried["dry_run"] and limits.active(settings) == {}
    done = operator.post(f"{ACT}/shed", json=body)
    assert done.status_code == 200, done.text
    found = done.json()
    assert (found["before"], found["after"], found["verified"]) == (None, ["list"], True)
    assert found["undo"] == ["engram", "act", "limits", "clear", "shed"] and found["expires_at"]
    assert limits.active(settings).keys() == {"shed"}
    row = newest(stack)
    assert (row["action"], row["door"], row["who"], row["state"]) == ("shed", "api", "on-call@example.test", "done")
    again = operator.post(f"{ACT}/clear-limit", json={"reason": "over", "arguments": {"limit": "shed"}}).json()
    assert again["before"] == ["list"] and limits.active(settings) == {}
    assert stack.gateway.events("operators") == []
    assert stack.gateway.metric("engram_requests_total", route="/admin/actions", status="200") >= 3
    line = stack.gateway.access_line(done.headers["x-request-id"])
    assert line["tenant_id"] == "operators" and line["route"] == "/admin/actions"


def test_operators_are_limited_too(tmp_path: Path) -> None:
    """A script gone wild, or a stolen token, is not to be the machine's work; whatever the tenants' mode is."""
    few = Settings(data_dir=tmp_path, admin_rps=0.001, admin_burst=2, rate_limit_mode="off")
    rates = RateLimiter(few, limits.Watch(few))
    assert [rates.operators().allowed for _ in range(3)] == [True, True, False]
    rates.close()


def test_a_token_is_explained_and_is_in_no_answer_log_or_row(
    stack: Stack,  # noqa: F811
    operator: httpx.Client,
) -> None:
    """Not even that of somebody who pastes one where a reason belongs."""
    token = stack.issuer.token(stack.idle_tenant, iss="https://elsewhere.test")
    body = {"token": token, "reason": f"client says it is refused: {token}"[:500]}
    answer = operator.post(f"{ACT}/explain-token", json=body)
    assert answer.status_code == 200 and "reason issuer" in answer.json()["summary"]
    row = newest(stack)
    stack.gateway.access_line(answer.headers["x-request-id"])
    said = answer.text + str(row) + stack.gateway.log_path.read_text()
    assert row["action"] == "explain-token" and row["arguments"] == {}
    assert not any(part in said for part in token.split("."))


def test_what_the_document_says_of_the_actions_is_true(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """An operator's token, every action, right and wrong bodies; all of them dry runs (`tests/admin_hooks.py`)."""
    token = stack.issuer.token("operators", scope="admin")
    options = ["--include-path-regex", "^/v1/admin/", "--phases", "fuzzing", "--max-examples", "3"]
    found = compared(stack.gateway.url, token, tmp_path, *options, hooks="tests.admin_hooks")
    assert found["operations"]["tested"] == len(OFFERED)
