"""act: the incident playbook where operators see it. Perform one action on the right machine, report what became of it.

Everything that matters is `shared.playbook`'s: who may, the book, the verification, the end. `explain-token` is not
offered: a run's parameters can be read by everybody who sees the UI, and a token must not.
"""

from typing import Annotated, Any, Literal

import msgspec
from prefect import flow, task
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows import artifact, machine, policy
from flows.core import configuration, control_plane
from shared.limits import MAX_TTL_SECONDS
from shared.playbook.action import MAX_REASON_CHARS, Outcome, Request, RequestedBy
from shared.playbook.perform import checked
from shared.playbook.perform import perform as carry_out
from shared.tenant import TENANT_ID_PATTERN

Name = Literal[
    "jwks-status",
    "volume-health",
    "check-permissions",
    "top",
    "propose-restore",
    "refresh-jwks",
    "fix-permissions",
    "restart-tenant",
    "restart-workers",
    "set-rate-limit",
    "cap-pool",
    "shed",
    "clear-limit",
]
_OK = {True: "✅", False: "❌", None: "❔"}


def run_name() -> str:
    """Action and, if the run has one, tenant."""
    parameters = flow_run.get_parameters()
    return "-".join(filter(None, ("act", parameters.get("name"), parameters.get("tenant_id"))))


@task(name="perform", **policy.ONCE)
def perform(request: Request) -> Outcome:
    return carry_out(configuration(), control_plane(), request)


@flow(name="act", flow_run_name=run_name, **policy.FLOW)
def act(
    name: Name,
    tenant_id: Annotated[str, Field(pattern=TENANT_ID_PATTERN)] | None = None,
    arguments: dict[str, Any] | None = None,
    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS)] = "",
    dry_run: bool = False,
    ttl_seconds: Annotated[float, Field(gt=0, le=MAX_TTL_SECONDS)] | None = None,
    requested_by: RequestedBy = "person",
) -> Any:
    """Do one thing of the incident playbook. Every action is recorded, verifies its effect, and says how to undo it.

    Args:
        name: What to do. The first five only look.
        tenant_id: The tenant it is about; check-permissions, fix-permissions, restart-tenant and propose-restore need
            one.
        arguments: set-rate-limit {"rps": 5, "burst": 10}, cap-pool {"in_flight": 4}, shed {"classes": ["search"]},
            clear-limit {"limit": "shed"}, top {"seconds": 5}; else none.
        reason: Why. Needed by everything that changes something; kept with it.
        dry_run: Check it and say what would change; change nothing.
        ttl_seconds: After which a rate limit, a cap or shedding is gone by itself; an hour when not given.
        requested_by: A person, or an automation, which may do less.
    """
    request = Request(
        action=name,
        tenant_id=tenant_id,
        arguments=arguments or {},
        reason=reason,
        dry_run=dry_run,
        ttl_seconds=ttl_seconds,
        requested_by=requested_by,
        who=f"flow run {flow_run.get_name() or ''}".strip(),
        door="prefect",
        flow_run_id=artifact.flow_run_id(),
    )
    checked(request)  # nonsense is told before another machine is asked
    if tenant_id is not None and (elsewhere := machine.forwarded(tenant_id)) is not None:
        return elsewhere
    outcome = perform(request)
    report(outcome, request)
    result = msgspec.to_builtins(outcome)
    if outcome.verified is False:
        return Failed(message=f"{name}: done, but its effect is not there: {outcome.summary}", data=result)
    return result


def report(outcome: Outcome, request: Request) -> None:
    """What an operator reads after the run."""
    facts: dict[str, Any] = {"target": outcome.target, "reason": request.reason or None}
    if outcome.kind != "read":
        facts |= {
            "before": _text(outcome.before),
            "after": _text(outcome.after),
            "verified": outcome.verified,
            "ends by itself": outcome.expires_at,
            "undo": " ".join(outcome.undo) or None,
            "dry run": outcome.dry_run,
        }
    if outcome.proposal:
        facts["proposed"] = " ".join(outcome.proposal)
    if not outcome.recorded:
        facts["recorded"] = "in this machine's file; the control plane did not answer"
    tables = []
    if outcome.findings:
        rows = [(_OK[f.ok], f.name, _text(f.seen), f.normal) for f in outcome.findings]
        tables.append(artifact.table(("", "checked", "seen", "normal"), rows))
    for title, found in outcome.tables.items():
        if found:
            cells = artifact.table(found[0], [[_text(v) for v in row.values()] for row in found])
            tables.append(f"## {title}\n\n{cells}")
    artifact.report(
        artifact.key("act", request.action, request.tenant_id or ""), request.action, outcome.summary, facts, *tables
    )


def _text(value: Any) -> Any:
    """What a table can show."""
    return value if value is None or isinstance(value, str | int | float) else msgspec.json.encode(value).decode()
