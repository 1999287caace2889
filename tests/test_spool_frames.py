"""A segment cut, flipped or overwritten anywhere gives only events that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shared import spool
from shared.usage import UsageEvent
from tests.core_fixtures import event

events = st.builds(
    UsageEvent,
    request_id=st.one_of(st.binary(min_size=16, max_size=16), st.just(b"\xe5\x9e" * 8)),
    tenant_id=st.text(max_size=20),
    route=st.sampled_from(["/v1/search", "/v1/memories"]),
    status=st.integers(0, 999),
    api_calls=st.integers(0, 1),
    search_queries=st.integers(0, 1),
    memories_created=st.integers(0, 500),
    ts_us=st.integers(0, 2**62),
)


def content(tmp: Path, data: bytes) -> spool.SegmentContent:
    path = tmp / "cut.seg"
    path.write_bytes(data)
    return spool.read(path)


@hypothesis_settings(max_examples=150)
@given(st.lists(events, max_size=6), st.data())
def test_a_cut_segment_gives_its_whole_frames_and_keeps_the_rest_as_damage(
    tmp_path_factory: pytest.TempPathFactory, written: list[UsageEvent], data: st.DataObject
) -> None:
    """A crash in mid-write loses at most the event that was not acknowledged."""
    raw = spool.MAGIC + b"".join(map(spool.frame, written))
    cut = data.draw(st.integers(0, len(raw)))
    read = content(tmp_path_factory.getbasetemp(), raw[:cut])
    assert read.events == written[: len(read.events)]
    good = sum(len(spool.frame(e)) for e in read.events)
    header = len(spool.MAGIC) if cut >= len(spool.MAGIC) else 0
    assert read.corrupt_bytes == cut - header - good
    assert b"".join(piece for _, piece in read.damage) == raw[header + good : cut]


@hypothesis_settings(max_examples=300)
@given(st.lists(events, min_size=1, max_size=6), st.data())
def test_one_flipped_bit_costs_at_most_one_event_and_invents_none(
    tmp_path_factory: pytest.TempPathFactory, written: list[UsageEvent], data: st.DataObject
) -> None:
    """A wrong event is a wrong bill; a damaged one must be set apart."""
    raw = bytearray(spool.MAGIC + b"".join(map(spool.frame, written)))
    at = data.draw(st.integers(len(spool.MAGIC), len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    read = content(tmp_path_factory.getbasetemp(), bytes(raw))
    starts = [len(spool.MAGIC)]
    for one in written:
        starts.append(starts[-1] + len(spool.frame(one)))
    hit = next(n for n in range(len(written)) if at < starts[n + 1])
    assert read.events == written[:hit] + written[hit + 1 :]
    assert read.damage == [(starts[hit], bytes(raw[starts[hit] : starts[hit + 1]]))]


@hypothesis_settings(max_examples=200)
@given(st.lists(events, max_size=4), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=30)), max_size=4))
def test_any_overwriting_or_inserting_of_bytes_invents_no_event(
    tmp_path_factory: pytest.TempPathFactory, written: list[UsageEvent], noise: list[tuple[int, bytes]]
) -> None:
    """Whatever happened to the file, every event read is one that was written, and every byte is accounted for."""
    raw = bytearray(spool.MAGIC + b"".join(map(spool.frame, written)))
    for at, piece in noise:
        raw[at % len(raw) : at % len(raw) + (len(piece) if at % 2 else 0)] = piece or b"\0"
    read = content(tmp_path_factory.getbasetemp(), bytes(raw))
    assert all(e in written for e in read.events)
    header = len(spool.MAGIC) if raw.startswith(spool.MAGIC) else 0
    assert header + sum(len(spool.frame(e)) for e in read.events) + read.corrupt_bytes == len(raw)


def test_every_cut_and_every_flipped_bit_of_a_segment_gives_no_wrong_event(tmp_path: Path) -> None:
    """All of them, on a segment of five events: what is read was written, in its order, and what is not is damage."""
    written = [event(tenant, memories_created=n) for n, tenant in enumerate(["a", "acme", "b" * 20, "c" * 63, "d"])]
    raw = spool.MAGIC + b"".join(map(spool.frame, written))
    cuts = [raw[:at] for at in range(len(raw))]
    flips = [raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :] for at in range(len(raw)) for bit in range(8)]
    for n, data in enumerate([*cuts, *flips]):
        read = content(tmp_path, data)
        numbers = [e.memories_created for e in read.events]
        assert numbers == sorted(set(numbers))
        assert read.events == [written[number] for number in numbers]
        if n >= len(cuts):
            assert len(numbers) >= 4
        else:
            assert numbers == list(range(len(numbers)))
    print(f"{len(cuts)} cuts, {len(flips)} flips")
