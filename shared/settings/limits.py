"""What a client may send, how slowly, and how much it may ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Patience(BaseModel):
    """What a client may send and how slowly."""

    url_limit_bytes: int = Field(default=8_192, ge=256)
    header_limit_bytes: int = Field(default=32_768, ge=1_024)
    header_timeout_seconds: float = Field(default=30.0, gt=0, description="also how long an idle connection is kept")
    body_timeout_seconds: float = Field(default=30.0, gt=0)
    answer_stall_seconds: float = Field(
        default=60.0, gt=0, description="a client that reads nothing for so long is cut"
    )


class Limits(BaseModel):
    """How much a client may ask for. Some can be overridden while running: `shared.limits`."""

    rate_limit_mode: Literal["off", "shadow", "enforce"] = "enforce"
    rate_limit_rps: float = Field(default=0.0, ge=0, description="per tenant and machine; 0 is off")
    rate_limit_burst: int = Field(default=0, ge=0, description="0 is one second's worth")
    rate_limit_read_rps: float = Field(default=0.0, ge=0, description="reads only, within the tenant's; 0 is off")
    rate_limit_write_rps: float = Field(default=0.0, ge=0, description="writes only, within the tenant's; 0 is off")
    rate_limit_search_rps: float = Field(default=0.0, ge=0, description="searches only, within the tenant's; 0 is off")
    unauthenticated_rps: float = Field(default=0.0, ge=0, description="refused tokens per client address; 0 is off")
    unauthenticated_burst: int = Field(default=200, ge=1)
    inflight_requests: int = Field(default=256, ge=1, description="at work per worker; more wait, then are shed")
    inflight_tenant_requests: int = Field(default=64, ge=1, description="at work per worker and tenant")
    inflight_wait_seconds: float = Field(default=0.5, ge=0, description="longest wait for a place")
    quota_mode: Literal["off", "shadow", "enforce"] = Field(default="enforce", description="shadow: warn, never refuse")
    quota_refresh_seconds: float = Field(default=5.0, gt=0)
    quota_stale_seconds: float = Field(default=60.0, gt=0, description="an older snapshot refuses nobody")
    limits_poll_seconds: float = Field(default=0.25, gt=0, description="how soon a worker sees a run-time limit")
