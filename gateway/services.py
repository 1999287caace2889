"""What a handler may reach for: the parts one worker is made of, made once at its start (`gateway.app`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litestar.connection import ASGIConnection

from gateway.auth import Authenticator
from gateway.jwks import Jwks
from gateway.pool import TenantPool
from gateway.quota import Quotas
from gateway.ratelimit import RateLimiter
from gateway.shed import Gate
from gateway.tenants import Tenants
from gateway.usage import UsageReport
from shared.settings import Settings
from shared.spool import Spool


@dataclass(slots=True)
class Services:
    settings: Settings
    spool: Spool
    jwks: Jwks
    authenticator: Authenticator
    tenants: Tenants
    pool: TenantPool
    usage: UsageReport
    rates: RateLimiter
    quotas: Quotas
    gate: Gate


def services_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Services:
    services: Services = connection.app.state.services
    return services
