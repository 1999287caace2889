"""What a gateway sends on to another machine's: the client's own words, fit for HTTP/1.1, and who the client is."""

from __future__ import annotations

from typing import Any

import pytest

from gateway import forward
from gateway.forward import Forwarder
from gateway.patience import Patience
from gateway.proxies import Proxies
from gateway.routing import _length
from shared.settings import Settings


def scope(**more: Any) -> dict[str, Any]:
    found = {"method": "GET", "path": "/v1/memories", "query_string": b"", "headers": [(b"host", b"api")]}
    return found | {"scheme": "https", "client": ("2001:db8::7", 4711)} | more


def head(settings: Settings, asked: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    return Forwarder(settings, Patience())._head(asked, b"")


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
        return _length({"method": method, "http_version": version, "headers": headers})

    assert length("POST", "2", []) is None and length("POST", "2", announced) == 7
    assert length("GET", "2", []) == 0 and length("POST", "1.1", []) == 0
    assert length("POST", "1.1", [(b"transfer-encoding", b"chunked"), *announced]) is None
