"""Usage events as rows and sums: the binary rows say what the events say, the sums add up however they are spread."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shared import control_plane as module
from shared.control_plane import ControlPlane
from shared.usage import UsageEvent
from shared.usage_batch import Batch, columns
from tests.core_fixtures import event

pytest_plugins = ("tests.core_fixtures",)

NOW = datetime.now(UTC)
EVENTS = st.lists(
    st.builds(
        lambda tenant, route, status, hours, counts, micros: event(
            tenant,
            at=NOW - timedelta(hours=hours, microseconds=micros),
            route=route,
            status=status,
            api_calls=counts[0],
            search_queries=counts[1],
            memories_created=counts[2],
        ),
        st.sampled_from(["acme", "b", "z-1"]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
        st.integers(0, 999),
        st.integers(0, 40),
        st.tuples(*[st.integers(0, 1_000_000)] * 3),
        st.integers(0, 999_999),
    ),
    max_size=30,
)


@hypothesis_settings(max_examples=25)
@given(EVENTS)
def test_copied_rows_are_the_events_to_the_microsecond(
    core_control_plane: ControlPlane, events: list[UsageEvent]
) -> None:
    """The rows are encoded by hand here; PostgreSQL says what it read."""
    with core_control_plane.transaction() as connection:
        connection.execute("CREATE TEMPORARY TABLE usage_events (LIKE usage_events) ON COMMIT DROP")  # shadows it
        module.copy(connection, "usage_copy", Batch.of(events).copy_rows())
        found = connection.execute(
            "SELECT request_id, tenant_id, route, status, api_calls, search_queries, memories_created,"
            " (extract(epoch FROM ts) * 1000000)::bigint AS ts_us, storage_bytes FROM usage_events"
        ).fetchall()
    assert all(row.pop("storage_bytes") is None for row in found)
    assert {UsageEvent(row.pop("request_id").bytes, **row) for row in found} == set(events)
    assert len(found) == len(events)


@given(EVENTS, st.randoms())
def test_sums_are_those_of_each_event_in_its_own_hour(events: list[UsageEvent], chance: object) -> None:
    """The short way of one hour, the long way of several, events in any order and repeated."""
    piled = [*events, *events[::2]]
    chance.shuffle(piled)  # type: ignore[attr-defined]
    expected: Counter[tuple[str, datetime, str]] = Counter()
    for e in events:
        minted = datetime.fromtimestamp(int.from_bytes(e.request_id[:6], "big") / 1000, UTC)
        for name in ("api_calls", "search_queries", "memories_created"):
            expected[e.tenant_id, minted.replace(minute=0, second=0, microsecond=0), name] += getattr(e, name)
    batch = Batch.of(piled)
    given_ = columns(batch.sums())
    assert [e.request_id for e in batch.events] == sorted(e.request_id for e in events)
    assert list(zip(given_["tenant_id"], given_["bucket"], strict=True)) == sorted(batch.sums())
    for name in ("api_calls", "search_queries", "memories_created"):
        for tenant_id, bucket, amount in zip(given_["tenant_id"], given_["bucket"], given_[name], strict=True):
            assert expected.pop((tenant_id, bucket, name)) == amount  # type: ignore[arg-type]
    assert not expected


@given(EVENTS, st.lists(st.integers(0, 30), max_size=4), st.booleans())
def test_batches_that_are_joined_are_the_batch_of_all_events(
    events: list[UsageEvent], cuts: list[int], in_time: bool
) -> None:
    """Neighbours in time are only strung together, others are sorted anew: nobody can tell."""
    if in_time:
        events = Batch.of(events).events
    bounds = [0, *sorted(cuts), len(events)]
    parts = [Batch.of(events[a:b]) for a, b in pairwise(bounds)]
    assert Batch.joined(reversed(parts)) == Batch.of(events)


def test_of_two_events_with_one_id_the_last_stays() -> None:
    """It is what the client was told in the end: of a request whose first event could not be made durable, the 503."""
    first = event("acme", memories_created=1)
    second = UsageEvent(first.request_id, "other", "/r", 200, 1, 0, 9, first.ts_us)
    between = event("acme")
    assert Batch.of([between, first, second]).events == sorted([between, second], key=lambda e: e.request_id)
