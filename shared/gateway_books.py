"""What this machine's gateway counted, against what the segments of its workers hold, by tenant and day.

    counted     each worker's tally (`shared.tally`), those of dead and earlier workers too
    lost        what a full spool dropped instead, by explicit setting, and said; no difference
    drained     what the drained segments of these workers held (`usage_held`), whatever became of the events: new,
                there already, set aside, or discarded by a person after a dry run
    spooled     what their segments hold that are still on disk
    examined    of these, in `spool/dry-run/`: kept until a person decides

counted = drained + spooled, for each tenant and day. Tallies are read before and after, so a gateway may serve
meanwhile; a worker that lives or was killed may have one event more than it counted, of one that died with the machine
the tally is at least. Events that only a worker's memory holds, because the disk refuses them, are missing here until
it takes them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import date, timedelta

from shared import day_books, tally
from shared.control_plane import ControlPlane, rows
from shared.day_books import DIFFERENCES
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tally import Page
from shared.usage_audit import Held

Sums = Counter[tuple[str, date]]  # events by tenant and day


class GatewayDifference(Receipt, frozen=True):
    """`held` in segments, drained or on disk."""

    tenant_id: str
    day: date
    counted: int
    held: int


class GatewayBooks(Receipt, frozen=True):
    """`workers`: lives of workers. `at_least`: days of which a tally is uncertain. `differences`: the first of them."""

    workers: int
    counted: int
    lost: int
    drained: int
    spooled: int
    examined: int
    at_least: list[date]
    differing: int
    differences: list[GatewayDifference]

    @property
    def agree(self) -> bool:
        return self.differing == 0

    def where(self) -> list[str]:
        """Each day that disagrees in a line."""
        days: dict[date, list[GatewayDifference]] = defaultdict(list)
        for one in self.differences:
            days[one.day].append(one)
        return [
            f"{day}: the gateway counted {sum(d.counted for d in found)} events of"
            f" {_tenants([d.tenant_id for d in found])}, its segments hold {sum(d.held for d in found)}"
            for day, found in sorted(days.items())
        ]


def of_machine(
    control_plane: ControlPlane,
    settings: Settings,
    days: tuple[date, date],
    before: list[Page],
    on_disk: Mapping[str, Held],
    examined: set[str],
) -> GatewayBooks | None:
    """Compare these days, as far as tallies are kept of them; None when no gateway ever counted anything here.

    `before` was read before `on_disk`, which is every segment on this machine; `examined` are those of dry runs.
    """
    if not before:
        return None
    first, last = max(days[0], tally.first_day(settings)), days[1]
    compared = [first + timedelta(days=n) for n in range((last - first).days + 1)]
    lives = _Lives(before)
    spooled, kept = Sums(), Sums()
    for name, held in on_disk.items():
        if lives.have(name):
            found = {(t, date.fromisoformat(day)): n for day, tenants in held.items() for t, n in tenants.items()}
            (kept if name in examined else spooled).update({k: n for k, n in found.items() if k[1] in compared})
    drained = _drained(control_plane, settings, compared, lives, sorted(on_disk))
    after = tally.read(settings)
    low, _ = tally.total([page for page in before if page.day in compared])
    high, lost = tally.total([page for page in after if page.day in compared])
    spare = Counter(page.day for page in after if not page.ended)
    at_least = {page.day for page in after if page.uncertain and page.day in compared}
    differences = []
    for key in sorted({*low, *drained, *spooled, *kept}, key=lambda k: (k[1], k[0])):
        tenant_id, day = key
        held_of = drained[key] + spooled[key] + kept[key]
        if held_of < low[key] or (held_of > high[key] + spare[day] and day not in at_least):
            differences.append(GatewayDifference(tenant_id, day, high[key], held_of))
    return GatewayBooks(
        workers=len(lives),
        counted=high.total(),
        lost=lost.total(),
        drained=drained.total(),
        spooled=spooled.total(),
        examined=kept.total(),
        at_least=sorted(at_least),
        differing=len(differences),
        differences=differences[:DIFFERENCES],
    )


class _Lives:
    """Which segments were written by workers whose tallies are known: those of a pid, from its first start on (every
    worker has a tally, so a later one with that pid has one, too)."""

    def __init__(self, pages: list[Page]) -> None:
        self._count = len({(page.pid, page.started_us) for page in pages})
        self.since: dict[str, str] = {}
        for page in sorted(pages, key=lambda page: page.started_us):
            self.since.setdefault(str(page.pid), f"{page.started_us:016d}")

    def __len__(self) -> int:
        return self._count

    def have(self, segment: str) -> bool:
        created, _, rest = segment.partition("-")
        since = self.since.get(rest.partition("-")[0])
        return since is not None and since <= created


def _drained(
    control_plane: ControlPlane, settings: Settings, days: list[date], lives: _Lives, beside: list[str]
) -> Sums:
    if not days:
        return Sums()
    with control_plane.transaction(maintenance=True) as connection:
        found = rows(
            connection,
            "usage_held_of_lives",
            pid=list(lives.since),
            since=list(lives.since.values()),
            **{"machine_id": settings.machine_id, "beside": beside, "days": [str(day) for day in days]},
            **{"from": day_books.midnight(days[0]) - day_books.AUDIT_MARGIN},
        )
    return Sums({(row["tenant_id"], row["day"]): row["events"] for row in found})


def _tenants(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tenants" if len(names) > 3 else "")
