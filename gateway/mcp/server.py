"""The official SDK, fitted to the tools. Imported late (see `gateway.mcp.route`): nothing else may import it.

A tool that fails is an MCP tool error whose text is the problem document REST would have answered with, under the
same request id; the cause goes to the log. Only an unknown tool is a JSON-RPC error, as the protocol asks for.
"""

from __future__ import annotations

import logging
from typing import Any

import mcp_types as types
from mcp.server.caching import CacheHint
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError

from gateway.exchange import Exchange, exchange_of
from gateway.mcp import filling, tools
from gateway.mcp.arguments import schema_of
from gateway.problems import MAINTENANCE, Refusal, log_failure, problem_of
from gateway.services import Services
from shared.log import get_logger

VERSION = "1"
LIST_TTL_MS = 300_000  # the tools change with a deploy only, and are the same for everybody
INSTRUCTIONS = (
    "Memories of one tenant: the one the bearer token names. A failed tool answers a problem document; with"
    " `retry_after` the same call may succeed after so many seconds."
)
log = get_logger("mcp")


def session_manager(services: Services) -> StreamableHTTPSessionManager:
    """Stateless, one JSON document an answer. Its body limit is the gateway's, which has been applied already."""
    _log_as_we_do()
    listed = types.ListToolsResult(tools=[_listed(tool) for tool in tools.TOOLS.values()])
    input_schemas = {tool.name: tool.input_schema for tool in listed.tools}

    async def list_tools(_context: Any, _params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return listed

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        exchange = exchange_of(context.request.scope)
        tool = tools.TOOLS.get(params.name)
        if tool is None:
            exchange.outcome = 400
            raise MCPError(code=types.INVALID_PARAMS, message=f"Unknown tool: {params.name:.80}")
        try:
            result = await tools.run(tool, tools.Call(services, exchange), params.arguments or {})
        except Exception as e:  # noqa: BLE001  every failure has a problem; what nobody foresaw is logged with its trace
            return _failed(e, exchange)
        text, document = context.request.scope[filling.SCOPE_KEY].stand_in(result)
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], structured_content=document)

    server: Server[Any] = Server(
        "engram",
        version=VERSION,
        title="Engram",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        cache_hints={
            "tools/list": CacheHint(LIST_TTL_MS, "public"),
            "server/discover": CacheHint(LIST_TTL_MS, "public"),
        },
        get_tool_input_schema=input_schemas.get,
    )
    server.middleware.clear()  # OpenTelemetry spans, which nobody collects here
    return StreamableHTTPSessionManager(
        server, json_response=True, stateless=True, max_request_body_size=services.settings.body_limit_bytes
    )


def _listed(tool: tools.Tool) -> types.Tool:
    reads = tool.scope != "memories:write"
    return types.Tool(
        name=tool.name,
        description=tool.description,
        input_schema=schema_of(tool.takes),
        output_schema=schema_of(tool.gives),
        annotations=types.ToolAnnotations(
            read_only_hint=reads,
            destructive_hint=tool.name in ("memory_update", "memory_delete"),
            idempotent_hint=reads or tool.name == "memory_delete",
            open_world_hint=False,
        ),
    )


def _failed(e: Exception, exchange: Exchange) -> types.CallToolResult:
    problem = problem_of(e)
    exchange.outcome = problem.status
    exchange.shed = problem.reason in ("shed", "spool full")
    exchange.maintenance = problem is MAINTENANCE
    if problem.status >= 500 and problem is not MAINTENANCE and not isinstance(e, Refusal):
        log_failure(e, problem, exchange.request_id, exchange.tenant_id)
    text = problem.body(exchange.request_id).decode()
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=True)


class _OurLog(logging.Handler):
    """The SDK's lines in the shape of ours; not its arguments, which may hold what a client sent."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        write = log.error if record.levelno >= logging.ERROR else log.warning
        write("sdk", logger=record.name, message=str(record.msg)[:300], error=error)


def _log_as_we_do() -> None:
    sdk = logging.getLogger("mcp")
    if not any(isinstance(handler, _OurLog) for handler in sdk.handlers):
        sdk.addHandler(_OurLog(logging.WARNING))
    sdk.propagate = False
