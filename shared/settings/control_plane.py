"""The PostgreSQL that all machines share, and the embedded one."""

from __future__ import annotations

from pydantic import BaseModel, Field, SecretStr


class ControlPlane(BaseModel):
    """The pooler may be PgBouncer in transaction mode: no prepared statements, no session state."""

    control_plane_url: SecretStr = SecretStr("")
    control_plane_connect_timeout_seconds: float = Field(default=10.0, gt=0)
    control_plane_pool_size: int = Field(default=4, ge=1)
    control_plane_statement_timeout_seconds: float = Field(default=30.0, gt=0)
    usage_report_wait_seconds: float = Field(
        default=5.0, gt=0, description="longest wait of /v1/usage for a thread and PostgreSQL's answer; then 503"
    )
    control_plane_maintenance_timeout_seconds: float = Field(
        default=3600.0, gt=0, description="of a migration's or the retention's statement, where nobody waits"
    )
    postgres_port: int = Field(default=0, ge=0, le=65535, description="embedded PostgreSQL; 0 picks a free one")
