"""Behind a proxy: whose word counts, what it says, and what a spoofed one achieves."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.proxies import Proxies
from shared.settings import Settings
from tests.gateway_stack import Stack, assert_problem, gateway, stack  # noqa: F401

XFF, FORWARDED, PROTO = b"x-forwarded-for", b"forwarded", b"x-forwarded-proto"
TRUSTED = "192.0.2.0/24, fdaa::/16"
NEAR, FAR = "192.0.2.1", "203.0.113.9"


def settled(
    *headers: tuple[bytes, bytes], peer: str | None = NEAR, field: str = "x-forwarded-for", trusted: str = TRUSTED
) -> tuple[str, str, bool]:
    """The client's address and the scheme as the application then sees them, and whether a proxy was believed."""
    proxies = Proxies(Settings(trusted_proxies=trusted, client_address_header=field))
    scope: dict[str, Any] = {"client": (peer, "5") if peer else None, "scheme": "http", "headers": list(headers)}
    believed = proxies.settle(scope)
    return scope["client"][0] if scope["client"] else "", scope["scheme"], believed


@pytest.mark.parametrize(
    ("value", "address"),
    [
        (b"198.51.100.1", "198.51.100.1"),
        (b"6.6.6.6, 198.51.100.1", "198.51.100.1"),  # the left one the client has invented
        (b"6.6.6.6, 198.51.100.1, 192.0.2.7", "198.51.100.1"),  # two trusted hops
        (b"192.0.2.7, 192.0.2.8", "192.0.2.7"),  # a request of the proxies' own network
        (b"198.51.100.1:4711", "198.51.100.1"),
        (b"[2001:db8::1]:4711", "2001:db8::1"),
        (b"2001:db8::1", "2001:db8::1"),
        (b"::ffff:198.51.100.1", "198.51.100.1"),
        (b"6.6.6.6, unknown", NEAR),  # nobody vouches for what stands before it
        (b"6.6.6.6, junk, 192.0.2.7", "192.0.2.7"),
        (b"", NEAR),
        (b",,,", NEAR),
        (b"198.51.100.1\xff", NEAR),
        (b"fe80::1%eth0", NEAR),
    ],
)
def test_the_nearest_address_that_is_no_proxy_is_the_clients(value: bytes, address: str) -> None:
    """A list grows to the right; only what the trusted proxies wrote is believed."""
    assert settled((XFF, value)) == (address, "http", True)


def test_several_lines_of_a_field_are_one_list() -> None:
    """RFC 9110: a proxy may add a line instead of extending one."""
    assert settled((XFF, b"6.6.6.6"), (XFF, b"198.51.100.1"))[0] == "198.51.100.1"


@pytest.mark.parametrize(
    ("value", "address", "scheme"),
    [
        (b"for=198.51.100.1", "198.51.100.1", "http"),
        (b"for=198.51.100.1;proto=https;by=192.0.2.1", "198.51.100.1", "https"),
        (b'For="[2001:db8::1]:4711" ; Proto=HTTPS', "2001:db8::1", "https"),
        (b"for=6.6.6.6;proto=http, for=198.51.100.1;proto=https", "198.51.100.1", "https"),
        (b"for=198.51.100.1;proto=https, for=192.0.2.7;proto=http", "198.51.100.1", "https"),
        (b'for="6.6.6.6, for=7.7.7.7", for=198.51.100.1', "198.51.100.1", "http"),  # commas in quotes
        (b'for="6.6.6.6, for=198.51.100.1', "198.51.100.1", "http"),  # a client's open quote swallows nobody
        (b'for="x, for="[2001:db8::1]"', "2001:db8::1", "http"),
        (b'for="6.6.6.6\\"', NEAR, "http"),
        (b"for=_hidden, for=unknown", NEAR, "http"),
        (b"for=6.6.6.6, junk junk, for=192.0.2.7;proto=https", "192.0.2.7", "https"),
        (b"proto=https", NEAR, "https"),
        (b"", NEAR, "http"),
        (b";;==,=", NEAR, "http"),
    ],
)
def test_forwarded_is_read_as_rfc_7239_says(value: bytes, address: str, scheme: str) -> None:
    """Quoted strings, ports, obfuscated names; what cannot be read vouches for nothing before it."""
    assert settled((FORWARDED, value), field="Forwarded") == (address, scheme, True)


def test_only_the_configured_field_counts() -> None:
    """A proxy that writes one of them passes the other on as its client sent it."""
    both = (FORWARDED, b"for=6.6.6.6;proto=https"), (XFF, b"198.51.100.1")
    assert settled(*both) == ("198.51.100.1", "http", True)
    assert settled(*both, field="forwarded") == ("6.6.6.6", "https", True)
    assert settled((b"fly-client-ip", b"198.51.100.1"), (XFF, b"6.6.6.6"), field="Fly-Client-IP")[0] == "198.51.100.1"


@pytest.mark.parametrize("peer", [FAR, "::1", "", None, "not an address", "192.0.3.1"])
def test_nobody_else_is_believed(peer: str | None) -> None:
    """Every field is the client's to write; the connection's other end is not."""
    told = settled((XFF, b"6.6.6.6"), (PROTO, b"https"), (FORWARDED, b"for=6.6.6.6;proto=https"), peer=peer)
    assert told == (peer or "", "http", False)


