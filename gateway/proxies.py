"""Whose request it is when a proxy stands in front.

What a field of a request says of the client's address is believed only when the connection comes from one of
`trusted_proxies`, and only the one field `client_address_header`: a proxy that writes `X-Forwarded-For` passes on
whatever its client put into `Forwarded`, and the other way round. Fields with one address (`Fly-Client-IP`) work alike.

A list is read from its end, which the nearest proxy wrote, over the trusted ones to the first address that is not:
what stands further left the client may have invented. At something that is no address (`unknown`, `_hidden`, junk)
reading stops, and the last address found counts.

The scheme is what the proxy says in `X-Forwarded-Proto`, or `proto=` of `Forwarded`: of the hop whose address was
taken where that can be told, else of the nearest.

Both are put into the ASGI scope, as if the client had connected itself: nobody behind this has to know. Without
`trusted_proxies` nothing here runs.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import Any

from shared.settings import Settings, words

_CACHED = 4_096
_FORWARDED = b"forwarded"
_PROTO = b"x-forwarded-proto"
_ADDED = frozenset((_FORWARDED, b"x-forwarded-for", b"x-forwarded-host", b"via"))  # by a proxy, whatever it is set to
# One `name=value` of RFC 7239, its value a token or a quoted string, and what ends it.
_PAIR = re.compile(r'\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*"|[^\s",;]*)\s*([;,]|\Z)')


PROXIED = "engram.proxied"  # in the scope of a request that came from a trusted proxy's address
FOR_ANOTHER = "engram.for-another"  # and in that of one that somebody else had sent to the proxy


class Proxies:
    """False when there are none."""

    def __init__(self, settings: Settings) -> None:
        self._networks = [ipaddress.ip_network(network) for network in words(settings.trusted_proxies)]
        self._field = settings.client_address_header.lower().encode()
        self._trusts = functools.lru_cache(_CACHED)(self._is_trusted)
        self._read = functools.lru_cache(_CACHED)(self._client)  # a client's requests carry the same fields

    def __bool__(self) -> bool:
        return bool(self._networks)

    def settle(self, scope: Any) -> bool:
        """Put the client's address and scheme into the scope. Whether a trusted proxy passed the request on."""
        client = scope.get("client")
        if client is None or not self._trusts(client[0]):
            return False
        given: list[bytes] = []
        proto = b""
        for name, value in scope["headers"]:
            if name == self._field:
                given.append(value)
            elif name == _PROTO:
                proto = value
            elif name not in _ADDED:
                continue
            scope[FOR_ANOTHER] = True
        address, scheme = self._read(client[0], b",".join(given), proto)
        scope["client"] = (address, 0)
        scope[PROXIED] = True
        if scheme:
            scope["scheme"] = scheme
        return True

    def _client(self, peer: str, field: bytes, proto: bytes) -> tuple[str, str]:
        """The client's address, and the scheme it used or ""."""
        text = field.decode("latin-1")
        if self._field == _FORWARDED:
            hops = _forwarded(text)
        else:
            addresses = [part.strip() for part in text.split(",")] if text else []
            schemes = [part.strip() for part in proto.decode("latin-1").split(",")]
            if len(schemes) != len(addresses):
                schemes = schemes[-1:] * (len(addresses) or 1)
            hops = list(zip(addresses or [""], schemes, strict=True))
        address, scheme = peer, hops[-1][1] if hops else ""
        for text, of_hop in reversed(hops):
            found = _address(text)
            if found is None:
                break
            address, scheme = found, of_hop
            if not self._trusts(found):
                break
        scheme = scheme.lower()
        return address, scheme if scheme in ("http", "https") else ""

    def _is_trusted(self, text: str) -> bool:
        found = _address(text)
        return found is not None and any(ipaddress.ip_address(found) in network for network in self._networks)


def is_loopback(peer: tuple[str, int] | None) -> bool:
    """Whether a connection's other end is this machine itself; one without an address is a socket in its files."""
    found = _address(peer[0]) if peer is not None else "127.0.0.1"
    return found is not None and ipaddress.ip_address(found).is_loopback


def _address(text: str) -> str | None:
    """The IP address in `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1` or `[2001:db8::1]:80`; None in anything else."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        if found.scope_id is not None:
            return None
        return str(found.ipv4_mapped or found)
    return str(found)


def _forwarded(text: str) -> list[tuple[str, str]]:
    """`for` and `proto` of each hop, the nearest last. What cannot be read leaves a hop without an address: nothing
    before it is believed."""
    hops: list[tuple[str, str]] = []
    hop: dict[str, str] = {}
    at = 0
    while at < len(text):
        found = _PAIR.match(text, at)
        if found is None:
            ends = text.find(",", at)  # of the hop that makes no sense, as far as that can be told
            hops.append(("", ""))
            hop, at = {}, ends + 1 if ends >= 0 else len(text)
            continue
        value = found[2]
        hop[found[1].lower()] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
        at = found.end()
        if found[3] != ";" or at >= len(text):
            hops.append((hop.get("for", ""), hop.get("proto", "")))
            hop = {}
    return hops
