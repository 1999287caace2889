"""Whole numbers written with a fraction, wherever an integer is taken."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway import admin, schemas, whole
from gateway.mcp.arguments import ListMemories
from tests.gateway_stack import assert_problem, stack  # noqa: F401

LIMIT = b'{"reason": "r", "tenant_id": "acme", "arguments": {"rps": 20, "burst": %b}}'
TAKEN = [
    (schemas.Search, b'{"query": "x", "limit": %b}', lambda data: data.limit),
    (ListMemories, b'{"limit": %b}', lambda data: data.limit),
    (admin.BODIES["set-rate-limit"], LIMIT, lambda data: data.arguments.burst),
]


@pytest.mark.parametrize(("wanted", "body", "found"), TAKEN, ids=lambda each: getattr(each, "__name__", None))
def test_a_whole_number_is_an_integer_however_it_is_written(wanted: Any, body: bytes, found: Any) -> None:
    """Also in the structs of a struct; the published schema says `integer`, which it is."""
    decoder = msgspec.json.Decoder(wanted)
    for text, number in ((b"5", 5), (b"5.0", 5), (b"1e1", 10)):
        data = whole.decode(decoder, body % text)
        assert found(data) == number and type(found(data)) is int
        assert whole.convert(msgspec.json.decode(body % text), wanted) == data
    for text in (b"5.5", b'"5"', b"true", b"-1.0", b"1e300", b'"5.0"'):
        with pytest.raises(msgspec.ValidationError, match="int"):
            whole.decode(decoder, body % text)
        with pytest.raises(msgspec.ValidationError, match="int"):
            whole.convert(msgspec.json.decode(body % text), wanted)


def test_what_else_is_in_the_body_stays_as_it_was_sent() -> None:
    """`metadata` is the tenant's own, and another mistake is named as ever."""

    class Both(msgspec.Struct):
        metadata: dict[str, Any]
        share: float
        count: int | None = None

    decoder = msgspec.json.Decoder(Both)
    data = whole.decode(decoder, b'{"metadata": {"a": 5.0, "b": [1.0]}, "share": 1.0, "count": 2.0}')
    assert str(data.metadata) == "{'a': 5.0, 'b': [1.0]}" and str(data.share) == "1.0" and str(data.count) == "2"
    with pytest.raises(msgspec.ValidationError, match="metadata"):
        whole.decode(decoder, b'{"metadata": 5.0, "share": 1.0, "count": 2.0}')
    with pytest.raises(msgspec.ValidationError, match="object"):
        whole.decode(decoder, b"5.0")


def test_a_search_takes_what_its_schema_describes(stack: Any) -> None:  # noqa: F811
    """A client that has but one kind of number (JavaScript, Lua) may write any as 5.0; a list always took it."""
    with stack.client(stack.tenant()) as api:
        assert api.get("/v1/memories", params={"limit": "5.0"}).status_code == 200
        for query in ("", "?x=1"):  # both ways to the handler
            for limit, status in ((5.0, 200), (100.0, 200), (5.5, 400), ("5", 400), (True, 400), (101.0, 400)):
                found = api.post(f"/v1/search{query}", json={"query": "x", "limit": limit})
                assert found.status_code == status, found.text
                if status == 400:
                    assert "$.limit" in assert_problem(found, 400)["detail"]
        schema = api.get("/schema/openapi.json").json()["components"]["schemas"]["Search"]
        assert schema["properties"]["limit"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}
