"""Which tenants and which of their backups a run of restore tests takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.selection import Candidate, Choice, Point, choose, choose_point, count_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def candidate(n: int, **more: object) -> Candidate:
    values = {"machine_id": "m1", "created_at": ago(1000 - n), "size_bytes": 1, "schema_version": 1}
    return Candidate(f"t{n:04d}", **(values | more))  # type: ignore[arg-type]


def drilled(n: int, days: float, **more: object) -> Candidate:
    return candidate(n, **({"drilled_at": ago(days), "drilled_schema_version": 1} | more))


def reasons(chosen: list[Choice]) -> dict[str, str]:
    return {c.tenant_id: c.reason for c in chosen}


candidates = st.lists(
    st.builds(
        lambda days, tries, failed, size: (days, tries, failed, size),
        st.none() | st.integers(0, 900),
        st.integers(0, 5),
        st.booleans(),
        st.integers(1, 10**9),
    ),
    min_size=1,
    max_size=60,
).map(
    lambda rows: [
        candidate(
            n,
            drilled_at=ago(d) if d is not None else None,
            drilled_schema_version=1 if d is not None else None,
            failed=f and d is not None,
            inconclusive=t,
            tried_at=ago(0) if t else None,
            size_bytes=s,
        )
        for n, (d, t, f, s) in enumerate(rows)
    ]
)


@given(candidates, st.integers(1, 80), st.integers())
@settings(max_examples=150)
def test_so_many_as_asked_none_twice_and_half_of_them_by_turn(found: list[Candidate], count: int, seed: int) -> None:
    """Whatever chance and risk do, the turn of every tenant comes."""
    chosen = choose(found, count, Random(seed))
    assert len({c.tenant_id for c in chosen}) == len(chosen) == min(count, len(found))
    by_turn = -(-len(chosen) // 2)
    expected = choose(found, min(by_turn, 3), Random(0))  # up to three all are by turn
    assert [c.tenant_id for c in chosen[: len(expected)]] == [c.tenant_id for c in expected]


def test_every_tenant_is_drilled_within_two_over_the_share_runs() -> None:
    """The bound that the oldest passed drill's alert is set by, with risks that never go away."""
    found = {c.tenant_id: c for c in (candidate(n, size_bytes=n + 1) for n in range(100))}
    risky = {f"t{n:04d}" for n in range(60, 90)}
    random = Random(7)
    for week in range(20):
        for choice in choose(list(found.values()), count_of(100, 0.1, 4), random):
            n = int(choice.tenant_id[1:])
            found[choice.tenant_id] = drilled(n, -week, size_bytes=n + 1, failed=choice.tenant_id in risky)
    assert all(c.drilled_at is not None for c in found.values())


def test_the_third_inconclusive_drill_in_a_row_uses_up_the_turn() -> None:
    """A tenant whose key is lost must not take the place of the others for ever."""
    stuck = candidate(1, inconclusive=2, tried_at=ago(0.1))
    assert choose([stuck, drilled(2, 300)], 1, Random(0))[0].tenant_id == "t0001"
    stuck = candidate(1, inconclusive=3, tried_at=ago(0.1))
    assert choose([stuck, drilled(2, 300)], 1, Random(0))[0].tenant_id == "t0002"


def test_a_quarter_goes_to_those_at_risk_and_says_why() -> None:
    """The more speaks for a tenant, the sooner; the operator reads what it was."""
    found = [drilled(n, 500 - n) for n in range(40)]
    found[30] = drilled(30, 100, restored_at=ago(1))
    found[31] = drilled(31, 100, failed=True, schema_version=2)
    found[32] = drilled(32, 100, size_bytes=999)
    found[33] = drilled(33, 100, restored_at=ago(101))
    found[34] = candidate(34, drilled_at=ago(100), inconclusive=1, tried_at=ago(1))
    said = reasons(choose(found, 20, Random(3)))
    assert said["t0031"] == "risk: the last drill failed, another schema version"
    assert said["t0030"] == "risk: restored since its last drill"
    assert said["t0032"] == "risk: large"
    assert said["t0034"].startswith("risk: the last drill was inconclusive")
    assert not said.get("t0033", "").startswith("risk")
    assert list(said.values()).count("least recently drilled") == 10


def test_a_machine_that_was_never_drilled_is_a_risk() -> None:
    """Its key, its store or its clock may be wrong for all of its tenants."""
    found = [drilled(n, 10) for n in range(8)] + [candidate(90 + n, machine_id="m2") for n in range(8)]
    said = reasons(choose(found, 12, Random(1)))
    assert "risk: machine m2 was never drilled" in said.values()


def test_the_share_of_a_run_has_a_least_and_an_end() -> None:
    """Few tenants are all drilled every week; thousands by their share."""
    assert [count_of(n, 0.1, 4) for n in (1, 4, 30, 41, 5000)] == [1, 4, 4, 5, 500]


def test_any_recovery_point_is_taken_and_the_newest_half_of_the_time() -> None:
    """Old points are restored from too; one never drilled goes first. The first drill of a tenant takes the newest."""
    points = [Point(UUID(int=n), ago(10 - n), drilled=n == 1) for n in range(5)]
    random = Random(5)
    taken = [choose_point(points, random, never_drilled=False).backup_id.int for _ in range(400)]
    assert set(taken) == {0, 2, 3, 4}
    assert 150 < taken.count(4) < 250
    assert {choose_point(points, random, never_drilled=True).backup_id.int for _ in range(20)} == {4}
    assert choose_point([points[1]], random, never_drilled=False) == points[1]
