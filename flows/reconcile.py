"""reconcile: compare → report. Do gateway, spool, events and rollups agree? A run that finds a difference is Failed.

A spool and what a gateway counted are on one machine's disk: the run starts another on each of the other machines'
queues, which compares these alone, and fails when one of them does.
"""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from pydantic import Field

from flows import artifact, machine, policy
from flows.core import configuration, control_plane
from flows.missed import superseded
from shared import reconcile as core
from shared.errors import Permanent
from shared.receipt import Receipt
from shared.reconcile import Books

_LISTED = 200
_NONE = Books([], None, {}, {}, 0, [])


class Other(Receipt, frozen=True):
    """Another machine's run; `cause` is None when its books agree."""

    machine_id: str
    url: str
    cause: str | None


@task(name="compare", **policy.READ)
def compare(first: date, last: date, this_machine_alone: bool) -> Books:
    return core.reconcile(control_plane(), configuration(), first, last, this_machine_alone=this_machine_alone)


@task(name="report", **policy.READ)
def report(books: Books, others: list[Other]) -> dict[str, Any]:
    gateway = books.gateway
    where = [*books.where(), *(other.cause for other in others if other.cause)]
    facts: dict[str, Any] = {
        "machine": configuration().machine_id,
        "agree": not where,
        "segments that cannot be drained": books.stuck,
        "events examined by dry runs, not billed": sum(books.examined.values()),
    }
    if gateway is not None:
        facts |= {
            "events counted by the gateway": gateway.counted,
            "of these in drained segments": gateway.drained,
            "of these still in the spool": gateway.spooled,
            "of these kept by dry runs": gateway.examined,
            "events lost by a full spool": gateway.lost,
            "days of which this is at least": ", ".join(map(str, gateway.at_least)),
            "gateway and segments agree": gateway.agree,
        }
    artifact.report(
        "reconcile",
        "Reconcile",
        "; ".join(where) or "The books agree",
        facts,
        artifact.table(("machine", "run", "result"), [(o.machine_id, o.url, o.cause or "ok") for o in others]),
        artifact.table(
            ("day", "tenants", "events", "inserted by drains", "waiting in the spool", "tenants differing", "agree"),
            (
                (d.day, d.tenants, d.events, d.audited, d.waiting, d.tenants_differing, d.agree)
                for d in sorted(books.days, key=lambda d: d.day, reverse=True)
            ),
        ),
        artifact.table(
            ("day", "tenant", "events say", "hours say", "day says"),
            [
                (d.day, one.tenant_id, *(" / ".join(map(str, c)) for c in (one.events, one.hourly, one.daily)))
                for d in books.days
                for one in d.differences
            ][:_LISTED],
        ),
        artifact.table(
            ("day", "tenant", "counted by this machine's gateway", "in its segments"),
            [(d.day, d.tenant_id, d.counted, d.held) for d in (gateway.differences if gateway else [])][:_LISTED],
        ),
        artifact.table(
            ("tenant", "day", "events waiting in the spool"),
            [(tenant, day, n) for (tenant, day), n in sorted(books.waiting.items())][:_LISTED],
        ),
        artifact.table(
            ("tenant", "events set aside, not billed", "because"),
            [(one.tenant_id, one.events, one.reason) for one in books.set_aside][:_LISTED],
        ),
    )
    get_run_logger().info("%d days compared; agree: %s", len(books.days), not where)
    return {"days": len(books.days), "events": sum(d.events for d in books.days), "where": where}


@flow(name="reconcile", flow_run_name="reconcile", **policy.FLOW)
def reconcile(
    days: Annotated[int, Field(ge=1, le=400)] = 3,
    machine_id: Annotated[str, Field(max_length=100)] | None = None,
) -> dict[str, Any] | State[Any]:
    """Compare what the gateway counted, the spool holds, and events and rollups say, per tenant and day.

    It changes nothing. `engram reconcile --repair` makes rollups anew, with a reason.

    Args:
        days: How many days back, today included.
        machine_id: Only the gateway and the spool of this machine. None is every machine, and PostgreSQL.
    """
    if (missed := superseded()) is not None:
        return missed
    today, mine = datetime.now(UTC).date(), configuration().machine_id
    started = {
        m: machine.start("reconcile", m, {"days": days, "machine_id": m})
        for m in ([machine_id] if machine_id else machine.every())
        if m != mine
    }
    books, first = _NONE, today - timedelta(days=days - 1)
    if machine_id in (None, mine):
        books = compare(first, today, this_machine_alone=machine_id is not None)
    found = report(books, [Other(m, other.url, machine.wait(other)) for m, other in started.items()])
    if found["where"]:
        raise Permanent("; ".join(found["where"]))
    return found
