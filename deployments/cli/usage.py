"""`engram usage`, `engram reconcile` and `engram usage-import`: what was used, whether the books agree, corrections."""

from __future__ import annotations

import getpass
import time
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from deployments.cli.restore import parse_time

if TYPE_CHECKING:
    from shared.control_plane import ControlPlane
    from shared.reconcile import Books

_DRAIN_SECONDS = 30.0


class By(StrEnum):
    HOUR = "hour"
    DAY = "day"


def register(app: typer.Typer) -> None:
    app.command()(usage)
    app.command()(reconcile)
    app.command("usage-import")(usage_import)
    app.command("usage-dry-runs")(usage_dry_runs)


def usage(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    start: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Default: this month's start.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Default: now.")] = None,
    by: Annotated[By, typer.Option("--by", help="Buckets, in UTC.")] = By.HOUR,
    as_json: Json = False,
) -> None:
    """What a tenant used, from the hourly rollups, and until when that is complete."""
    from shared import registry, usage_report

    now = datetime.now(UTC)
    first = parse_time(start) or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last = parse_time(end) or now + timedelta(hours=1)
    if first >= last:
        raise typer.BadParameter("--from must be before --to")
    with beside.control_plane() as (settings, control_plane):
        registry.get(control_plane, tenant_id)
        found = usage_report.read(control_plane, settings, tenant_id, first, last, by.value)
    if as_json:
        buckets = [
            {"bucket": b.bucket, **b.counters._asdict(), "storage_bytes": b.storage_bytes} for b in found.buckets
        ]
        window = {"tenant_id": tenant_id, "from": first, "to": last}
        window |= {"granularity": by.value, "complete_until": found.complete_until}
        print_json({**window, **found.totals._asdict(), "buckets": buckets})
        return
    form = "%F %H:00" if by is By.HOUR else "%F"
    print_table(
        (f"{by.value} (UTC)", *found.totals._fields, "storage_bytes"),
        [
            *(
                (f"{b.bucket:{form}}", *b.counters, "—" if b.storage_bytes is None else b.storage_bytes)
                for b in found.buckets
            ),
            ("total", *found.totals, ""),
        ],
    )
    if found.complete_until is None:
        note("complete until: unknown, no drain has reported yet")
    else:
        note(f"complete until {found.complete_until:%F %H:%M:%S} UTC")


def reconcile(
    start: Annotated[
        str | None, typer.Option("--from", metavar="DAY", help="Default: the day before yesterday.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="DAY", help="Included. Default: today.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Show what making the rollups of these days anew would change.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="With --repair: do it.")] = False,
    reason: Annotated[str, typer.Option(help="With --repair: kept with the correction.")] = "",
    as_json: Json = False,
) -> None:
    """Do gateway, spool, events and rollups agree per tenant and day? Exit code 1 and where, if not.

    Gateway and spool are this machine's; the deployment `reconcile` asks every machine.
    Changes nothing by itself. --repair makes the rollups of the named days what their events say.
    """
    from shared import correction, log
    from shared import reconcile as core
    from shared.errors import Permanent

    today = datetime.now(UTC).date()
    first, last = _day(start) or today - timedelta(days=2), _day(end) or today
    if first > last:
        raise typer.BadParameter("--from must not be after --to")
    if apply and not repair:
        raise typer.BadParameter("--apply belongs to --repair")
    if repair and (start is None or end is None or not reason):
        raise typer.BadParameter("--repair wants --from, --to and --reason")
    with beside.control_plane() as (settings, control_plane):
        log.configure(settings.log_level)  # to stderr: stdout is the result's
        books = core.reconcile(control_plane, settings, first, last)
        repaired = []
        if repair:
            wrong = [day.day for day in books.days if day.tenants_differing]
            words = {"reason": reason, "requested_by": _person()}
            repaired = [correction.repair(control_plane, day, apply=apply, **words) for day in wrong]
            if apply:
                books = core.reconcile(control_plane, settings, first, last)
    if as_json:
        print_json(_plain(books) | ({"repaired": [_plain(r) for r in repaired]} if repair else {}))
    else:
        _print(books)
        for r in repaired:
            what = (
                f"correction {r.correction_id}" if r.applied else f"{r.before.tenants_differing} tenants would change"
            )
            note(f"{r.day}: {what}")
    if not books.agree:
        raise Permanent("; ".join(books.where()))


def usage_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines, or a segment of a spool.")],
    reason: Annotated[str, typer.Option(help="Kept with the correction.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read it and say what it holds.")] = False,
    as_json: Json = False,
) -> None:
    """Bring usage events from a file into the books, through the drain: each event once, with a record of why."""
    from shared import correction, log

    if not reason.strip():
        raise typer.BadParameter("--reason must say something")
    with beside.control_plane() as (settings, control_plane):
        log.configure(settings.log_level)  # to stderr: stdout is the result's
        words = {"reason": reason, "requested_by": _person()}
        found = correction.bring_in(control_plane, settings, file, apply=not dry_run, **words)
        drained = _wait_for(control_plane, found.segments)
    result = _plain(found) | {"drained": drained}
    if as_json:
        print_json(result)
        return
    print_table(("", ""), [(k, v) for k, v in result.items() if k not in ("segments", "drained")])
    if dry_run:
        note("nothing was imported")
    elif drained is None:
        note("waits in the spool: no drain has taken it yet")
    else:
        print_table(tuple(drained), [tuple(drained.values())])


