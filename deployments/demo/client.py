"""A REST client for one tenant that counts every request the way the customer's bill does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from shared.errors import Permanent
from shared.usage import count

CONCURRENCY = 8
_RETRIES = 20


@dataclass(slots=True)
class Counted:
    """What this client sent and was answered: requests, and what of it is billed."""

    requests: int = 0
    api_calls: int = 0
    search_queries: int = 0
    memories_created: int = 0

    def add(self, route: str, status: int, created: int) -> None:
        billed = count(route, status, created)
        self.requests += 1
        self.api_calls += billed.api_calls
        self.search_queries += billed.search_queries
        self.memories_created += billed.memories_created


@dataclass(slots=True)
class TenantClient:
    """Requests of one tenant. 503 is tried again after its Retry-After, as a good client does."""

    http: httpx.AsyncClient
    tenant_id: str
    token: str
    counted: Counted = field(default_factory=Counted)

    async def call(self, method: str, path: str, *, expect: int, json: Any = None, route: str = "") -> Any:
        """One request; its JSON body. Raises `Permanent` when the status is not `expect`."""
        for _ in range(_RETRIES):
            response = await self.http.request(
                method, path, json=json, headers={"Authorization": f"Bearer {self.token}"}
            )
            created = 1 if response.status_code == 201 else 0
            self.counted.add(route or path, response.status_code, created)
            if response.status_code != 503 or expect == 503:
                break
            await asyncio.sleep(float(response.headers.get("retry-after", "1")))
        if response.status_code != expect:
            raise Permanent(f"{method} {path}: expected {expect}, got {response.status_code}: {response.text[:200]}")
        return response.json() if response.content else None

    async def create_all(
        self, memories: Iterable[dict[str, Any]], advance: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        """Create every memory, several at a time; the acknowledged ones by id."""
        acknowledged: dict[str, dict[str, Any]] = {}
        queue = iter(list(memories))

        async def worker() -> None:
            for memory in queue:
                made = await self.call("POST", "/v1/memories", expect=201, json=memory)
                acknowledged[made["id"]] = made
                advance()

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
        return acknowledged

    async def all_memories(self) -> dict[str, dict[str, Any]]:
        """Every memory of the tenant, page by page."""
        found: dict[str, dict[str, Any]] = {}
        cursor = ""
        while True:
            page = await self.call(
                "GET",
                f"/v1/memories?limit=200{f'&cursor={cursor}' if cursor else ''}",
                expect=200,
                route="/v1/memories",
            )
            found |= {memory["id"]: memory for memory in page["memories"]}
            if not (cursor := page["next_cursor"] or ""):
                return found

    async def search(self, query: str, *, expect: int = 200) -> Any:
        return await self.call("POST", "/v1/search", expect=expect, json={"query": query})
