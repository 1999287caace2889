"""What a handler may reach for: the parts one worker is made of, made once at its start (`gateway.app`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gateway.auth import Authenticator
from gateway.exposition import Exposition
from gateway.jwks import Jwks
from gateway.patience import Patience
from gateway.pool import TenantPool
from gateway.quota import Quotas
from gateway.ratelimit import RateLimiter
from gateway.routing import Routing
from gateway.shed import Gate
from gateway.tenants import Tenants
from gateway.usage import UsageReport
from shared.playbook.action import Outcome, Request
from shared.settings import Settings
from shared.spool import Spool

SCOPE_KEY = "engram.services"


@dataclass(slots=True)
class Services:
    settings: Settings
    spool: Spool
    jwks: Jwks
    authenticator: Authenticator
    tenants: Tenants
    routing: Routing
    pool: TenantPool
    usage: UsageReport
    rates: RateLimiter
    quotas: Quotas
    gate: Gate
    operations: Operations
    patience: Patience
    exposition: Exposition


class Operations(Protocol):
    """`gateway.admin` needs the services too; so they know no more of it than this."""

    async def perform(self, request: Request) -> Outcome: ...

    async def close(self, timeout_seconds: float) -> None: ...


class Connection(Protocol):
    """As much of a Litestar connection as tells the services."""

    scope: Any


def services_of(connection: Connection) -> Services:
    """`gateway.shortcut`, which every request passes, hung them on its scope."""
    services: Services = connection.scope[SCOPE_KEY]
    return services
