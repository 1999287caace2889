"""What requests may say and what answers look like; msgspec checks the constraints while it decodes.

Bounds are here and nowhere else. A NUL is refused in every text column: SQLite keeps it but cuts at it in some
functions. Lone surrogates and invalid UTF-8 never get this far: the JSON decoder refuses them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

METADATA_BYTES = 65_536
METADATA_DEPTH = 32

_NO_NUL = {"pattern": r"^[^\u0000]*$"}  # described here, judged by `_no_nul`: msgspec's own patterns cost a regex each
Content = Annotated[
    str,
    Meta(min_length=1, max_length=100_000, description="the memory itself; searchable", extra_json_schema=_NO_NUL),
]
MemoryType = Annotated[str, Meta(min_length=1, max_length=64, extra_json_schema=_NO_NUL)]
Tag = Annotated[str, Meta(min_length=1, max_length=128, extra_json_schema=_NO_NUL)]
Tags = Annotated[list[Tag], Meta(max_length=64)]
Importance = Annotated[float, Meta(ge=0, le=1)]
Query = Annotated[
    str,
    Meta(min_length=1, max_length=1_000, description="in SQLite FTS5's query syntax", extra_json_schema=_NO_NUL),
]
Limit = Annotated[int, Meta(ge=1, le=100)]
Metadata = Annotated[
    dict[str, Any],
    Meta(description=f"at most {METADATA_BYTES} bytes as JSON, nested at most {METADATA_DEPTH} deep"),
]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Id = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]


class CreateMemory(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    content: Content
    memory_type: MemoryType = "note"
    tags: Tags = msgspec.field(default_factory=list)
    metadata: Metadata = msgspec.field(default_factory=dict)
    importance: Importance = 0.5

    def __post_init__(self) -> None:
        _no_nul(self.content, self.memory_type, *self.tags)
        _bounded(self.metadata)


class UpdateMemory(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """At least one field; a field that is absent stays as it is."""

    content: Content | UnsetType = UNSET
    memory_type: MemoryType | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    metadata: Metadata | UnsetType = UNSET
    importance: Importance | UnsetType = UNSET

    def __post_init__(self) -> None:
        if all(getattr(self, name) is UNSET for name in UpdateMemory.__struct_fields__):
            raise ValueError("nothing to change")
        _no_nul(*(text for text in (self.content, self.memory_type) if isinstance(text, str)))
        if self.tags is not UNSET:
            _no_nul(*self.tags)
        if self.metadata is not UNSET:
            _bounded(self.metadata)


class Search(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    query: Query
    limit: Limit = 10
    tags: Tags | None = None
    memory_type: MemoryType | None = None

    def __post_init__(self) -> None:
        _no_nul(self.query, self.memory_type or "", *(self.tags or ()))


class MemoryView(msgspec.Struct):
    id: Id
    content: str
    tags: list[str]
    metadata: dict[str, Any]
    memory_type: str
    importance: float
    created_at: Time
    updated_at: Time
    version: int


class MemoryPage(msgspec.Struct):
    """`next_cursor` continues the list, newest first; null at its end. A page is short when its memories are long."""

    memories: list[MemoryView]
    next_cursor: str | None


class SearchHit(msgspec.Struct):
    """A larger score is a better match."""

    memory: MemoryView
    score: float


class SearchResults(msgspec.Struct):
    """The best matches first; fewer than asked for when they are long."""

    results: list[SearchHit]
    count: int


class UsageBucket(msgspec.Struct):
    """An hour or a day (UTC), named by its start; `storage_bytes` is the last measurement in it."""

    bucket: Time
    api_calls: int
    search_queries: int
    memories_created: int
    storage_bytes: int | None


class UsageView(msgspec.Struct, rename={"from_": "from"}):
    """Whole hours that begin in [from, to); `storage_bytes` is what the tenant keeps now: its database's pages in use,
    so what is deleted no longer counts. Null while that cannot be read.

    Every request that began before `complete_until` is counted; later ones may be on their way. `buckets` are those
    with any usage, oldest first; they add up to the totals.
    """

    tenant_id: str
    from_: Time
    to: Time
    api_calls: int
    search_queries: int
    memories_created: int
    storage_bytes: int | None
    granularity: Literal["hour", "day"]
    complete_until: Time | None
    buckets: list[UsageBucket]


class ProblemView(msgspec.Struct):
    """RFC 9457. `reason` is for a program to branch on: it comes with every 402, 409, 411, 421, 429, 502 and 503, and
    with the 403 that asks for HTTPS. `retry_after` comes with a 429 and a 503, `metric`, `current` and `limit` with a
    402, `failing` (which of its checks) with the 503 of `/ready`."""

    type: str
    title: str
    status: int
    detail: str
    request_id: Id
    reason: str | UnsetType = UNSET
    retry_after: int | UnsetType = UNSET
    metric: str | UnsetType = UNSET
    current: int | UnsetType = UNSET
    limit: int | UnsetType = UNSET
    failing: list[Literal["tenants", "spool", "jwks"]] | UnsetType = UNSET


def _no_nul(*texts: str) -> None:
    if any("\x00" in text for text in texts):
        raise ValueError("text must not contain NUL")


def _bounded(metadata: dict[str, Any]) -> None:
    if _depth(metadata) > METADATA_DEPTH:
        raise ValueError(f"metadata is nested deeper than {METADATA_DEPTH}")
    if len(msgspec.json.encode(metadata)) > METADATA_BYTES:
        raise ValueError(f"metadata is larger than {METADATA_BYTES} bytes")


def _depth(value: object, depth: int = 1) -> int:
    """How deep the value is nested; stops counting once it is too deep."""
    if depth > METADATA_DEPTH or not isinstance(value, (dict, list)):
        return depth
    items = value.values() if isinstance(value, dict) else value
    return max((_depth(item, depth + 1) for item in items if isinstance(item, (dict, list))), default=depth)