def test_a_trusted_peer_is_known_however_its_address_is_written() -> None:
    """A dual-stack socket names an IPv4 peer inside IPv6."""
    assert settled((XFF, b"198.51.100.1"), peer="::ffff:192.0.2.1")[0] == "198.51.100.1"
    assert settled((XFF, b"198.51.100.1"), peer="fdaa:0:1::3")[0] == "198.51.100.1"


@pytest.mark.parametrize(
    ("addresses", "proto", "scheme"),
    [
        (b"198.51.100.1", b"https", "https"),
        (b"198.51.100.1", b"HTTP", "http"),
        (b"", b"https", "https"),
        (b"6.6.6.6, 198.51.100.1, 192.0.2.7", b"http, https, http", "https"),  # the hop whose address was taken
        (b"6.6.6.6, 198.51.100.1", b"http", "http"),
        (b"198.51.100.1", b"http, https", "https"),  # they do not match: the nearest proxy's word
        (b"198.51.100.1", b"gopher", "http"),
        (b"198.51.100.1", b"", "http"),
    ],
)
def test_the_scheme_is_the_one_the_client_used(addresses: bytes, proto: bytes, scheme: str) -> None:
    """A list of schemes goes with the list of addresses; anything but http and https says nothing."""
    assert settled((XFF, addresses), (PROTO, proto))[1] == scheme


@given(st.binary(max_size=60), st.sampled_from([XFF, FORWARDED]))
def test_whatever_a_field_holds_the_client_has_an_address(value: bytes, field: bytes) -> None:
    """It goes into a log line and a bucket's name: an IP address, in its one canonical form, or the peer's."""
    import ipaddress

    address, scheme, believed = settled((field, value), (PROTO, value), field=field.decode())
    assert str(ipaddress.ip_address(address)) == address
    assert scheme in ("http", "https") and believed


def test_networks_that_are_none_are_refused_at_the_start() -> None:
    """A typing error must not turn into "trust nobody", or into a wider network."""
    for wrong in ("10.0.0.1/8", "example.com", "10.0.0.0/33", "10.0.0.0/8;192.0.2.0/24"):
        with pytest.raises(ValidationError):
            Settings(trusted_proxies=wrong)
    assert not Proxies(Settings())
    assert Proxies(Settings(trusted_proxies=" 10.0.0.0/8 , ::1 "))


def test_a_flood_behind_a_proxy_is_told_apart_from_its_neighbours_and_spoofing_gains_nothing(stack: Stack) -> None:  # noqa: F811
    """Over real connections: from the proxy's address each client has a bucket of its own, the access line names it,
    plain HTTP at the proxy is refused; from any other address the same fields are only bytes."""
    data_dir = stack.settings.data_dir.parent / "proxied"
    with gateway(
        data_dir,
        stack.control_plane_url,
        stack.issuer,
        module="tests.gateway_unchecked",
        env="staging",
        gateway_workers=1,
        trusted_proxies="127.0.0.9/32",
        rate_limit_mode="enforce",
        unauthenticated_rps=0.001,
        unauthenticated_burst=3,
    ) as served:

        def client(source: str) -> httpx.Client:
            transport = httpx.HTTPTransport(local_address=source)
            return httpx.Client(base_url=served.url, transport=transport, trust_env=False)

        def statuses(api: httpx.Client, address: str, count: int) -> list[int]:
            sent = {"X-Forwarded-For": f"6.6.6.6, {address}", "X-Forwarded-Proto": "https"}
            return [api.get("/v1/memories", headers=sent).status_code for _ in range(count)]

        with client("127.0.0.9") as proxy, client("127.0.0.8") as elsewhere:
            assert statuses(proxy, "198.51.100.1", 5) == [401, 401, 401, 429, 429]
            assert statuses(proxy, "198.51.100.2", 3) == [401, 401, 401]
            told = proxy.get("/health", headers={"X-Forwarded-For": "198.51.100.3", "X-Forwarded-Proto": "https"})
            assert served.access_line(told.headers["x-request-id"])["client"] == "198.51.100.3"
            assert "strict-transport-security" in told.headers

            plain = {"X-Forwarded-For": "198.51.100.4", "X-Forwarded-Proto": "http"}
            refused = proxy.get("/v1/memories", headers=plain | stack.headers(stack.idle_tenant))
            assert assert_problem(refused, 403)["reason"] == "https required"
            assert "strict-transport-security" not in refused.headers
            assert proxy.get("/health", headers=plain).status_code == 200

            assert [statuses(elsewhere, f"198.51.100.{n}", 1)[0] for n in range(10, 15)] == [401, 401, 401, 429, 429]
            spoofed = elsewhere.get("/health", headers=plain)
            assert served.access_line(spoofed.headers["x-request-id"])["client"] == "127.0.0.8"
            assert "strict-transport-security" not in spoofed.headers

            # The metrics: for who asks here, on the proxy's machine too; not for who asks the proxy, named or not.
            visitor = {"X-Forwarded-For": "198.51.100.5", "X-Forwarded-Proto": "https"}
            for hidden in ({}, {"X-Forwarded-For": "unknown"}, {"X-Forwarded-For": "127.0.0.9"}):
                assert_problem(proxy.get("/metrics", headers=visitor | hidden), 404)
            assert_problem(proxy.get("/metrics", headers={"Forwarded": "for=_hidden"}), 404)
            assert proxy.get("/metrics").status_code == elsewhere.get("/metrics", headers=visitor).status_code == 200
