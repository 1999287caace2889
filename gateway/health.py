"""Is the process alive, may it take traffic, and what do its counters say. No token is asked for."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.openapi import ResponseSpec

from gateway.jwks import JwksUnavailable
from gateway.problems import MEDIA_TYPE, Problem, Refusal
from gateway.proxies import FOR_ANOTHER
from gateway.schemas import ProblemView
from gateway.services import Services, services_of

EXPOSITION = "text/plain; version=0.0.4"  # to text Litestar adds `; charset=utf-8` when it answers
NOT_PASSED_ON = Problem(404, "The metrics are not for the clients of a proxy.")


class Status(msgspec.Struct):
    status: str


@get("/health")
async def health() -> Status:
    """Alive: the event loop answers."""
    return Status("ok")


@get(
    "/ready",
    responses={
        503: ResponseSpec(
            ProblemView, media_type=MEDIA_TYPE, generate_examples=False, description="`failing` names the checks."
        )
    },
)
async def ready(request: Request[Any, Any, Any]) -> Status:
    """May take traffic: tenants were read, keys are at hand, usage can be recorded."""
    failing = await failing_checks(services_of(request))
    if failing:
        raise Refusal(
            Problem(
                503,
                f"Not ready: {', '.join(failing)}.",
                reason="not ready",
                retry_after=1,
                extra={"failing": failing},
            )
        )
    return Status("ready")


@get(
    "/metrics",
    media_type=f"{EXPOSITION}; charset=utf-8",
    responses={
        404: ResponseSpec(
            ProblemView, media_type=MEDIA_TYPE, generate_examples=False, description="Asked through a trusted proxy."
        )
    },
)
async def prometheus(request: Request[Any, Any, Any]) -> Response[bytes]:
    """All workers of this gateway together. Prometheus asks the gateway itself; a trusted proxy's clients need not know
    how loaded this machine is or how old its backups are."""
    if FOR_ANOTHER in request.scope:
        raise Refusal(NOT_PASSED_ON)
    text = await services_of(request).exposition.text()
    return Response(text, media_type=EXPOSITION)


async def failing_checks(services: Services) -> list[str]:
    """What this worker lacks to take traffic."""
    failing = []
    if not services.tenants.loaded:
        failing.append("tenants")
    if not services.spool.available:
        failing.append("spool")
    try:
        await services.jwks.load()
    except JwksUnavailable:
        failing.append("jwks")
    return failing
