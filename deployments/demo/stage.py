"""The stage of a demo: the stack, one tenant for each conversation, the table of checks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from deployments.demo.checks import Checks
from deployments.demo.client import Counted, TenantClient
from deployments.demo.corpus import Conversation
from deployments.issuer import mint
from deployments.prefect_api import PrefectApi, Run
from shared import registry
from shared.control_plane import ControlPlane
from shared.errors import EngramError
from shared.objects import ObjectStore
from shared.settings import Settings

SCOPES = ("memories:read", "memories:write", "search")
_TOKEN_TTL_SECONDS = 3_600


@dataclass(slots=True)
class Actor:
    """One tenant of the demo: its conversation, its client's counts, what the gateway acknowledged."""

    tenant_id: str
    conversation: Conversation
    token: str
    counted: Counted = field(default_factory=Counted)
    acknowledged: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Stage:
    """What every step is given. The first actor's database will be damaged."""

    settings: Settings
    control_plane: ControlPlane
    prefect: PrefectApi
    objects: ObjectStore
    checks: Checks
    actors: list[Actor]

    @property
    def victim(self) -> Actor:
        return self.actors[0]


def cast(settings: Settings, control_plane: ControlPlane, conversations: list[Conversation]) -> list[Actor]:
    """Make one tenant a conversation; ids carry the time, so that a demo can be repeated on one stack."""
    run = format(int(time.time()), "x")
    actors = []
    for conversation in conversations:
        name = "".join(c if c.isalnum() else "-" for c in conversation.name.lower())[:40].strip("-") or "tenant"
        tenant_id = f"demo-{name}-{run}"
        registry.create(control_plane, settings, tenant_id)
        token, _ = mint(settings, tenant_id, SCOPES, ttl_seconds=_TOKEN_TTL_SECONDS)
        actors.append(Actor(tenant_id, conversation, token))
    return actors


@asynccontextmanager
async def client_of(stage: Stage, actor: Actor) -> AsyncIterator[TenantClient]:
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(base_url=stage.settings.gateway_url, timeout=30.0, limits=limits) as http:
        yield TenantClient(http, actor.tenant_id, actor.token, actor.counted)


def run_deployment(stage: Stage, deployment: str, parameters: dict[str, Any]) -> tuple[Run, str]:
    """Start a deployment and wait for its end; the run and "completed", or its cause."""
    run = stage.prefect.start(deployment, parameters)
    try:
        return stage.prefect.finish(run), "completed"
    except EngramError as e:
        return run, str(e)
