"""The incident playbook (shared/playbook) and who may use it."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Operators(BaseModel):
    """What happens without a person, and what operators may ask for."""

    operator_tenant: str = Field(
        default="operators", min_length=1, description="claim of tokens for /v1/admin; no customer may have this id"
    )
    admin_rps: float = Field(default=2.0, gt=0, description="requests to /v1/admin per machine")
    admin_burst: int = Field(default=30, ge=1)
    automation: bool = Field(default=True, description="false: nothing but reading happens without a person")
    automation_actions_per_hour: int = Field(
        default=6, ge=0, description="reversible actions without a person, all machines together"
    )
