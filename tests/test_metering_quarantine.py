"""What the drain sets aside: events nobody can be billed for, and bytes that are no events."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from shared import billable, correction, spool
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.usage import UsageEvent
from tests.core_fixtures import event
from tests.metering_fixtures import check_counted, drain, query, segment

pytest_plugins = ("tests.metering_fixtures",)


NOW = datetime.now(UTC)
BAD: dict[str, Callable[[str], UsageEvent]] = {
    "older than the retention": lambda t: event(t, at=NOW - timedelta(days=500)),
    "from the future": lambda t: event(t, at=datetime.now(UTC) + timedelta(minutes=10)),
    "time and request id disagree": lambda t: event(t, ts_us=0),
    "a time beyond any calendar": lambda t: event(t, ts_us=2**63 - 1),
    "a random request id": lambda t: event(t, request_id=bytes(16)),
    "a short request id": lambda t: event(t, request_id=b"short"),
    "an empty request id": lambda t: event(t, request_id=b""),
    "a long request id": lambda t: event(t, request_id=event().request_id * 2),
    "an impossible tenant": lambda t: event(f"{t}/../x"),
    "a NUL in the tenant": lambda t: event(f"{t}\0"),
    "a NUL in the route": lambda t: event(t, route="/v1/\0"),
    "a status no column holds": lambda t: event(t, status=40_000),
    "a count no column holds": lambda t: event(t, memories_created=2**31),
    "a negative count": lambda t: event(t, api_calls=-1),
}


@pytest.mark.parametrize("name", BAD)
def test_an_event_that_cannot_be_billed_is_set_aside_with_its_cause_and_blocks_nobody(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str, name: str
) -> None:
    """One malformed event must not stop every tenant's metering, and is never thrown away."""
    good, bad = event(tenant_id), BAD[name](tenant_id)
    path = segment(settings, [bad, good])
    [drained] = drain(core_control_plane, settings)
    assert (drained.inserted, drained.quarantined) == (1, 1)
    check_counted(core_control_plane, tenant_id, [good])
    [(reason, kept)] = query(
        core_control_plane, "SELECT reason, event FROM usage_quarantine WHERE segment = %s", path.stem
    )
    assert reason
    assert isinstance(kept, dict)
    assert (kept["request_id"], kept["ts_us"]) == (bad.request_id.hex(), bad.ts_us)


@pytest.mark.parametrize("together", [False, True])
def test_what_is_refused_raises_the_alert_and_counts_once_when_its_cause_is_gone(
    core_control_plane: ControlPlane,
    settings: Settings,
    tenant_id: str,
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker whose clock is ahead: nobody was billed for an hour, which somebody must hear of and can put right."""
    early = [event(tenant_id, at=datetime.now(UTC) + timedelta(minutes=10)) for _ in range(3)]
    good = [event(tenant_id) for _ in range(4)]
    path = segment(settings, [*early, *good[:2]])
    if together:  # in one transaction with its neighbour
        segment(settings, good[2:])
    drain(core_control_plane, settings)
    check_counted(core_control_plane, tenant_id, good if together else good[:2])
    seen = spool.survey(settings.spool_dir)
    assert (seen.quarantined, seen.oldest_age_seconds) == (1, 0.0)
    kept = settings.spool_dir / "quarantine" / f"{path.stem}.refused"
    words = {"reason": "the clock was wrong", "requested_by": "me", "apply": True}
    correction.bring_in(core_control_plane, settings, kept, **words)  # type: ignore[arg-type]
    assert [d.quarantined for d in drain(core_control_plane, settings)] == [3], "it still is the future"
    monkeypatch.setattr(billable, "_AHEAD", timedelta(hours=1))
    for inserted in (3, 0):
        correction.bring_in(core_control_plane, settings, kept, **words)  # type: ignore[arg-type]
        assert [d.inserted for d in drain(core_control_plane, settings)] == [inserted]
    check_counted(core_control_plane, tenant_id, early + (good if together else good[:2]))


def test_malformed_request_ids_do_not_hide_one_another(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """Ids cut to the same bytes are still different events."""
    bad = [event(tenant_id, request_id=b"", memories_created=n) for n in range(3)]
    bad += [event(tenant_id, request_id=b"\1" * n) for n in (1, 2, 17, 18)]
    path = segment(settings, bad)
    [drained] = drain(core_control_plane, settings)
    assert drained.quarantined == 7
    assert query(core_control_plane, "SELECT count(*) FROM usage_quarantine WHERE segment = %s", path.stem) == [(7,)]


def test_damaged_bytes_go_to_quarantine_and_the_rest_is_billed(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """A bad sector costs the events on it, not the file."""
    events = [event(tenant_id) for _ in range(5)]
    path = segment(settings, events)
    raw = bytearray(path.read_bytes())
    raw[len(spool.MAGIC) + 2 * len(spool.frame(events[0])) + 20] ^= 1
    path.write_bytes(raw)
    [drained] = drain(core_control_plane, settings)
    assert (drained.inserted, drained.corrupt_bytes) == (4, len(spool.frame(events[2])))
    assert not path.exists()
    assert (settings.spool_dir / "quarantine" / f"{path.stem}.bad").exists()
    check_counted(core_control_plane, tenant_id, events[:2] + events[3:])


def test_a_segment_of_nothing_but_garbage_does_not_stop_the_next(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """Order is by name; the first file must not hold up the others."""
    for name, data in (("0-1-a", b""), ("0-1-b", os.urandom(5000)), ("0-1-c", spool.MAGIC)):
        settings.spool_dir.mkdir(exist_ok=True)
        (settings.spool_dir / f"{name}-{tenant_id}.seg").write_bytes(data)
    good = event(tenant_id)
    segment(settings, [good])
    assert [d.events for d in drain(core_control_plane, settings)] == [0, 0, 0, 1]
    check_counted(core_control_plane, tenant_id, [good])