def usage_dry_runs(
    bill: Annotated[
        bool, typer.Option("--bill", help="Give them back to the drain: each event is billed once.")
    ] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Remove them, billed by nobody.")] = False,
    reason: Annotated[str, typer.Option(help="With --discard: kept with the record.")] = "",
    as_json: Json = False,
) -> None:
    """How many segments ENGRAM_USAGE_DRY_RUN examined and kept on this machine; --bill or --discard them."""
    from deployments.running import running_settings
    from shared import dry_run, log
    from shared.errors import Refused

    if bill and discard:
        raise typer.BadParameter("--bill or --discard, one of the two")
    if discard and not reason.strip():
        raise typer.BadParameter("--discard wants --reason")
    settings = running_settings()
    if bill and settings.usage_dry_run:
        raise Refused("ENGRAM_USAGE_DRY_RUN is on: the drain would examine them once more")
    given_back = dry_run.bill(settings) if bill else 0
    discarded = 0
    if discard:
        with beside.control_plane() as (settings, control_plane):
            log.configure(settings.log_level)  # to stderr: stdout is the result's
            discarded = dry_run.discard(control_plane, settings, reason=reason, requested_by=_person()).segments
    kept = len(dry_run.segments(settings))
    if as_json:
        print_json({"kept": kept, "given_back": given_back, "discarded": discarded})
        return
    done = f"{given_back} segments given back to the drain, " if bill else f"{discarded} discarded, " if discard else ""
    note(f"{done}{kept} segments kept")


def _wait_for(control_plane: ControlPlane, segments: list[str]) -> dict[str, int] | None:
    """What the drain made of these segments; None when it did not take all of them in time."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while segments:
        rows = control_plane.rows("usage_segments_named", segments=segments)
        if len(rows) == len(segments):
            return {name: sum(row[name] for row in rows) for name in ("inserted", "duplicates", "quarantined")}
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.3)
    return None


def _print(books: Books) -> None:
    print_table(
        ("day (UTC)", "tenants", "events", "inserted by drains", "waiting", "tenants differing", "agree"),
        [
            (
                d.day,
                d.tenants,
                d.events,
                "—" if d.audited is None else d.audited,
                d.waiting,
                d.tenants_differing,
                d.agree,
            )
            for d in books.days
        ],
    )
    if differences := [(d.day, one) for d in books.days for one in d.differences]:
        print_table(
            ("day (UTC)", "tenant", "events say", "hours say", "day says"),
            [
                (day, x.tenant_id, *(" / ".join(map(str, c)) for c in (x.events, x.hourly, x.daily)))
                for day, x in differences
            ],
        )
    if books.gateway is not None:
        g = books.gateway
        note(
            f"this machine's gateway: {g.counted} events counted, {g.drained} drained, {g.spooled} in the spool,"
            f" {g.examined} kept by dry runs, {g.lost} lost"
        )
        if g.differences:
            print_table(
                ("day (UTC)", "tenant", "counted by the gateway", "in its segments"),
                [(x.day, x.tenant_id, x.counted, x.held) for x in g.differences],
            )
    if examined := sum(books.examined.values()):
        note(f"{examined} events examined by dry runs and billed by nobody: engram usage-dry-runs")
    for one in books.set_aside:
        note(f"set aside, not billed: {one.events} events of {one.tenant_id}: {one.reason}")
    if books.stuck:
        note(f"{books.stuck} segments cannot be drained: see the log of the drain")


def _plain(receipt: object) -> dict[str, object]:
    from msgspec import structs, to_builtins

    from shared.reconcile import Books

    if isinstance(receipt, Books):
        waiting, examined = (
            [{"tenant_id": t, "day": d, "events": n} for (t, d), n in sorted(found.items())]
            for found in (receipt.waiting, receipt.examined)
        )
        days = [_plain(day) | {"agree": day.agree} for day in receipt.days]
        gateway = None if receipt.gateway is None else _plain(receipt.gateway) | {"agree": receipt.gateway.agree}
        return {
            "agree": receipt.agree,
            "where": receipt.where(),
            "days": days,
            "gateway": gateway,
            "waiting": waiting,
            "examined": examined,
            "stuck": receipt.stuck,
            "set_aside": [_plain(one) for one in receipt.set_aside],
        }
    plain: dict[str, object] = to_builtins(structs.asdict(receipt))  # type: ignore[arg-type]
    return plain


def _day(text: str | None) -> date | None:
    time_ = parse_time(text)
    return time_.astimezone(UTC).date() if time_ is not None else None


def _person() -> str:
    return f"cli {getpass.getuser()}"
