"""The OpenAPI document: what Litestar derives from the routes, completed with what only we know.

- Bodies are described by msgspec, which also judges them: Litestar's own description of the same structs loses the
  bounds of list items, of optional fields, and that unknown fields are refused.
- Every answer of ours carries `X-Request-Id`; a 401 names its scheme, a 429 and a 503 say when to come back, and what
  was measured against a rate or a quota says how much of it is left.
- Heads are judged before a route is found, so every route may answer 400, 414 and 431; and so may, with nothing else in
  it, the server below (`gateway.edge`).
- A 402 is where a counter can refuse (`gateway.limits`).

`POST /v1/mcp` is left out: its requests and answers are the protocol's, and its tools describe themselves
(`tools/list`, in JSON Schema, from the same structs).
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Router
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from gateway import admin, health, schemas
from gateway.limits import COST_OF_ROUTE
from gateway.problems import MEDIA_TYPE

_STRUCTS = (
    schemas.CreateMemory,
    schemas.UpdateMemory,
    schemas.Search,
    schemas.MemoryView,
    schemas.MemoryPage,
    schemas.SearchResults,
    schemas.UsageView,
    schemas.ProblemView,
    health.Status,
    *admin.STRUCTS,
)
_TIME = {"type": "string", "format": "date-time"}
_PARAMETERS = {"from": _TIME, "to": _TIME, "memory_id": {"type": "string", "format": "uuid"}}
_OF_EVERY_HEAD = {
    "400": "The request is not valid.",
    "414": "The URL is too long.",
    "431": "The header fields are too large or too many.",
    "500": "The request failed.",
}
_OF_THE_SERVER = frozenset({"400", "414", "431"})
_REQUEST_ID = {
    "description": "Made by the gateway for this request; also in its log line and in a problem document.",
    "required": True,
    "schema": {"type": "string", "format": "uuid"},
}
_REQUEST_ID_IF_OURS = _REQUEST_ID | {
    "description": "As on every answer; missing, as is the body, when what came was not HTTP or far beyond the limits.",
    "required": False,
}
_RETRY_AFTER = {
    "description": "Seconds until the same request may succeed.",
    "required": True,
    "schema": {"type": "integer", "minimum": 1},
}
_CHALLENGE = {"description": "The scheme.", "required": True, "schema": {"type": "string", "const": "Bearer"}}
_CODINGS = {
    "description": "When the body was refused for its `Content-Encoding`.",
    "schema": {"type": "string", "const": "identity"},
}
# Of the bucket with the least room; with every answer to a request that was measured against one.
_RATE = {
    "RateLimit-Limit": {
        "description": "Requests that may come at once, where a rate limit is in force.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "RateLimit-Remaining": {
        "description": "How many of them may still come now.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "RateLimit-Reset": {
        "description": "Seconds until all of them may come again.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "RateLimit-Policy": {
        "description": "The rate behind the limit: how many requests become free, and in how many seconds (`w`).",
        "schema": {"type": "string", "pattern": "^[0-9]+;w=[0-9]+$"},
    },
}
_RATE_OF_A_REFUSAL = {name: header | {"required": True} for name, header in _RATE.items()}
_QUOTA_WARNING = {
    "description": "The counters of the plan that have reached their soft limit: `counter; current=…; limit=…`, …",
    "schema": {"type": "string"},
}
_BEFORE_THE_RATE = frozenset({"401", "411", "414", "421", "431", "502"})
_BEFORE_THE_QUOTA = _BEFORE_THE_RATE | {"402", "429"}


class Document(JsonRenderPlugin):
    """Renders the completed document, once."""

    def __init__(self) -> None:
        super().__init__()
        self._rendered: bytes | None = None

    def receive_router(self, router: Router) -> None:
        """Litestar's own handler for unknown paths beside the document answers HTML: without it they are 404 as all."""
        router.routes = [route for route in router.routes if not route.path_parameters]

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if self._rendered is None:
            self._rendered = self.render_json(request, completed(openapi_schema))
        return self._rendered


def config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Engram",
        version="1",
        description=(
            "Memories of one tenant: the one the bearer token names. A request may repeat it in"
            " `X-Engram-Tenant`; one that names another is refused with 403. HEAD is answered as GET, without the"
            " content. `POST /v1/mcp` is the Model Context Protocol and describes itself. What is not HTTP, or"
            " whose head is far beyond the limits, is refused by the server below the gateway: 400, 414 or 431,"
            " without a body and without `X-Request-Id`, and it is not counted."
        ),
        path="/schema",
        render_plugins=[Document()],
        use_handler_docstrings=True,
        components=Components(
            security_schemes={"bearer": SecurityScheme(type="http", scheme="bearer", bearer_format="JWT")}
        ),
    )


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """A new document; the one given is not changed."""
    whole: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    components["UpdateMemory"]["minProperties"] = 1
    whole["components"]["schemas"] = components
    for path, operations in whole["paths"].items():
        for method, operation in operations.items():
            _complete(operation["responses"], method.upper(), path)
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _PARAMETERS.get(parameter["name"], parameter["schema"])
    _link(whole["paths"])
    return whole


def _complete(responses: dict[str, Any], method: str, path: str) -> None:
    cost = COST_OF_ROUTE.get((method, path))
    counters = cost.counters if cost is not None else ()
    if counters:
        named = ", ".join(f"`{counter}`" for counter in counters)
        responses["402"] = _problem(f"A hard quota of the plan is used up ({named}): `metric`, `current`, `limit`.")
    for status, description in _OF_EVERY_HEAD.items():
        responses.setdefault(status, _problem(description))
    for status, response in responses.items():
        headers = response.setdefault("headers", {})
        headers["X-Request-Id"] = _REQUEST_ID_IF_OURS if status in _OF_THE_SERVER else _REQUEST_ID
        if status == "401":
            headers["WWW-Authenticate"] = _CHALLENGE
        elif status == "415":
            headers["Accept-Encoding"] = _CODINGS
        elif status in ("429", "503"):
            headers["Retry-After"] = _RETRY_AFTER
        if path.startswith("/v1/") and status not in _BEFORE_THE_RATE:
            headers.update(_RATE_OF_A_REFUSAL if status == "429" else _RATE)
        if counters and status not in _BEFORE_THE_QUOTA:
            headers["X-Engram-Quota-Warning"] = _QUOTA_WARNING


def _link(paths: dict[str, Any]) -> None:
    """What a new memory's `id` is good for."""
    one = paths["/v1/memories/{memory_id}"]
    paths["/v1/memories"]["post"]["responses"]["201"]["links"] = {
        operation["operationId"]: {
            "operationId": operation["operationId"],
            "parameters": {"memory_id": "$response.body#/id"},
        }
        for operation in one.values()
    }


def _problem(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ProblemView"}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}
