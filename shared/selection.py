"""Which tenants a run of restore tests takes, and which of their backups. Pure: no clock, no database.

A run of n drills takes, in this order:

    turn     at least half: least recently drilled first, never drilled before all. An inconclusive drill does not use
             up a tenant's turn, until the third in a row: one whose key is lost must not hold up the others for ever
    risk     a quarter: the last drill failed or said nothing, a restore or another schema version since the last
             drill, no tenant of its machine ever drilled, among the largest tenth
    random   a quarter: what no rule thinks of

Below four drills all are by turn. With a share s of the tenants a run, every one is drilled within 2/s runs.

Of a tenant's backups the newest is taken half of the time, and always when the tenant was never drilled: it is what a
restore takes. Else one of the others by chance, one never drilled before those that were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from random import Random
from uuid import UUID

from shared.receipt import Receipt

_TRIES = 3
_NEVER = datetime.min.replace(tzinfo=UTC)


class Candidate(Receipt, frozen=True):
    """A tenant that can be drilled. `drilled_at`: its last drill that passed or failed; `inconclusive`: how many
    said nothing since, the last of them at `tried_at`."""

    tenant_id: str
    machine_id: str
    created_at: datetime
    size_bytes: int
    schema_version: int
    drilled_at: datetime | None = None
    drilled_schema_version: int | None = None
    failed: bool = False
    inconclusive: int = 0
    tried_at: datetime | None = None
    restored_at: datetime | None = None


class Choice(Receipt, frozen=True):
    """A tenant to drill, and why this one."""

    tenant_id: str
    reason: str
    never_drilled: bool


class Point(Receipt, frozen=True):
    """A recovery point: one of a tenant's backups."""

    backup_id: UUID
    ts: datetime
    drilled: bool


def count_of(tenants: int, share: float, least: int) -> int:
    """How many drills a run makes: the share, at least `least`, at most all."""
    return min(tenants, max(least, math.ceil(tenants * share)))


def choose(candidates: Sequence[Candidate], count: int, random: Random) -> list[Choice]:
    """At most `count` tenants, none twice."""
    count = min(count, len(candidates))
    quarter = count // 4
    waiting = sorted(candidates, key=_turn)
    chosen = [(c, "never drilled" if c.drilled_at is None else "least recently drilled") for c in waiting[:count]]
    if quarter:
        chosen, waiting = chosen[: count - 2 * quarter], waiting[count - 2 * quarter :]
        risks = _risks(candidates)
        risky = sorted((c for c in waiting if risks[c.tenant_id]), key=lambda c: -len(risks[c.tenant_id]))[:quarter]
        chosen += [(c, "risk: " + ", ".join(risks[c.tenant_id])) for c in risky]
        taken = {c.tenant_id for c in risky}
        rest = [c for c in waiting if c.tenant_id not in taken]
        chosen += [(c, "at random") for c in random.sample(rest, count - len(chosen))]
    return [Choice(c.tenant_id, why, c.drilled_at is None) for c, why in chosen]


def choose_point(points: Sequence[Point], random: Random, *, never_drilled: bool) -> Point:
    """One of a tenant's backups; `points` is not empty."""
    newest, *others = sorted(points, key=lambda p: p.ts, reverse=True)
    if never_drilled or not others or random.random() < 0.5:
        return newest
    return random.choice([p for p in others if not p.drilled] or others)


def _turn(c: Candidate) -> tuple[datetime, datetime, str]:
    last = c.tried_at if c.inconclusive >= _TRIES else c.drilled_at
    return last or _NEVER, c.created_at, c.tenant_id


def _risks(candidates: Sequence[Candidate]) -> dict[str, list[str]]:
    """What speaks for each tenant, in words; the more, the sooner."""
    drilled_machines = {c.machine_id for c in candidates if c.drilled_at is not None}
    sizes = sorted(c.size_bytes for c in candidates)
    large = sizes[len(sizes) * 9 // 10]
    return {
        c.tenant_id: [
            why
            for why, holds in (
                ("the last drill failed", c.failed),
                ("the last drill was inconclusive", c.inconclusive > 0),
                ("restored since its last drill", _after(c.restored_at, c.drilled_at)),
                ("another schema version", c.drilled_schema_version not in (None, c.schema_version)),
                (f"machine {c.machine_id} was never drilled", c.machine_id not in drilled_machines),
                ("large", c.size_bytes >= large and c.size_bytes > sizes[len(sizes) // 2]),
            )
            if holds
        ]
        for c in candidates
    }


def _after(at: datetime | None, since: datetime | None) -> bool:
    return at is not None and (since is None or at > since)
