"""Which tokens are believed, and the keys that prove them."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Tokens(BaseModel):
    """`gateway/auth.py`, `gateway/jwks.py`."""

    jwt_issuer: str = ""
    jwt_audience: str = "engram"
    jwks_url: str = ""
    jwt_tenant_claim: str = "tenant_id"
    jwt_require_at_jwt: bool = Field(
        default=False, description="only tokens that say typ=at+jwt (RFC 9068): no ID token passes for an access token"
    )
    jwt_leeway_seconds: float = Field(default=30.0, ge=0, le=300)
    jwks_ttl_seconds: float = Field(default=300.0, gt=0)
    jwks_cooldown_seconds: float = Field(default=5.0, ge=0)
    jwks_stale_max_seconds: float = Field(default=86_400.0, ge=0)
    jwks_timeout_seconds: float = Field(default=5.0, gt=0)
    jwt_cache_entries: int = Field(default=10_000, ge=0)
    issuer_port: int = Field(default=8081, ge=0, le=65535)
