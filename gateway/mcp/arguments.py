"""What the tools take and give beyond what REST does (`gateway.schemas`), and the JSON schema of either."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.schemas import CreateMemory, MemoryView, Tag, UpdateMemory

BATCH = 100
MemoryId = Annotated[str, Meta(min_length=1, max_length=64, description="the `id` of a memory")]


class MemoryById(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    id: MemoryId


class CreateMemories(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    memories: Annotated[list[CreateMemory], Meta(min_length=1, max_length=BATCH)]


class UpdateMemoryById(UpdateMemory, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """At least one field beside the id; a field that is absent stays as it is."""

    id: MemoryId


class ListMemories(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=64, description="`next_cursor` of the page before")] | None = None
    tag: Tag | None = None


class NoArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


class Created(msgspec.Struct):
    memories: list[MemoryView]
    count: int


class Deleted(msgspec.Struct):
    id: str
    deleted: bool


class Stats(msgspec.Struct):
    """`by_type` counts the memories of each `memory_type`; `storage_bytes` is what `/v1/usage` says."""

    memories: int
    by_type: dict[str, int]
    schema_version: int
    storage_bytes: int


def schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema of an object, as MCP wants it: `type: object` at the top, what it refers to under `$defs`."""
    (top,), components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    schema = dict(components.pop(top["$ref"].rpartition("/")[2]))
    return {**schema, "$defs": components} if components else schema
