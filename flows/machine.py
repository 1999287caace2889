"""The right machine: a tenant's files are on the volume of one, so its runs belong on one of that machine's work queues
(`shared.queues`).

A run for a tenant of another machine, as the form in the UI may start it, is started again on the right queue; the run
that was in the wrong place waits for it and ends as it does, so nobody who follows the first run is told that something
happened that did not.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run as runtime

from flows import artifact, policy
from flows.core import configuration, control_plane
from shared import queues, registry
from shared.errors import ControlPlaneUnavailable, Permanent, Refused
from shared.receipt import Receipt

_FORWARDED = "forwarded"  # a tag: a run is sent on once, never in a circle
_POLL_SECONDS = 1.0
_AWAY = (httpx.HTTPError, PrefectException)  # what Prefect's client raises


class Elsewhere(Receipt, frozen=True):
    """A run started on another machine's queue."""

    machine_id: str
    flow_run_id: UUID
    url: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine_id": self.machine_id,
            "flow_run_id": str(self.flow_run_id),
            "flow_run_url": self.url,
        }


def forwarded(tenant_id: str) -> dict[str, Any] | None:
    """None when the tenant is of this machine. Else this run's twin has run on the tenant's machine, and completed.

    Raises `Permanent` with the cause when it ended in any other way, or nobody took it up.
    """
    machine_id = _machine_of(tenant_id)
    if machine_id == configuration().machine_id:
        return None
    name = str(runtime.get_flow_name())
    elsewhere = start(name, machine_id, runtime.get_parameters())
    _end(elsewhere)
    artifact.report(
        artifact.key(name, tenant_id),
        f"{name} of {tenant_id}",
        f"done on machine {machine_id}, where the tenant lives",
        {"tenant": tenant_id, "machine": machine_id, "run": elsewhere.url},
    )
    return elsewhere.as_dict()


def _machine_of(tenant_id: str) -> str:
    """Not a task: the steps of a run are its own. Tried again as the first step was."""
    for delay_seconds in policy.READ["retry_delay_seconds"]:
        with suppress(ControlPlaneUnavailable):
            return registry.get_active(control_plane(), tenant_id).machine_id
        time.sleep(delay_seconds)
    return registry.get_active(control_plane(), tenant_id).machine_id


def every() -> list[str]:
    """Every machine that has tenants, and this one."""
    return sorted({row["machine_id"] for row in control_plane().rows("fleet_machines")} | {configuration().machine_id})


def start(name: str, machine_id: str, parameters: Mapping[str, Any], *, part: str = "") -> Elsewhere:
    """Start deployment `name` on its queue of a machine; `part` tells several of one machine apart.

    A retry of this run finds the run it had started, unless that one has ended and not completed: then it is done
    again. Raises `Permanent` when it could not be started.
    """
    mine = configuration().machine_id
    if name == str(runtime.get_flow_name()) and _FORWARDED in (runtime.get_tags() or []):
        raise Refused(
            f"machine {mine} was given a run that belongs on machine {machine_id}; does its worker poll that queue,"
            f" or is ENGRAM_MACHINE_ID wrong?"
        )
    own_id = artifact.flow_run_id()
    try:
        for attempt in count():
            run: FlowRun = run_deployment(  # type: ignore[assignment]  # sync outside of an event loop
                f"{name}/{name}",
                parameters=dict(parameters),
                work_queue_name=queues.queue(machine_id, name),
                timeout=0,
                tags=[_FORWARDED],
                idempotency_key=f"{own_id} {machine_id} {part} {attempt}" if own_id else None,
            )
            if run.state is None or not run.state.is_final() or run.state.is_completed():
                break
    except _AWAY as e:
        raise Permanent(f"{name} could not be started on machine {machine_id}: {type(e).__name__}: {e}") from e
    url = f"{configuration().prefect_ui_url}/runs/flow-run/{run.id}"
    get_run_logger().info("%s on machine %s: %s", name, machine_id, url)
    return Elsewhere(machine_id, run.id, url)


def wait(elsewhere: Elsewhere) -> str | None:
    """Until the run has ended: None when it completed, else why not. One that nobody takes up stays scheduled, and one
    that Prefect does not tell about for as long goes on."""
    patience = configuration().prefect_pick_up_seconds
    deadline = told = time.monotonic() + patience
    with get_client(sync_client=True) as client:
        while True:
            try:
                state = client.read_flow_run(elsewhere.flow_run_id).state
            except ObjectNotFound:
                return f"machine {elsewhere.machine_id}, {elsewhere.url}: the run was deleted"
            except _AWAY as e:
                if time.monotonic() > told:
                    return f"machine {elsewhere.machine_id}, {elsewhere.url}: not known, Prefect does not answer: {e}"
                time.sleep(_POLL_SECONDS)
                continue
            told = time.monotonic() + patience
            if state is not None and state.is_final():
                said = f"machine {elsewhere.machine_id}, {elsewhere.url}: {state.type.value.lower()}: {state.message}"
                return None if state.is_completed() else said
            if (state is None or state.is_scheduled() or state.is_pending()) and time.monotonic() > deadline:
                return f"no worker of machine {elsewhere.machine_id} took up {elsewhere.url}; it stays scheduled"
            time.sleep(_POLL_SECONDS)


def ended(elsewhere: Elsewhere) -> str | None:
    """How the run has ended, in words; None while it has not."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(elsewhere.flow_run_id).state
    if state is None or not state.is_final():
        return None
    return f"machine {elsewhere.machine_id}, {elsewhere.url}: {state.type.value.lower()}: {state.message}"


def _end(elsewhere: Elsewhere) -> None:
    if (cause := wait(elsewhere)) is not None:
        raise Permanent(cause)
