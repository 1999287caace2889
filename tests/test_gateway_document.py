"""What the OpenAPI document says and schemathesis does not find out: fields of answers, refusals, the server below."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.limits import COST_OF_ROUTE
from tests.gateway_stack import Stack, eventually, gateway, stack  # noqa: F401
from tests.test_gateway_quota import plan

RATE = {"RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset", "RateLimit-Policy"}
WARNING = "X-Engram-Quota-Warning"


@pytest.fixture
def operations(stack: Stack) -> dict[tuple[str, str], dict[str, Any]]:  # noqa: F811
    """Answers by status, of each method and path."""
    paths = stack.gateway.client.get("/schema/openapi.json").json()["paths"]
    return {
        (method.upper(), path): operation["responses"]
        for path, methods in paths.items()
        for method, operation in methods.items()
    }


def test_402_is_documented_where_a_counter_can_refuse(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    """`GET /v1/usage` draws on none, nor does the operators' API; the others name theirs."""
    may = {operation for operation, answers in operations.items() if "402" in answers}
    costs = {operation: cost.counters for operation, cost in COST_OF_ROUTE.items() if operation in operations}
    assert may == {operation for operation, counters in costs.items() if counters} and len(costs) - len(may) == 1
    for operation in may:
        assert all(f"`{counter}`" in operations[operation]["402"]["description"] for counter in costs[operation])


def test_the_fields_of_rates_and_quotas_are_documented_where_they_are_sent(
    stack: Stack,  # noqa: F811
    operations: dict[tuple[str, str], dict[str, Any]],
    tmp_path: Path,
) -> None:
    """On each answer of a tenant with a rate and a soft quota, from a good one to a 429; a 401 has none of them."""
    tenant, other = stack.tenant(), stack.tenant()
    for each in (tenant, other):
        plan(stack.control_plane, "documented", each, api_calls_soft=0)
    settings = {"rate_limit_rps": 0.001, "rate_limit_burst": 60, "quota_refresh_seconds": 0.2, "gateway_workers": 1}
    requests: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("POST", "/v1/memories", {"json": {"content": "x"}}),
        ("POST", "/v1/memories", {"json": {}}),
        ("POST", "/v1/memories", {"content": b"x"}),
        ("GET", "/v1/usage", {}),
        ("GET", "/v1/memories", {"headers": {"Authorization": ""}}),
    )
    seen = set()
    with (
        gateway(stack.lend_tenants(tmp_path / "data"), stack.control_plane_url, stack.issuer, **settings) as served,
        httpx.Client(base_url=served.url, headers=stack.headers(tenant), trust_env=False, timeout=30) as api,
    ):
        # Asked for with the other's rate: this one's has to last for what follows.
        eventually(lambda: WARNING in api.get("/v1/memories", headers=stack.headers(other)).headers)
        for method, path, options in requests * 20:
            answer = api.request(method, path, **options)
            documented = operations[method, path][str(answer.status_code)]["headers"]
            sent = {name for name in (*RATE, WARNING, "Accept-Encoding", "Retry-After") if name in answer.headers}
            assert sent <= documented.keys()
            assert sent >= RATE or answer.status_code == 401
            seen |= {answer.status_code, WARNING in sent}
    assert seen == {200, 201, 400, 401, 415, 429, True, False}
    for (_, path), answers in operations.items():
        for status, documents in answers.items():
            assert path.startswith("/v1/") or not RATE & documents["headers"].keys()
            assert status != "429" or all(documents["headers"][name]["required"] for name in RATE)
    assert WARNING not in operations["GET", "/v1/usage"]["200"]["headers"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GE T / HTTP/1.1\r\nHost: x\r\n\r\n", "400"),
        (b"GET /health HTTP/1.1\r\nno colon\r\n\r\n", "400"),
        (b"POST /v1/memories HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", "400"),
        (b"GET /health?" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", "414"),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", "431"),
    ],
)
def test_what_the_server_below_answers_itself_has_no_id_and_the_document_says_so(
    stack: Stack,  # noqa: F811
    operations: dict[tuple[str, str], dict[str, Any]],
    data: bytes,
    status: str,
) -> None:
    """Nothing of it reaches us: it is in no count. Every other answer must have the id."""
    before = stack.gateway.metric("engram_requests_total", status=status)
    where = urlsplit(stack.gateway.url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(data)
        head, _, body = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert head[9:12].decode() == status and b"x-request-id" not in head.lower() and body == b""
    assert stack.gateway.metric("engram_requests_total", status=status) == before
    for answers in operations.values():
        assert not answers[status]["headers"]["X-Request-Id"]["required"]
        optional = {s for s, answer in answers.items() if not answer["headers"]["X-Request-Id"]["required"]}
        assert optional == {"400", "414", "431"}


def test_metrics_are_sent_with_one_charset_and_as_documented(
    stack: Stack,  # noqa: F811
    operations: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Litestar adds one to whatever is text; Prometheus' own exposition format has one."""
    sent = stack.gateway.client.get("/metrics").headers["content-type"]
    assert sent == "text/plain; version=0.0.4; charset=utf-8"
    assert list(operations["GET", "/metrics"]["200"]["content"]) == [sent]


def test_a_problem_names_all_it_may_carry(stack: Stack) -> None:  # noqa: F811
    """`failing` of `/ready`, too; and `reason` is not for 429 and 503 alone."""
    document = stack.gateway.client.get("/schema/openapi.json").json()
    problem = document["components"]["schemas"]["ProblemView"]
    assert problem["properties"]["failing"]["items"]["enum"] == ["jwks", "spool", "tenants"]
    assert all(status in problem["description"] for status in ("402", "403", "409", "421", "429", "503"))
