"""Every bad token over HTTP: one answer for all of them, the reason where only operators look, the token nowhere."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx

from tests.gateway_stack import Issuer, Stack, assert_problem, eventually, stack  # noqa: F401
from tests.token_cases import UNSAFE_TENANT_IDS, WeakKeys, refused

MCP = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


def test_every_refused_token_gets_the_same_answer_and_leaves_no_trace_of_itself(stack: Stack) -> None:  # noqa: F811
    """REST and MCP: one body but for the request id; the reason as metric label and log field; no part of any
    token in an answer or in the log; nobody fetches what a token points to."""
    attacker, weak = Issuer(), WeakKeys()
    tenant = stack.tenant()
    stack.issuer.extra = weak.published
    cases = [case for case in refused(stack.issuer, attacker, weak, tenant) if case.token.isprintable()]
    assert len(cases) > 250
    before = {reason: failures(stack, reason) for reason in {case.reason for case in cases}}
    answers: dict[str, str] = {}
    bodies: set[tuple[Any, ...]] = set()
    texts = []
    with httpx.Client(base_url=stack.gateway.url, timeout=30, trust_env=False) as api:
        for case in cases:
            headers = {"Authorization": f"Bearer {case.token}"}
            for response in (api.get("/v1/memories", headers=headers), api.post("/v1/mcp", headers=headers, json=MCP)):
                document = assert_problem(response, 401)
                assert response.headers["www-authenticate"] == "Bearer", case.name
                texts.append(response.text + str(response.headers))
                answers[document.pop("request_id")] = case.reason
                bodies.add(tuple(document.items()))
    stack.issuer.extra = []
    assert len(bodies) == 1
    assert attacker.fetches == 0
    attacker.close()
    eventually(lambda: answers.keys() <= reasons(stack).keys())
    told = reasons(stack)
    assert {key: told[key] for key in answers} == answers
    counted = {reason: failures(stack, reason) - before[reason] for reason in before}
    assert counted == Counter(answers.values())
    log = stack.gateway.log_path.read_text()
    for case in cases:
        for part in case.token.split("."):
            assert len(part) < 20 or not any(part in text for text in (log, *texts)), case.name
    assert not any(tenant in text for text in texts)


def test_a_tenant_id_that_would_leave_its_directory_is_refused_and_makes_none(stack: Stack) -> None:  # noqa: F811
    """A correctly signed token with such an id is the issuer's mistake; it must not become ours."""
    data_dir = stack.gateway.data_dir

    def directories() -> set[str]:
        places = (data_dir.parent, data_dir, data_dir / "tenants")
        return {str(path) for place in places for path in place.iterdir() if path.is_dir()}

    stack.tenant()  # so that there are some
    before = directories()
    for bad in UNSAFE_TENANT_IDS:
        with stack.client(bad) as api:
            assert_problem(api.post("/v1/memories", json={"content": "x"}), 401)
            assert_problem(api.get("/v1/memories"), 401)
            assert_problem(api.post("/v1/mcp", json=MCP), 401)
    assert directories() == before


def failures(stack: Stack, reason: str) -> float:  # noqa: F811
    return stack.gateway.metric("engram_auth_failures_total", reason=reason)


def reasons(stack: Stack) -> dict[str, str]:  # noqa: F811
    """What the access lines say of refused tokens, by request id."""
    return {x["request_id"]: x["auth_failure"] for x in stack.gateway.log() if "auth_failure" in x}
