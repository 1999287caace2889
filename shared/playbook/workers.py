"""Restarts, smallest first: one tenant's handles in every worker, then the workers, one after the other."""

from __future__ import annotations

import os
import time
from typing import Any

from shared import workers
from shared.errors import Transient
from shared.playbook import limit
from shared.playbook.action import Context, Outcome, Request
from shared.workers import Report

CLOSED_SECONDS = 10.0
REPLACED_SECONDS = 45.0  # a worker; its start is some seconds on a busy machine
_POLL_SECONDS = 0.1


class NotRestarted(Transient):
    """The gateway does not run here, or did not do it in time."""


def restart_tenant(context: Context, request: Request, _: Any) -> Outcome:
    """Every worker closes the tenant's database once its users are done; the next request opens it anew."""
    settings = context.settings
    assert request.tenant_id is not None  # `perform` refuses a request without one
    name = f"restart_tenant:{request.tenant_id}"
    closed: dict[int, bool] = {}
    if not request.dry_run:
        asked = limit.once(context, request, name)

        def is_closed(report: Report) -> bool:
            return asked.id in report.done

        patience_seconds = CLOSED_SECONDS + settings.limits_poll_seconds
        closed = dict(workers.wait_until_said(settings, is_closed, patience_seconds))
    said = f"closed in {sum(closed.values())} of {len(closed)} workers" if closed else "no worker was asked"
    return Outcome(
        action=request.action,
        kind="reversible",
        target=request.tenant_id,
        summary=said,
        dry_run=request.dry_run,
        verified=all(closed.values()) if closed else None,
        workers=closed,
    )


def restart_workers(context: Context, request: Request, _: Any) -> Outcome:
    """The supervisor starts a new worker, waits until it serves, lets the old one finish what it has, and goes on. A
    new one that does not come to serve is the end of it: the supervisor says so at once.

    Raises `NotRestarted` when no gateway runs here. In a worker (the admin API) that worker goes last, and answers
    while it is on its way out.
    """
    settings = context.settings
    before = _started(workers.reports(settings))
    if not before:
        raise NotRestarted("no gateway runs on this machine")
    after = before if request.dry_run else {}
    replaced, cause = request.dry_run, None
    if not request.dry_run:
        patience_seconds = REPLACED_SECONDS * (len(before) + 1)
        asked = limit.once(context, request, "restart_workers", os.getpid(), ttl_seconds=patience_seconds)
        deadline = time.monotonic() + REPLACED_SECONDS * len(before)
        while not replaced and cause is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            cause = workers.not_replaced(settings, asked.id)  # before: who came until then is seen
            after = {pid: at for pid, at in _started(workers.reports(settings)).items() if pid not in before}
            replaced = len(after) >= len(before)
    said = f"{len(before)} workers"
    living: dict[int, bool] = {}
    if not request.dry_run:
        said = f"{len(after)} of {said} replaced{f': {cause}' if cause else ''}"
        kept = () if replaced else sorted(workers.announced(settings).keys() & before.keys())
        living = dict.fromkeys(after, True) | dict.fromkeys(kept, False)
    return Outcome(
        action=request.action,
        kind="reversible",
        target="workers",
        summary=said,
        before=sorted(before),
        after=sorted(after),
        dry_run=request.dry_run,
        verified=None if request.dry_run else replaced,
        workers=living,
    )


def _started(reports: dict[int, Report | None]) -> dict[int, float]:
    return {pid: report.started_at for pid, report in reports.items() if report is not None}
