"""Clients for one tenant, of REST and of MCP, that count every request the way the customer's bill does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
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

    def add(self, route: str, status: int, created: int, searches: int = 0) -> None:
        billed = count(route, status, created, searches)
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


@dataclass(slots=True)
class McpSession:
    """Tools of one tenant, through the official SDK's client."""

    client: Any

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The tool's document. A problem that says when to try again is. Raises `Permanent` for others."""
        for _ in range(_RETRIES):
            result = await self.client.call_tool(tool, arguments)
            if not result.is_error:
                document: dict[str, Any] = result.structured_content
                return document
            problem = json.loads(result.content[0].text)
            if "retry_after" not in problem:
                break
            await asyncio.sleep(problem["retry_after"])
        raise Permanent(f"{tool}: {problem['status']} {problem['detail']}")


@asynccontextmanager
async def mcp_session(gateway_url: str, token: str, counted: Counted) -> AsyncIterator[McpSession]:
    """Every HTTP answer is counted, the handshake's and those to the SDK's own questions too."""
    import httpx2
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    async def note(response: httpx2.Response) -> None:
        await response.aread()
        message = json.loads(response.request.content)
        if message["method"] == "tools/call" and response.status_code == 200:
            counted.add("/v1/mcp", *_done(message["params"]["name"], response.json().get("result", {})))
        else:
            counted.add("/v1/mcp", response.status_code, 0)

    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, event_hooks={"response": [note]}, timeout=30.0) as http,
        Client(streamable_http_client(f"{gateway_url}/v1/mcp", http_client=http)) as client,
    ):
        yield McpSession(client)


def _done(tool: str, result: dict[str, Any]) -> tuple[int, int, int]:
    """Status, memories made and searches of an answered tool call; a tool error has its problem's status."""
    if result.get("isError"):
        return json.loads(result["content"][0]["text"])["status"], 0, 0
    document = result["structuredContent"]
    created = document["count"] if tool == "memory_create_batch" else int(tool == "memory_create")
    return 200, created, int(tool == "memory_search")
