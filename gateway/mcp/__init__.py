"""MCP at `POST /v1/mcp`: the tools of the contract, on the same engine and under the same guard as REST.

`route` (Origin, body, the worker's one endpoint) → `server` (the official SDK) → `tools` (what each tool does, with
which `arguments`); the result goes back past the SDK (`filling`).

Stateless streamable HTTP, every answer one JSON document: no session to lose with a worker, and the usage event is
written when the tool is done, before the answer begins (an event stream begins before the tool does). Without a
session there is no server stream either: GET and DELETE are 405.

The SDK is imported in a thread while the worker already serves: it takes a second of CPU (and 17 MB, 23 in use),
which neither the readiness of a worker nor the first MCP request should have to wait for. Where nobody speaks MCP,
`ENGRAM_MCP_AT_START=false` saves both.
"""
