"""What is billed: one event for every request that reached a tenant, and one pure table of what it counts.

"Reached a tenant" means: the token was accepted and named an active tenant. What such a request counts:

| request                                        | api_calls | search_queries | memories_created |
|------------------------------------------------|-----------|----------------|------------------|
| answered 2xx                                   | 1         | 1 for a search | as many as made  |
| the caller's mistake (4xx except 429)          | 1         | 0              | 0                |
| refused or failed by us (429, 5xx)             | 0         | 0              | 0                |

An MCP tool call is a request to /v1/mcp and counts as what it did: a `memory_search` as one search, a
`memory_create_batch` as its memories. Its status is the one of the problem that its tool error carries (MCP answers
those with HTTP 200), so a tool refused by us counts as little as a route refused by us. Everything else sent there
(`initialize`, `tools/list`, a notification) is one api_call.

Every such request is still an event with its route and status, so usage can be checked against the access log.
`storage_bytes` is a gauge measured apart: deltas break at the first restore.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Counters(NamedTuple):
    api_calls: int
    search_queries: int
    memories_created: int


class UsageEvent(msgspec.Struct, array_like=True, frozen=True):
    """One request. `request_id` is the 16 bytes of a UUIDv7, `ts_us` microseconds since 1970 UTC."""

    request_id: bytes
    tenant_id: str
    route: str
    status: int
    api_calls: int
    search_queries: int
    memories_created: int
    ts_us: int


NOTHING = Counters(0, 0, 0)
CALL = Counters(1, 0, 0)
SEARCH = Counters(1, 1, 0)


def count(route: str, status: int, created: int = 0, searches: int = 0) -> Counters:
    """The counters of one request. `created` and `searches` are what an MCP tool or a route did (only 2xx count)."""
    if status >= 500 or status == 429:
        return NOTHING
    if status >= 400:
        return CALL
    if route == "/v1/search":
        return SEARCH
    return Counters(1, searches, created) if created or searches else CALL
