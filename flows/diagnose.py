"""diagnose: look → propose. All checks of a subject side by side, and the one thing to do about what they saw.

Started by the bridge's events (`deployments.automation`), once an alert, or by hand. It changes nothing and it
completes whatever it finds: a diagnosis that found something has succeeded. The artifact has the proposal, its command,
and the run form that carries it out, filled in; whether it is sent is a person's decision.
"""

import json
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import msgspec
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run
from pydantic import Field

from flows import artifact, machine, policy
from flows.core import configuration, control_plane
from shared import registry
from shared.diagnosis import check as core
from shared.diagnosis.check import Check
from shared.diagnosis.finding import Diagnosis, Finding, Subject
from shared.diagnosis.proposal import Proposal
from shared.diagnosis.sight import Sight
from shared.errors import ControlPlaneUnavailable
from shared.tenant import TENANT_ID_PATTERN

_OK = {True: "yes", False: "**no**", None: "not seen"}


def run_name() -> str:
    """Subject and, if the run has one, tenant."""
    parameters = flow_run.get_parameters()
    return "-".join(filter(None, ("diagnose", parameters.get("subject"), parameters.get("tenant_id"))))


@task(name="look", task_run_name="look-{name}", **policy.ONCE)
def look(name: str, check: Check, sight: Sight) -> list[Finding]:
    """It ends well whatever is wrong: what cannot be seen is a finding."""
    return core.run(check, sight)


@task(name="propose", **policy.ONCE)
def propose(subject: Subject, tenant_id: str | None, findings: list[list[Finding]]) -> Diagnosis:
    return core.conclude(configuration(), subject, tenant_id, [one for some in findings for one in some])


@flow(name="diagnose", flow_run_name=run_name, **policy.FLOW)
def diagnose(
    subject: Subject,
    tenant_id: Annotated[str, Field(pattern=TENANT_ID_PATTERN)] | None = None,
    alert: Annotated[str, Field(max_length=1000)] = "",
    runbook: Annotated[str, Field(max_length=1000)] = "",
) -> dict[str, Any]:
    """Look at everything a subject depends on, on the tenant's machine, and propose one action. Changes nothing.

    Args:
        subject: What seems to be wrong.
        tenant_id: The tenant it is wrong for. None looks at all of this machine.
        alert: The alert that asks, if one does.
        runbook: What that alert's runbook is called.
    """
    if tenant_id is not None and _is_elsewhere(tenant_id) and (done := machine.forwarded(tenant_id)) is not None:
        return done
    with Sight(configuration(), tenant_id) as sight:
        looking = [look.submit(check.name, check, sight) for check in core.CHECKS[subject]]
        found = propose(subject, tenant_id, looking)  # type: ignore[arg-type]  # Prefect hands over their results
    for finding in found.findings:
        if not finding.ok:
            get_run_logger().warning("%s: %s; normal is %s", finding.name, finding.seen, finding.normal)
    url = form_url(found.proposal) if found.proposal else None
    _report(found, url, alert, runbook)
    result: dict[str, Any] = msgspec.to_builtins(found)
    return result | {"healthy": found.healthy, "form_url": url}


def _is_elsewhere(tenant_id: str) -> bool:
    """False when nobody can say: a control plane that does not answer is what this run is to find. Raises
    `UnknownTenant`."""
    try:
        return registry.get(control_plane(), tenant_id).machine_id != configuration().machine_id
    except ControlPlaneUnavailable:
        return False


def form_url(proposal: Proposal) -> str | None:
    """The run form of the proposal's deployment with its parameters filled in; None when it has none.

    The form decodes the parameter of its address once more than a browser does.
    """
    name = proposal.deployment
    if name is None:
        return None
    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"{name}/{name}")
    except (httpx.HTTPError, PrefectException) as e:
        get_run_logger().error("no form to link to: the deployment %s cannot be read: %s", name, e)
        return None
    given = quote(quote(json.dumps(dict(proposal.parameters)), safe=""), safe="")
    return f"{configuration().prefect_ui_url}/deployments/deployment/{deployment.id}/run?parameters={given}"


def _report(found: Diagnosis, url: str | None, alert: str, runbook: str) -> None:
    about = f"{found.subject} of {found.tenant_id}" if found.tenant_id else found.subject
    facts = {"alert": alert or None, "runbook": runbook or None, "machine": found.machine_id, "at": found.looked_at}
    artifact.report(
        artifact.key("diagnose", found.subject, found.tenant_id or ""),
        f"Diagnosis: {about}",
        f"{found.sentence}. Proposed: {found.proposal.action if found.proposal else 'nothing to do'}",
        {name: value for name, value in facts.items() if value},
        _proposed(found.proposal, url),
        artifact.table(
            ("check", "normal?", "seen", "normal range"),
            ((f.name, _OK[f.ok], f.seen, f.normal) for f in sorted(found.findings, key=lambda f: f.ok is True)),
        ),
    )


def _proposed(proposal: Proposal | None, url: str | None) -> str:
    """The proposal as markdown."""
    if proposal is None:
        return "## Nothing to do"
    lines = [f"## Proposed: {proposal.action}", "", f"{artifact.cell(proposal.why)}", ""]
    if url is not None:
        warning = " It replaces data: read the form before it is sent." if proposal.destructive else ""
        lines += [f"**[Open the form of {proposal.action}]({url})**, filled in; Submit starts it.{warning}", ""]
    return "\n".join([*lines, "```sh", proposal.command, "```"])
