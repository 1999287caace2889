"""The service level report as tables of text, the same for a terminal and for Prefect. A dash: nothing to say it of."""

from __future__ import annotations

from collections.abc import Sequence

from shared.receipt import Receipt
from shared.slo import PERIOD_SECONDS, Budget
from shared.slo_report import AGE_BUCKETS, PARTS, PERIOD, WINDOWS, Books, Measured, Quantiles, Report

NONE = "—"


class Table(Receipt, frozen=True):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(report: Report) -> list[Table]:
    """Those of what was read; the first one is the budgets."""
    found = _of_measured(report.measured) if report.measured else []
    return found + (_of_books(report.books) if report.books else [])


def _of_measured(measured: Measured) -> list[Table]:
    refused = measured.maintenance_refused
    return [
        Table(
            f"Error budgets, {duration(measured.coverage * PERIOD_SECONDS)} of 30 days measured",
            ("objective", "good", "state", "left", "spent in", "bad", *(f"burn {w}" for w in WINDOWS),
             "spent in, at burn 6h", "at burn 1h"),
            [_budget(budget) for budget in measured.budgets],
        ),
        Table(
            "Requests",
            ("in the period", "refused for maintenance, in no budget"),
            [(_count(measured.requests), _count(refused))],
        ),
        Table(
            "Routes, the worst of the last 24 hours first",
            ("route", "requests", "server errors", "slower than 250 ms", "p95 in ms"),
            [
                (r.route, _count(r.requests), _share(r.error_share), _share(r.slow_share),
                 NONE if r.p95_seconds is None else f"{1000 * r.p95_seconds:,.1f}")
                for r in measured.routes
            ],
        ),
    ]  # fmt: skip


def _budget(budget: Budget) -> tuple[str, ...]:
    return (
        budget.objective.name,
        f"{100 * budget.objective.good_share:g}%",
        budget.state,
        _share(budget.left),
        duration(budget.forecasts_seconds["1d"]),
        _share(budget.bad_share),
        *(NONE if (rate := budget.burns[w]) is None else f"{rate:,.2f}" for w in WINDOWS),
        *(duration(budget.forecasts_seconds[w]) for w in ("6h", "1h")),
    )


def _of_books(books: Books) -> list[Table]:
    recovery = books.recovery
    ages = recovery.age_seconds
    return [
        Table(
            f"Tenants with most use, of {books.tenants} with any",
            ("tenant", "API calls", "of all", "searches", "memories created", "storage in bytes"),
            [
                (t.tenant_id, _count(t.api_calls), _share(t.share), _count(t.search_queries),
                 _count(t.memories_created), _count(t.storage_bytes))
                for t in books.top
            ],
        ),
        Table(
            "RPO: age of the last good backup of the tenants",
            ("tenants", "without any", "too old", "median", "p95", "oldest", *AGE_BUCKETS),
            [
                (_count(recovery.tenants), _count(recovery.never), _count(recovery.stale),
                 *((duration(ages.median), duration(ages.p95), duration(ages.longest)) if ages else (NONE,) * 3),
                 *map(_count, recovery.age_buckets))
            ],
        ),
        Table(
            f"Restore tests and restores of the last {PERIOD}",
            ("passed", "failed", "inconclusive", "pass rate", "last one", "restores by how they ended"),
            [
                (*(_count(recovery.drills[o]) for o in ("passed", "failed", "inconclusive")),
                 _share(recovery.drill_pass_rate),
                 f"{recovery.last_drill_at:%Y-%m-%d %H:%M UTC}" if recovery.last_drill_at else NONE,
                 ", ".join(f"{n} {state}" for state, n in recovery.restores.items()) or NONE)
            ],
        ),
        Table(
            "RTO in ms, of the restore tests that passed",
            ("part", "median", "p95", "longest"),
            [(part, *_ms(recovery.rto_ms.get(part))) for part in PARTS],
        ),
    ]  # fmt: skip


def duration(seconds: float | None) -> str:
    """Two units at most: `3 d 4 h`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 2880:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes // 60 % 24} h"


def _share(share: float | None) -> str:
    if share is None:
        return NONE
    percent = 100 * share
    return f"{percent:.1f}%" if abs(percent) >= 1 or percent == 0 else f"{percent:.3f}%"


def _count(number: float | None) -> str:
    return NONE if number is None else f"{number:,.0f}"


def _ms(found: Quantiles | None) -> tuple[str, str, str]:
    if found is None:
        return NONE, NONE, NONE
    return f"{found.median:,.1f}", f"{found.p95:,.1f}", f"{found.longest:,.1f}"
