"""Heads of requests and answers: sizes, hosts, origins, and what slow clients get."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.exchange import SCOPE_KEY, Exchange
from gateway.headers import MAX_FIELDS, Heads
from shared.settings import Settings
from tests.gateway_stack import Stack, assert_problem, gateway, stack  # noqa: F401

HOST = (b"host", b"engram.test")


def ask(
    settings: Settings, *headers: tuple[bytes, bytes], method: str = "GET", path: str = "/v1/memories", **scope: Any
) -> tuple[int, dict[str, str], bytes]:
    """Status, header fields (the exchange's too) and body of one request; 299 when it was let through."""
    exchange = Exchange(method, scope.get("headers", [HOST, *headers]))
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body is not read here")

    full = {"type": "http", "method": method, "path": path, "query_string": b"", "http_version": "1.1"}
    full |= {"headers": [HOST, *headers], SCOPE_KEY: exchange, "scheme": "https", "client": ("203.0.113.9", 5)} | scope
    asyncio.run(Heads(app, settings)(full, receive, send))
    fields = {k.decode(): v.decode() for k, v in [*sent[0]["headers"], *exchange.headers]}
    return sent[0]["status"], fields, sent[1]["body"]


def test_every_answer_forbids_what_an_api_never_needs() -> None:
    """No sniffing, no referrer, no framing; nothing of a tenant is cached; HSTS where there is TLS."""
    for env in ("dev", "staging", "prod"):
        _, fields, _ = ask(Settings(env=env, hsts_seconds=60))  # type: ignore[arg-type]
        assert fields["x-content-type-options"] == "nosniff" and fields["referrer-policy"] == "no-referrer"
        assert fields["cache-control"] == "no-store" and "frame-ancestors 'none'" in fields["content-security-policy"]
        assert ("strict-transport-security" in fields) == (env != "dev")
    assert "strict-transport-security" not in ask(Settings(env="prod", hsts_seconds=0))[1]
    assert "cache-control" not in ask(Settings(), path="/schema/openapi.json")[1]


@pytest.mark.parametrize(
    ("env", "peer", "status"),
    [
        ("prod", "203.0.113.9", 403),  # who reaches the port past the proxy
        ("prod", "10.0.0.9", 403),
        ("staging", "fdaa:0:1::9", 403),
        ("prod", "192.0.2.1", 403),  # a proxy that does not say that its client came over TLS
        ("prod", "127.0.0.1", 299),
        ("prod", "::1", 299),
        ("prod", "::ffff:127.0.0.1", 299),
        ("dev", "203.0.113.9", 299),
    ],
)
def test_outside_dev_the_api_is_spoken_in_plain_text_within_the_machine_alone(env: Any, peer: str, status: int) -> None:
    """That there is a proxy which ends TLS does not mean that everybody comes through it. A browser is promised
    nothing over plain text; probes and metrics carry no secret."""
    settings = Settings(env=env, hsts_seconds=60, trusted_proxies="192.0.2.0/24")
    scope: dict[str, Any] = {"scheme": "http", "client": (peer, 5)}
    found, fields, body = ask(settings, **scope)
    assert found == status and "strict-transport-security" not in fields and fields["cache-control"] == "no-store"
    assert status == 299 or json.loads(body)["reason"] == "https required"
    assert ask(settings, path="/health", **scope)[0] == 299


@pytest.mark.parametrize("path", ["//v1/memories", "/v1//memories", "///", "/v1/memories//", "//schema"])
def test_a_path_has_one_spelling(path: str) -> None:
    """Litestar takes repeated slashes for one, and what goes by a path's beginning would be passed by."""
    settings = Settings(env="prod", trusted_proxies="192.0.2.0/24")
    for scheme in ("https", "http"):
        status, _, body = ask(settings, path=path, scheme=scheme)
        assert status in (404, 403) and json.loads(body)["status"] == status
    assert ask(settings, path="/v1/memories/")[0] == 299


ORIGINS = ["https://app.example", "http://localhost:3000", "http://127.0.0.1:1", "http://localhost", "null"]
EVIL = [
    "https://app.example.evil", "https://evil", "http://localhost.evil", "http://localhost:3000.evil",
    "http://127.0.0.1:1@evil", "https://localhost", "http://localhost:3000/", "*", "",
]  # fmt: skip


@pytest.mark.parametrize(
    ("env", "allowed"),
    [
        ("dev", {"https://app.example", "http://localhost:3000", "http://127.0.0.1:1", "http://localhost"}),
        ("prod", {"https://app.example"}),
    ],
)
def test_only_configured_origins_may_call_from_a_browser(env: Any, allowed: set[str]) -> None:
    """Exact matches; in dev any port of this machine too. Others are served, but no browser shows them the answer."""
    settings = Settings(env=env, cors_allowed_origins=" https://app.example/ , https://two.example")
    for origin in [*ORIGINS, *EVIL]:
        status, fields, _ = ask(settings, (b"origin", origin.encode()))
        assert status == 299 and fields["vary"] == "Origin"
        assert fields.get("access-control-allow-origin") == (origin if origin in allowed else None)
        assert "access-control-allow-credentials" not in fields
    bare = ask(Settings(env="prod"), (b"origin", b"https://app.example"))[1]
    assert "access-control-allow-origin" not in bare and "vary" not in bare


def test_a_preflight_is_answered_without_a_token() -> None:
    """204 with what may be sent; for another origin 403; an OPTIONS that is no preflight goes on."""
    settings = Settings(env="prod", cors_allowed_origins="https://app.example")
    asks = (b"access-control-request-method", b"PATCH")
    status, fields, body = ask(settings, (b"origin", b"https://app.example"), asks, method="OPTIONS")
    assert status == 204 and not body
    assert "PATCH" in fields["access-control-allow-methods"]
    assert "Authorization" in fields["access-control-allow-headers"]
    mcp = {"Mcp-Protocol-Version", "Mcp-Method", "Mcp-Name", "Mcp-Session-Id", "Last-Event-ID"}
    assert mcp <= set(fields["access-control-allow-headers"].split(", ")), "both revisions of MCP"
    assert "RateLimit-Remaining" in fields["access-control-expose-headers"]
    status, fields, body = ask(settings, (b"origin", b"https://evil"), asks, method="OPTIONS")
    assert status == 403 and "access-control-allow-origin" not in fields and json.loads(body)["status"] == 403
    assert ask(settings, method="OPTIONS")[0] == 299


def test_a_head_that_is_too_large_is_refused_before_it_is_routed() -> None:
    """414 for the URL, 431 for the fields together or their number; at the limit it goes on."""
    settings = Settings(url_limit_bytes=256, header_limit_bytes=1_024)
    assert ask(settings, raw_path=b"/" * 256)[0] == 299
    assert ask(settings, raw_path=b"/" * 257)[0] == 414
    assert ask(settings, raw_path=b"/" * 200, query_string=b"x" * 57)[0] == 414
    assert ask(settings, (b"x", b"y" * 1_000))[0] == 299
    assert ask(settings, (b"x", b"y" * 1_024))[0] == 431
    assert ask(settings, *[(b"x", b"")] * 100)[0] == 431


def test_a_request_names_exactly_one_host() -> None:
    """HTTP/1.1 asks for that; an older or newer client may have said it otherwise or not at all."""
    settings = Settings()
    assert ask(settings, headers=[])[0] == ask(settings, headers=[(b"host", b"")])[0] == 400
    assert ask(settings, HOST)[0] == 400
    assert ask(settings, headers=[], http_version="2")[0] == ask(settings, headers=[], http_version="1.0")[0] == 299


@pytest.fixture
def cut(stack: Stack, tmp_path: Path) -> Any:  # noqa: F811
    with gateway(
        stack.lend_tenants(tmp_path),
        stack.control_plane_url,
        stack.issuer,
        module="tests.gateway_unchecked",
        gateway_workers=1,
        env="prod",
        header_timeout_seconds=2,
        body_timeout_seconds=2,
        cors_allowed_origins="https://app.example",
    ) as served:
        yield served


def raw(url: str, data: bytes) -> bytes:
    """What comes back until the server closes the connection, which it must."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_hostile_heads_and_slow_clients_get_an_answer_or_a_closed_connection(stack: Stack, cut: Any) -> None:  # noqa: F811
    """Never a 500, never a connection that stays; errors carry the security headers too."""
    token = stack.issuer.token(stack.idle_tenant)
    auth = f"Authorization: Bearer {token}\r\n".encode()
    close = b"Host: x\r\nConnection: close\r\n"
    begin = b"POST /v1/memories HTTP/1.1\r\nContent-Type: application/json\r\n" + auth
    expected = {
        b"": b"",  # says nothing at all
        b"GET /health HTTP/1.1\r\nHos": b"",  # stalls inside its head
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00": b"",
        b"GET /health\r\n\r\n": b"400",
        b"GE T / HTTP/1.1\r\n" + close + b"\r\n": b"400",
        b"GET /health HTTP/1.1\r\nX: a\x00b\r\n" + close + b"\r\n": b"400",
        b"GET /health HTTP/1.1\r\nno colon\r\n" + close + b"\r\n": b"400",
        begin + close + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}": b"400",
        begin + close + b"Content-Length: -2\r\n\r\n{}": b"400",
        begin + close + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n": b"400",
        begin + close + b"Transfer-Encoding: gzip\r\n\r\n{}": b"400",
        begin + close + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n": b"400",
        begin + close + b"Content-Length: 20\r\n\r\n{": b"408",  # stalls inside its body
        begin + close + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{": b"408",
        b"GET /v1/memories HTTP/1.1\r\nConnection: close\r\n" + auth + b"\r\n": b"400",
        b"GET /health?" + b"x" * 9_000 + b" HTTP/1.1\r\n" + close + b"\r\n": b"414",
        b"GET /health?" + b"x" * 70_000 + b" HTTP/1.1\r\n" + close + b"\r\n": b"414",
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n" + close + b"\r\n": b"431",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + close + b"\r\n": b"431",
        b"GET /v1/memories/\xff\xfe HTTP/1.1\r\n" + close + auth + b"\r\n": b"400",
        b"GET /v1/memories/%ff%fe%00 HTTP/1.1\r\n" + close + auth + b"\r\n": b"404",
        b"GET /v1/memories?tag=%ff&limit=%00 HTTP/1.1\r\n" + close + auth + b"\r\n": b"400",
        b"GET /v1/memories HTTP/1.1\r\nAuthorization: Bearer \xff\xfe\r\n" + close + b"\r\n": b"401",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + close + b"\r\n": b"400",
        b"\x16\x03\x01\x00": b"400",
    }
    with ThreadPoolExecutor(8) as pool:  # who stalls is waited for; the others are not late meanwhile
        for data, answer in zip(expected, pool.map(lambda data: raw(cut.url, data), expected), strict=True):
            assert answer[9:12] == expected[data], (data[:60], answer[:200])
    fields = b"".join(b"X%d: y\r\n" % n for n in range(MAX_FIELDS))
    for data, status in (
        (b"GET /health?" + b"x" * 9_000 + b" HTTP/1.1\r\n" + close + b"\r\n", 414),
        (b"GET /health HTTP/1.1\r\n" + fields + close + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 300_000 + b"\r\n" + close + b"\r\n", 431),
        (begin + close + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ):  # within what the server below reads, the answer is ours
        answer = raw(cut.url, data).partition(b"\r\n\r\n")[2]
        assert json.loads(answer)["status"] == status, data[:60]
    for path in ("/v1/memories", "/nothing", "/health"):
        response = cut.client.get(path, headers={"Origin": "https://app.example"})
        assert "strict-transport-security" not in response.headers, "in plain text"
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert response.headers["x-content-type-options"] == "nosniff"
    preflight = cut.client.options(
        "/v1/search", headers={"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 204 and preflight.headers["x-request-id"]
    with httpx.Client(base_url=cut.url, trust_env=False) as api:
        assert_problem(api.get("/v1/" + "x" * 9_000), 414)
