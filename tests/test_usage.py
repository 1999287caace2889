"""The table of what a request counts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.usage import CALL, NOTHING, SEARCH, Counters, UsageEvent, count

TABLE = [
    ("/v1/memories", 201, 1, (1, 0, 1)),
    ("/v1/mcp", 200, 7, (1, 0, 7)),
    ("/v1/memories", 200, 0, (1, 0, 0)),
    ("/v1/search", 200, 0, (1, 1, 0)),
    ("/v1/search", 400, 0, (1, 0, 0)),
    ("/v1/memories", 400, 1, (1, 0, 0)),
    ("/v1/memories/{id}", 404, 0, (1, 0, 0)),
    ("/v1/memories", 402, 0, (1, 0, 0)),
    ("/v1/memories", 413, 0, (1, 0, 0)),
    ("/v1/search", 429, 0, (0, 0, 0)),
    ("/v1/search", 500, 0, (0, 0, 0)),
    ("/v1/memories", 503, 1, (0, 0, 0)),
    ("/v1/memories", 507, 1, (0, 0, 0)),
]


@pytest.mark.parametrize(("route", "status", "created", "counted"), TABLE)
def test_a_request_counts_as_the_table_says(
    route: str, status: int, created: int, counted: tuple[int, int, int]
) -> None:
    """The bill is this table and nothing else."""
    assert count(route, status, created) == counted


@given(st.sampled_from(["/v1/search", "/v1/memories", "/v1/mcp"]), st.integers(100, 599), st.integers(0, 1000))
def test_our_own_failures_are_never_billed_and_a_failed_request_creates_nothing(
    route: str, status: int, created: int
) -> None:
    """Whatever the route: 429 and 5xx cost nothing, other failures one call and no memory."""
    counted = count(route, status, created)
    if status >= 500 or status == 429:
        assert counted == NOTHING
    elif status >= 400:
        assert counted == CALL
    else:
        assert counted.api_calls == 1


def test_the_three_constants_are_what_their_names_say() -> None:
    """Read as words elsewhere, so they must not drift."""
    assert (Counters(0, 0, 0), Counters(1, 0, 0), Counters(1, 1, 0)) == (NOTHING, CALL, SEARCH)


def test_an_event_keeps_its_field_order_on_the_wire() -> None:
    """Segments written before a deploy are read after it: the order is the format."""
    made = UsageEvent(b"i" * 16, "acme", "/r", 200, 1, 2, 3, 4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made)) == [b"i" * 16, "acme", "/r", 200, 1, 2, 3, 4]
