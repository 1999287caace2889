"""Which backups of a tenant are kept, and why: grandfather, father, son. Pure: no clock, no store, no database.

For each of hour, day, ISO week, month and year (UTC), the newest good backup of each of the last N that have one is
kept. N counts those that have one, so a tenant whose backups stopped loses nothing by waiting, and a clock that jumps
ahead makes none of them deletable. Beside these:

    last good     the newest good one, by its own time and by when it was entered, whatever all else says. Good:
                  available and verified. A safety backup holds what a restore was meant to replace: it is the last
                  good one only of a tenant that has no other.
    last N        so many of the newest good ones
    safety        kept for some days, since they were taken or entered, and in no other place
    young         nothing younger than `min_age` is deleted
    future        what was taken or entered later than now is kept, and takes no place: one of the clocks is wrong
    held          a restore or a restore test uses it, or somebody said so
    corrupt       takes no place and is no last good one. Kept for some days for whoever looks into it; for ever while
                  the tenant has no good one: what can be salvaged of it is all there is
    unverified    takes no place, and is kept until it was read

A deleted tenant's are all kept for `deleted_tenant_days`, then all go but those held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID

from shared.receipt import Receipt

SAFETY = "safety"
_BUCKETS: tuple[tuple[str, Callable[[datetime], str]], ...] = (
    ("hourly", lambda ts: f"{ts:%Y-%m-%d %H}h"),
    ("daily", lambda ts: f"{ts:%Y-%m-%d}"),
    ("weekly", lambda ts: f"{ts:%G-W%V}"),
    ("monthly", lambda ts: f"{ts:%Y-%m}"),
    ("yearly", lambda ts: f"{ts:%Y}"),
)


class Policy(Receipt, frozen=True):
    """What a plan keeps. Numbers of backups, unless the name says otherwise."""

    last: int = 3
    hourly: int = 0
    daily: int = 7
    weekly: int = 5
    monthly: int = 12
    yearly: int = 0
    safety_days: int = 30
    corrupt_days: int = 30
    deleted_tenant_days: int = 30
    min_age: timedelta = timedelta(days=1)


class Item(Receipt, frozen=True):
    """A backup, as far as keeping it is concerned. `entered_at` is when its row was written, by PostgreSQL's clock;
    `status_at` since when it is corrupt; `held` says what needs it."""

    backup_id: UUID
    ts: datetime
    entered_at: datetime
    kind: str = "scheduled"
    status: str = "available"
    verified_at: datetime | None = None
    status_at: datetime | None = None
    held: str | None = None

    @property
    def good(self) -> bool:
        return self.status == "available" and self.verified_at is not None

    @property
    def by_ts(self) -> tuple[datetime, datetime, UUID]:
        return self.ts, self.entered_at, self.backup_id

    @property
    def by_entry(self) -> tuple[datetime, datetime, UUID]:
        return self.entered_at, self.ts, self.backup_id

    @property
    def newest_date(self) -> datetime:
        """Both clocks have to say that it is old."""
        return max(self.ts, self.entered_at)


class Verdict(Receipt, frozen=True):
    """`reason`: why it is kept, or why it goes."""

    backup_id: UUID
    reason: str


class Decision(Receipt, frozen=True):
    keep: tuple[Verdict, ...]
    delete: tuple[Verdict, ...]


def decide(items: Iterable[Item], policy: Policy, now: datetime, *, deleted_at: datetime | None = None) -> Decision:
    """Keep or delete each available or corrupt backup of one tenant; others are not looked at.

    `deleted_at` is when the tenant was deleted. Both lists are ordered newest first.
    """
    ordered = sorted((i for i in items if i.status in ("available", "corrupt")), key=lambda i: i.by_ts, reverse=True)
    places = _places([i for i in ordered if i.good], policy, now)
    keep, delete = [], []
    for item in ordered:
        if deleted_at is None:
            why = [*_shields(item, policy, now), *places[item.backup_id]]
            if item.status == "corrupt":
                why += _corrupt(item, policy, now, has_good=any(i.good for i in ordered))
        else:
            why = _after_deletion(item, policy, now, deleted_at)
        if why:
            keep.append(Verdict(item.backup_id, ", ".join(why)))
        else:
            delete.append(Verdict(item.backup_id, _why_not(item, policy, deleted_at)))
    return Decision(tuple(keep), tuple(delete))


def last_good(items: Iterable[Item]) -> set[UUID]:
    """The newest good backup by its own time and the newest by its entry: two when a clock was wrong, else one."""
    good = [i for i in items if i.good]
    regular = [i for i in good if i.kind != SAFETY] or good
    if not regular:
        return set()
    return {max(regular, key=lambda i: i.by_ts).backup_id, max(regular, key=lambda i: i.by_entry).backup_id}


def _places(good: list[Item], policy: Policy, now: datetime) -> dict[UUID, list[str]]:
    """What each good backup, newest first, is kept as."""
    places: dict[UUID, list[str]] = defaultdict(list)
    past = [i for i in good if not _future(i, now)]
    for backup_id in last_good(good) | last_good(past):
        places[backup_id].append("last good")
    regular = [i for i in past if i.kind != SAFETY]
    for n, item in enumerate(regular[: policy.last], start=1):
        places[item.backup_id].append(f"last {n}")
    for name, bucket_of in _BUCKETS:
        free, last = getattr(policy, name), ""
        for item in regular if free else ():
            if (bucket := bucket_of(item.ts.astimezone(UTC))) == last:
                continue
            if not free:
                break
            places[item.backup_id].append(f"{name} {bucket}")
            free, last = free - 1, bucket
    for item in good:
        if item.kind == SAFETY and now - item.newest_date < timedelta(days=policy.safety_days):
            places[item.backup_id].append(f"safety for {policy.safety_days} days")
    return places


def _shields(item: Item, policy: Policy, now: datetime) -> list[str]:
    """What keeps a backup whatever it is."""
    why = [f"held: {item.held}"] if item.held else []
    if _future(item, now):
        why.append("from the future of this clock")
    elif now - item.newest_date < policy.min_age:
        why.append("young")
    if item.status == "available" and item.verified_at is None:
        why.append("not verified yet")
    return why


def _corrupt(item: Item, policy: Policy, now: datetime, *, has_good: bool) -> list[str]:
    if not has_good:
        return ["corrupt while the tenant has no good one"]
    since = max(item.newest_date, item.status_at or item.newest_date)
    return [f"corrupt for {policy.corrupt_days} days"] if now - since < timedelta(days=policy.corrupt_days) else []


def _after_deletion(item: Item, policy: Policy, now: datetime, deleted_at: datetime) -> list[str]:
    if item.held:
        return [f"held: {item.held}"]
    kept = now - deleted_at < timedelta(days=policy.deleted_tenant_days)
    return [f"tenant deleted less than {policy.deleted_tenant_days} days ago"] if kept else []


def _why_not(item: Item, policy: Policy, deleted_at: datetime | None) -> str:
    if deleted_at is not None:
        return f"tenant deleted more than {policy.deleted_tenant_days} days ago"
    if item.status == "corrupt":
        return f"corrupt for more than {policy.corrupt_days} days"
    if item.kind == SAFETY:
        return f"safety backup of more than {policy.safety_days} days"
    return "no place in the plan's retention"


def _future(item: Item, now: datetime) -> bool:
    return item.newest_date > now
