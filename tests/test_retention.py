"""Which backups are kept: properties that hold for any history, any policy and any clock."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.retention import Decision, Item, Policy, decide, last_good

EXAMPLES = int(os.environ.get("ENGRAM_TEST_EXAMPLES", "60"))
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)

counts = st.integers(0, 4)
policies = st.builds(
    Policy,
    last=st.integers(1, 4),
    hourly=counts,
    daily=counts,
    weekly=counts,
    monthly=counts,
    yearly=counts,
    safety_days=st.integers(0, 40),
    corrupt_days=st.integers(0, 40),
    min_age=st.sampled_from([timedelta(0), HOUR, DAY, 10 * DAY]),
)
# Mostly in the past, close together, on the same instants; sometimes years off or in the future.
instants = st.one_of(
    st.integers(-60, 2).map(lambda n: NOW + n * DAY / 3),
    st.integers(-900, 900).map(lambda n: NOW + n * DAY),
    st.just(NOW),
)
clocks = st.one_of(st.just(NOW), st.integers(-200_000, 200_000).map(lambda n: NOW + n * HOUR))


# (ts, entered at another instant, kind and state). One choice a field is what Hypothesis pays for.
KINDS = ("scheduled", "manual", "safety")
rows = st.tuples(instants, st.one_of(st.none(), instants), st.integers(0, 3 * 8 - 1))


def history(drawn: list[tuple[datetime, datetime | None, int]]) -> list[Item]:
    items = []
    for n, (ts, entered_at, choice) in enumerate(drawn):
        kind, state = KINDS[choice % 3], choice // 3
        items.append(
            Item(
                UUID(int=n + 1),
                ts,
                entered_at or ts,
                kind,
                {4: "corrupt", 5: "deleting", 6: "deleted"}.get(state, "available"),
                None if state == 7 else ts,
                entered_at,
                "a restore" if state == 3 else None,
            )
        )
    return items


histories = st.lists(rows, max_size=14).map(history)


def kept(decision: Decision) -> set[UUID]:
    return {v.backup_id for v in decision.keep}


def deleted(decision: Decision) -> set[UUID]:
    return {v.backup_id for v in decision.delete}


def without(items: list[Item], gone: set[UUID]) -> list[Item]:
    return [i for i in items if i.backup_id not in gone]


@given(histories, policies, clocks)
@settings(max_examples=EXAMPLES)
def test_the_last_good_backup_is_kept_whatever_the_clock_says(items: list[Item], policy: Policy, now: datetime) -> None:
    """And what `engram restore TENANT` would choose is among them."""
    good = [i for i in items if i.status == "available" and i.verified_at is not None]
    decision = decide(items, policy, now)
    assert last_good(items) <= kept(decision)
    assert bool(last_good(items)) == bool(good)
    regular = [i for i in good if i.kind != "safety"]
    if regular:
        newest = max(regular, key=lambda i: i.ts).ts
        assert newest in {i.ts for i in regular if i.backup_id in kept(decision)}
        assert all(i.kind != "safety" for i in items if i.backup_id in last_good(items))


@given(histories, policies, clocks)
@settings(max_examples=EXAMPLES)
def test_every_backup_that_is_not_gone_gets_one_verdict_with_a_reason(
    items: list[Item], policy: Policy, now: datetime
) -> None:
    """A backup in neither list would be forgotten, one in both deleted."""
    decision = decide(items, policy, now)
    there = {i.backup_id for i in items if i.status in ("available", "corrupt")}
    assert kept(decision) | deleted(decision) == there
    assert len(decision.keep) + len(decision.delete) == len(there)
    assert all(v.reason for v in (*decision.keep, *decision.delete))


@given(histories, policies, clocks)
@settings(max_examples=EXAMPLES)
def test_applied_twice_it_deletes_nothing_more(items: list[Item], policy: Policy, now: datetime) -> None:
    """What was kept is kept for the same reasons once the rest is gone."""
    first = decide(items, policy, now)
    second = decide(without(items, deleted(first)), policy, now)
    assert second == Decision(first.keep, ())


@given(histories, policies, clocks, st.data())
@settings(max_examples=EXAMPLES)
def test_deleting_any_of_them_makes_no_kept_one_deletable(
    items: list[Item], policy: Policy, now: datetime, data: st.DataObject
) -> None:
    """A run cut short anywhere leaves what the whole run would have left, and more."""
    decision = decide(items, policy, now)
    some = {v.backup_id for v in decision.delete if data.draw(st.booleans())}
    again = decide(without(items, some), policy, now)
    assert again.keep == decision.keep
    assert deleted(again) == deleted(decision) - some


@given(histories, policies, clocks, st.randoms())
@settings(max_examples=EXAMPLES)
def test_the_order_of_the_rows_does_not_matter(
    items: list[Item], policy: Policy, now: datetime, random: object
) -> None:
    """PostgreSQL promises none."""
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide(shuffled, policy, now) == decide(items, policy, now)


@given(histories, policies)
@settings(max_examples=EXAMPLES)
def test_each_of_the_last_buckets_keeps_its_newest_good_backup(items: list[Item], policy: Policy) -> None:
    """Counted over the buckets that have one: a month without backups uses up no place."""
    regular = [
        i
        for i in items
        if i.status == "available" and i.verified_at and i.kind != "safety" and max(i.ts, i.entered_at) <= NOW
    ]
    keep = kept(decide(items, policy, NOW))
    for count, bucket_of in (
        (policy.hourly, lambda t: t.replace(minute=0)),
        (policy.daily, lambda t: t.date()),
        (policy.weekly, lambda t: t.isocalendar()[:2]),
        (policy.monthly, lambda t: (t.year, t.month)),
        (policy.yearly, lambda t: t.year),
    ):
        for bucket in sorted({bucket_of(i.ts) for i in regular}, reverse=True)[:count]:
            newest = max(i.ts for i in regular if bucket_of(i.ts) == bucket)
            assert [i for i in regular if i.ts == newest and i.backup_id in keep], (bucket, count)


@given(histories, policies, st.integers(0, 5_000), st.integers(0, 500_000))
@settings(max_examples=EXAMPLES)
def test_a_clock_that_jumps_ahead_costs_no_good_backup_its_place(
    items: list[Item], policy: Policy, hours: int, jump: int
) -> None:
    """With every backup in the past of both clocks, only ages differ: safety, corrupt and young ones."""
    early = max([max(i.ts, i.entered_at) for i in items], default=NOW) + hours * HOUR
    late = early + jump * HOUR
    places = {
        i.backup_id for i in items if i.status == "available" and i.kind != "safety" and i.verified_at is not None
    }
    old_enough = decide(items, Policy(**{**_fields(policy), "min_age": timedelta(0)}), early)
    assert places & kept(old_enough) <= kept(decide(items, policy, late))


@given(histories, policies, clocks)
@settings(max_examples=EXAMPLES)
def test_a_corrupt_backup_neither_counts_nor_hides_a_good_one(items: list[Item], policy: Policy, now: datetime) -> None:
    """Taking the corrupt ones out changes nothing for the good ones."""
    good = {i.backup_id for i in items if i.good}
    others = [i for i in items if i.status != "corrupt"]
    assert kept(decide(items, policy, now)) & good == kept(decide(others, policy, now)) & good


@given(histories, policies, clocks)
@settings(max_examples=EXAMPLES)
def test_what_is_held_young_or_unverified_is_kept(items: list[Item], policy: Policy, now: datetime) -> None:
    """A restore that runs must find its backup; a new one must not go before anybody could look."""
    keep = kept(decide(items, policy, now))
    for item in items:
        if item.status in ("available", "corrupt"):
            young = now - max(item.ts, item.entered_at) < policy.min_age
            unverified = item.status == "available" and item.verified_at is None
            assert item.backup_id in keep or not (item.held or young or unverified)


@given(histories, policies, clocks, st.integers(0, 60))
@settings(max_examples=EXAMPLES)
def test_a_deleted_tenants_backups_go_all_at_once_after_their_days(
    items: list[Item], policy: Policy, now: datetime, days: int
) -> None:
    """Until then all of them stay; a held one stays for as long as it is held."""
    decision = decide(items, policy, now, deleted_at=now - days * DAY)
    if days < policy.deleted_tenant_days:
        assert decision.delete == ()
    else:
        assert kept(decision) == {i.backup_id for i in items if i.held and i.status in ("available", "corrupt")}


def _fields(policy: Policy) -> dict[str, object]:
    return {name: getattr(policy, name) for name in policy.__struct_fields__}


def daily(days: int) -> list[Item]:
    """One backup a day at 02:00, the newest `days - 1` days before the last."""
    start = NOW.replace(hour=2) - (days - 1) * DAY
    return [Item(UUID(int=n + 1), start + n * DAY, start + n * DAY, verified_at=NOW) for n in range(days)]


def test_two_years_of_nightly_backups_leave_days_weeks_and_months() -> None:
    """The default plan, worked by hand: 7 days, 5 Sundays, 12 ends of months."""
    items = daily(730)
    keep = kept(decide(items, Policy(), NOW))
    dates = sorted((i.ts.date() for i in items if i.backup_id in keep), reverse=True)
    days = [(NOW - n * DAY).date() for n in range(7)]
    sundays = [datetime(2026, 11, d).date() for d in (22, 15, 8, 1)]  # the fifth week is the one that began today
    months = [datetime(2026, m, d).date() for m, d in ((10, 31), (9, 30), (8, 31), (7, 31), (6, 30), (5, 31))]
    months += [datetime(2026, m, d).date() for m, d in ((4, 30), (3, 31), (2, 28), (1, 31))]
    months += [datetime(2025, 12, 31).date()]
    assert dates == sorted({*days, *sundays, *months}, reverse=True)


def test_run_every_day_for_a_year_it_leaves_what_one_run_would() -> None:
    """Grandfathers are made of sons: a run a day must not lose the month's last backup on the way."""
    items, now = [], NOW
    for n in range(400):
        now = NOW + n * DAY
        ts = now - HOUR
        items.append(Item(UUID(int=n + 1), ts, ts, verified_at=ts))
        items = without(items, deleted(decide(items, Policy(), now)))
    every = [Item(UUID(int=n + 1), NOW + n * DAY - HOUR, NOW + n * DAY - HOUR, verified_at=NOW) for n in range(400)]
    assert {i.backup_id for i in items} == kept(decide(every, Policy(), now))


@pytest.mark.parametrize("clock", [datetime(1970, 1, 1, tzinfo=UTC), NOW, datetime(2999, 1, 1, tzinfo=UTC)])
def test_a_tenant_whose_backups_stopped_long_ago_keeps_its_places(clock: datetime) -> None:
    """Nothing is deleted for being old alone."""
    items = daily(30)
    ages = Policy(min_age=timedelta(0))
    if clock < NOW:
        assert deleted(decide(items, ages, clock)) == set()
    else:
        assert kept(decide(items, ages, clock)) == kept(decide(items, ages, NOW))


def test_only_corrupt_ones_are_all_kept() -> None:
    """What can be salvaged of them is all there is."""
    items = [Item(UUID(int=n), NOW - n * 100 * DAY, NOW - n * 100 * DAY, status="corrupt") for n in range(1, 5)]
    decision = decide(items, Policy(), NOW)
    assert decision.delete == () and "no good one" in decision.keep[0].reason
    one_good = Item(UUID(int=9), NOW - 900 * DAY, NOW - 900 * DAY, verified_at=NOW)
    assert len(decide([*items, one_good], Policy(), NOW).delete) == 4
