"""What a gateway sends on to another machine's: the client's own words, fit for HTTP/1.1, and who the client is."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway import forward
from gateway.edge import Receive
from gateway.exchange import SCOPE_KEY, Exchange
from gateway.forward import CONNECT_SECONDS, OF_A_TENANT, Forwarder
from gateway.patience import STOPPING_SHARE, Patience
from gateway.proxies import Proxies
from gateway.raw_body import announced_length
from shared.settings import Settings


def scope(**more: Any) -> dict[str, Any]:
    found = {"method": "GET", "path": "/v1/memories", "query_string": b"", "headers": [(b"host", b"api")]}
    return found | {"scheme": "https", "client": ("2001:db8::7", 4711)} | more


def head(settings: Settings, asked: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    return Forwarder(settings, Patience(settings))._head(asked, b"")


@pytest.mark.parametrize(
    ("path", "query", "target"),
    [
        (b"/v1/memories", b"", b"/v1/memories"),
        (b"/v1/memories", "tag=café".encode(), b"/v1/memories?tag=caf%C3%A9"),
        (b"/v1/memories/%2e%2e/.", b"a=%20&b=+\x7f", b"/v1/memories/%2e%2e/.?a=%20&b=+%7F"),
        (b"//other.example/v1", b"", b"//other.example/v1"),
    ],
)
def test_path_and_query_go_on_as_they_came(path: bytes, query: bytes, target: bytes) -> None:
    """Raw bytes are escaped, nothing is resolved: the answer must not depend on the machine that was asked first."""
    assert forward._target(scope(raw_path=path, query_string=query)) == target


def test_blanks_that_http2_leaves_around_a_value_do_not_go_on() -> None:
    """HTTP/1.1 refuses them, in an error that quotes the value: here a token."""
    sent = dict(head(Settings(), scope(headers=[(b"authorization", b" Bearer secret\t")])))
    assert sent[b"authorization"] == b"Bearer secret"


@pytest.mark.parametrize("field", ["x-forwarded-for", "forwarded", "fly-client-ip"])
def test_the_other_gateway_reads_the_client_and_its_scheme_from_what_this_one_sends(field: str) -> None:
    """Else it takes all that is passed on for plain HTTP of this machine's, and refuses it in staging and prod."""
    settings = Settings(client_address_header=field, trusted_proxies="10.0.0.0/8")  # type: ignore[arg-type]
    spoofed = [(b"forwarded", b"for=1.1.1.1;proto=http"), (b"x-forwarded-proto", b"http")]
    arrived = scope(scheme="http", client=("10.0.0.1", 1), headers=head(settings, scope(headers=spoofed)))
    assert Proxies(settings).settle(arrived)
    assert (arrived["client"][0], arrived["scheme"]) == ("2001:db8::7", "https")


def test_a_body_that_http2_does_not_announce_has_no_known_length() -> None:
    """Fly's proxy repeats at most a megabyte: nothing announced must not count as nothing there."""
    announced = [(b"content-length", b"7")]

    def length(method: str, version: str, headers: list[tuple[bytes, bytes]]) -> int | None:
        return announced_length({"method": method, "http_version": version, "headers": headers})

    assert length("POST", "2", []) is None and length("POST", "2", announced) == 7
    assert length("GET", "2", []) == 0 and length("POST", "1.1", []) == 0
    assert length("POST", "1.1", [(b"transfer-encoding", b"chunked"), *announced]) is None


def test_a_machine_that_hangs_takes_only_its_share_and_an_answer_that_breaks_off_is_502() -> None:
    """The sixteenth request of a tenant waits, the next is shed; nobody claims to know what a silent machine did."""

    async def run() -> None:
        hangs = asyncio.Event()

        async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await hangs.wait()
            writer.close()

        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = Settings(routing="forward", routing_urls=url + "/{machine_id}")
        forwarder = Forwarder(settings, Patience(settings))
        waiting = [asyncio.create_task(_asked(forwarder, url, "acme")) for _ in range(OF_A_TENANT)]
        await asyncio.sleep(0)
        assert await _asked(forwarder, url, "acme") == (503, "shed")
        another = asyncio.create_task(_asked(forwarder, url, "another"))
        await asyncio.sleep(0)
        hangs.set()
        assert {await task for task in (*waiting, another)} == {(502, "machine broke off")}
        server.close()
        await server.wait_closed()
        assert await _asked(forwarder, url, "acme") == (503, "machine unreachable"), "and the places were given back"
        await forwarder.close()

    asyncio.run(run())


def test_a_slow_body_takes_none_of_the_places_of_what_is_forwarded() -> None:
    """Sixteen of a tenant hang half-way, and the tenant's next request goes out."""

    async def run() -> None:
        settings = Settings(routing="forward", routing_urls="http://127.0.0.1:9/{machine_id}")
        forwarder = Forwarder(settings, Patience(settings))
        nothing_comes = asyncio.Event()

        async def hang() -> Any:
            await nothing_comes.wait()

        url = "http://127.0.0.1:9"  # where nobody listens
        slow = [asyncio.create_task(_asked(forwarder, url, "acme", hang)) for _ in range(OF_A_TENANT)]
        await asyncio.sleep(0)
        assert await _asked(forwarder, url, "acme") == (503, "machine unreachable")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await forwarder.close()

    asyncio.run(run())


async def _whole() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _asked(forwarder: Forwarder, url: str, tenant_id: str, receive: Receive = _whole) -> tuple[int, str]:
    """Status and reason of a GET that is forwarded."""
    exchange = Exchange("GET")
    exchange.tenant_id = tenant_id
    scope = {"method": "GET", "path": "/v1/memories", "query_string": b"", "scheme": "http", "headers": []}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await forwarder.to(url)({**scope, SCOPE_KEY: exchange}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])["reason"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"routing": "fly-replay", "routing_apps": "engram-{machine_id}"},
        {"routing": "fly-replay", "trusted_proxies": "127.0.0.1/32"},
        {"routing": "forward"},
        {"routing_apps": "engram"},
        {"routing_apps": "engram-{machine_id}, other-{machine_id}"},
        {"routing_apps": "engram-{machine}"},
        {"routing_urls": "data-1=http://{machine_id}"},
    ],
)
def test_routing_that_cannot_work_is_refused_at_the_start(wrong: dict[str, Any]) -> None:
    """Better than a 421 for every tenant of another machine."""
    with pytest.raises(ValidationError):
        Settings(**wrong)
    assert Settings(routing="forward", routing_urls="{machine_id}, data-1=http://x:1").routing == "forward"


def test_a_stopping_gateway_has_the_time_that_a_forwarded_request_may_take() -> None:
    """Killed while it waits for another machine's gateway it would cut the request, and seal nothing."""
    settings = Settings()
    body_seconds = settings.gateway_kill_timeout_seconds / STOPPING_SHARE
    longest = body_seconds + CONNECT_SECONDS + settings.routing_timeout_seconds
    assert longest <= settings.gateway_kill_timeout_seconds
