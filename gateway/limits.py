"""What a request under /v1 costs: which rate it draws on, when it is shed, which counters it adds to."""

from __future__ import annotations

from typing import Literal, NamedTuple

from shared.limits import RouteClass

RateClass = Literal["read", "write", "search", ""]
Counter = Literal["api_calls", "search_queries", "memories_created", "storage_bytes"]


class Cost(NamedTuple):
    """`rate` is empty for what is neither; `counters` are those whose quota can refuse it."""

    rate: RateClass
    route_class: RouteClass
    counters: tuple[Counter, ...]


_LIST = Cost("read", "list", ("api_calls",))
COST_OF_ROUTE: dict[tuple[str, str], Cost] = {
    ("POST", "/v1/search"): Cost("search", "search", ("api_calls", "search_queries")),
    ("GET", "/v1/memories"): _LIST,
    ("POST", "/v1/memories"): Cost("write", "write", ("api_calls", "memories_created", "storage_bytes")),
    ("GET", "/v1/memories/{memory_id}"): Cost("read", "get", ("api_calls",)),
    ("PATCH", "/v1/memories/{memory_id}"): Cost("write", "write", ("api_calls", "storage_bytes")),
    ("DELETE", "/v1/memories/{memory_id}"): Cost("write", "write", ("api_calls",)),  # the way out of a full quota
    ("GET", "/v1/usage"): Cost("read", "list", ()),  # who is refused may still ask why
    ("POST", "/v1/mcp"): Cost("", "get", ("api_calls",)),  # until it is known which tool, and so which class, it is
}


def cost_of(method: str, path_template: str) -> Cost:
    return COST_OF_ROUTE.get((method, path_template), _LIST)
