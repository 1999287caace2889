"""Prefect, this machine's name in it, and the patience of `engram up`."""

from __future__ import annotations

from pydantic import AliasChoices, BaseModel, Field, SecretStr, field_validator

_QUEUES = frozenset({"default", "urgent", "upkeep"})  # those that all machines share: shared/queues.py


class Prefect(BaseModel):
    """The server, its workers and this machine's name among them."""

    prefect_api_url: str = Field(default="", validation_alias=AliasChoices("PREFECT_API_URL", "prefect_api_url"))
    prefect_api_auth_string: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices("PREFECT_API_AUTH_STRING", "prefect_api_auth_string"),
        description="user:password; an own server of `engram up` asks for it too",
    )
    prefect_port: int = Field(default=4200, ge=0, le=65535)
    prefect_work_pool: str = "engram"
    prefect_worker_limit: int = Field(default=4, ge=1, description="runs at a time on a machine, but for urgent ones")
    prefect_urgent_limit: int = Field(default=4, ge=1, description="restores and what repairs, beside them")
    prefect_retention_days: int = Field(
        default=14, ge=1, description="of ended runs, with an own server of `engram up`"
    )
    prefect_pick_up_seconds: float = Field(default=120.0, gt=0, description="for a worker to take up a run")
    machine_id: str = Field(default="local", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")

    @field_validator("machine_id")
    @classmethod
    def _is_no_queue(cls, value: str) -> str:
        if value in _QUEUES or value.endswith("-urgent"):
            raise ValueError("a work queue has that name (shared/queues.py): choose another")
        return value

    @property
    def prefect_ui_url(self) -> str:
        return self.prefect_api_url.removesuffix("/").removesuffix("/api")


class Up(BaseModel):
    """Readiness and stopping of `engram up`."""

    start_timeout_seconds: float = Field(default=120.0, gt=0)
    stop_timeout_seconds: float = Field(default=30.0, gt=0)
