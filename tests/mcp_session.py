"""Clients of the official MCP SDK against a gateway, for tests."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


class Session:
    """A client of one tenant, and every HTTP answer it got by request id: status, method and tool."""

    def __init__(self, client: Client, answers: dict[str, tuple[int, str]]) -> None:
        self.client = client
        self.answers = answers

    async def ok(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The document of a tool that must not fail; its text says the same."""
        result = await self.client.call_tool(tool, arguments)
        assert not result.is_error, result
        document: dict[str, Any] = result.structured_content
        assert json.loads(result.content[0].text) == document
        return document

    async def problem(self, tool: str, status: int, **arguments: Any) -> dict[str, Any]:
        """The problem document of a tool that must fail with this status."""
        result = await self.client.call_tool(tool, arguments)
        assert result.is_error and result.structured_content is None, result
        document: dict[str, Any] = json.loads(result.content[0].text)
        assert {"type", "title", "status", "detail", "request_id"} <= document.keys()
        assert document["status"] == status, document
        assert document["request_id"] in self.answers
        return document


@asynccontextmanager
async def session(stack: Stack, tenant: str, mode: str = "auto", **claims: Any) -> AsyncIterator[Session]:  # noqa: F811
    """`mode` is "legacy" for 2025-11-25, else the newest revision both know."""
    answers: dict[str, tuple[int, str]] = {}

    async def note(response: httpx2.Response) -> None:
        message = json.loads(response.request.content)
        name = message["params"]["name"] if message["method"] == "tools/call" else message["method"]
        answers[response.headers["x-request-id"]] = (response.status_code, name)

    headers = stack.headers(tenant, **claims)
    async with httpx2.AsyncClient(
        headers=headers, event_hooks={"response": [note]}, timeout=30, trust_env=False
    ) as http:
        transport = streamable_http_client(f"{stack.gateway.url}/v1/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield Session(client, answers)


def within(
    stack: Stack,  # noqa: F811
    tenant: str,
    work: Callable[[Session], Awaitable[Any]],
    mode: str = "auto",
    **claims: Any,
) -> Any:
    """Run `work` with a session of this tenant."""

    async def run() -> Any:
        async with session(stack, tenant, mode, **claims) as opened:
            return await work(opened)

    return asyncio.run(run())


def events_of(stack: Stack, tenant: str) -> dict[str, tuple[str, int, int, int, int]]:  # noqa: F811
    events = stack.gateway.events(tenant)
    by_id = {
        str(uuid.UUID(bytes=e.request_id)): (e.route, e.status, e.api_calls, e.search_queries, e.memories_created)
        for e in events
    }
    assert len(by_id) == len(events)
    return by_id
