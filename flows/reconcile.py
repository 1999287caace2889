"""reconcile: compare → report. Do gateway, spool, events and rollups agree? A run that finds a difference is Failed."""

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from pydantic import Field

from flows import artifact, policy
from flows.core import configuration, control_plane
from flows.missed import superseded
from shared import reconcile as core
from shared.errors import Permanent
from shared.reconcile import Books

_LISTED = 200


@task(name="compare", **policy.READ)
def compare(first: date, last: date) -> Books:
    return core.reconcile(control_plane(), configuration(), first, last)


@task(name="report", **policy.READ)
def report(books: Books) -> dict[str, Any]:
    gateway = books.gateway
    facts: dict[str, Any] = {"agree": books.agree, "segments that cannot be drained": books.stuck}
    if gateway is not None:
        facts |= {
            "events counted by the gateway since its start": gateway.counted_after,
            "of these in drained segments": gateway.drained,
            "of these still in the spool": gateway.spooled,
            "gateway and segments agree": gateway.agree,
        }
    artifact.report(
        "reconcile",
        "Reconcile",
        "The books agree" if books.agree else "; ".join(books.where()),
        facts,
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
            ("tenant", "day", "events waiting in the spool"),
            [(tenant, day, n) for (tenant, day), n in sorted(books.waiting.items())][:_LISTED],
        ),
        artifact.table(
            ("tenant", "events set aside, not billed", "because"),
            [(one.tenant_id, one.events, one.reason) for one in books.set_aside][:_LISTED],
        ),
    )
    get_run_logger().info("%d days compared; agree: %s", len(books.days), books.agree)
    return {"days": len(books.days), "events": sum(d.events for d in books.days), "where": books.where()}


@flow(name="reconcile", flow_run_name="reconcile", **policy.FLOW)
def reconcile(days: Annotated[int, Field(ge=1, le=400)] = 3) -> dict[str, Any] | State[Any]:
    """Compare what the gateway counted, the spool holds, and events and rollups say, per tenant and day.

    It changes nothing. `engram reconcile --repair` makes rollups anew, with a reason.

    Args:
        days: How many days back, today included.
    """
    if (missed := superseded()) is not None:
        return missed
    today = datetime.now(UTC).date()
    found = report(compare(today - timedelta(days=days - 1), today))
    if found["where"]:
        raise Permanent("; ".join(found["where"]))
    return found
