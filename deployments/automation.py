"""The automation behind the bridge: an alert's event → one run of `diagnose`.

Once an alert, whatever repeats it: the trigger counts for each alert (`engram.alert.id`: fingerprint, start, status)
apart, and an event carries the alert's own time. When it has fired for an alert its next window begins
`REMEMBERED_DAYS` after that time, so any repeat is before it and counts for nothing; Prefect keeps that in its
database, for twice as long. (It knows an event's id again, too, but for five minutes and in memory.)

Kept as it is when it is there: another automation, or a changed one, would not remember. So not by `triggers:` in
prefect.yaml, which `prefect deploy` deletes and makes anew each time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from deployments.bridge import FIRING
from shared.diagnosis.finding import SUBJECTS

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.events import Automation
    from prefect.events.schemas.automations import AutomationCore

NAME = "An alert is diagnosed"
REMEMBERED_DAYS = 30


async def ensure() -> None:
    """Make it, or bring it up to date; its being paused stays as somebody decided."""
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        deployment = await client.read_deployment_by_name("diagnose/diagnose")
        wanted = automation(deployment.id)
        if not await client.read_automations_by_name(NAME):
            await client.create_automation(wanted)
        kept = await _one(client)
        if not _same(kept, wanted):
            await client.update_automation(kept.id, wanted.model_copy(update={"enabled": kept.enabled}))


def automation(deployment_id: UUID) -> AutomationCore:
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=NAME,
        description="Events of the bridge (engram bridge). One run of diagnose for each alert, however often it comes.",
        trigger=EventTrigger(
            expect={FIRING},
            match={"prefect.resource.id": "engram.alert.*", "engram.diagnosis": list(SUBJECTS)},
            for_each={"engram.alert.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(days=REMEMBERED_DAYS),
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=deployment_id,
                job_variables=None,
                # A template that is one expression keeps its type: no tenant is null, not "None".
                parameters={
                    name: f"{{{{ event.payload.{name} }}}}" for name in ("subject", "tenant_id", "alert", "runbook")
                },
            )
        ],
    )


async def _one(client: PrefectClient) -> Automation:
    """Of those of that name the same one for everybody: two deploys at the same time may both have made one, and each
    would start its run."""
    first, *others = sorted(await client.read_automations_by_name(NAME), key=lambda a: str(a.id))
    for other in others:
        await client.delete_automation(other.id)
    return first


def _same(kept: Automation, wanted: AutomationCore) -> bool:
    fields = {"trigger", "actions", "description"}
    return kept.model_dump(mode="json", include=fields) == wanted.model_dump(mode="json", include=fields)
