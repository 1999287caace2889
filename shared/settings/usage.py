"""Usage: from the gateway's spool to the rows that are billed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """`shared/spool.py`, `shared/metering.py`, `flows/drain.py`."""

    usage_flush_seconds: float = Field(default=1.0, gt=0)
    usage_flush_events: int = Field(default=5_000, ge=1)
    usage_fsync_seconds: float = Field(default=0.5, gt=0, description="what a power loss may cost; see shared/spool.py")
    usage_durability: Literal["async", "sync"] = Field(
        default="async", description="sync: an answer waits until its usage would survive a power loss"
    )
    usage_backlog_events: int = Field(default=10_000, ge=1, description="kept in memory while the disk refuses them")
    usage_spool_limit_bytes: int = Field(
        default=1_073_741_824, ge=1, description="of the spool directory; writes are refused from there on"
    )
    usage_spool_reserve_bytes: int = Field(
        default=67_108_864, ge=0, description="beyond the limit, for the events of what is not refused"
    )
    usage_at_limit: Literal["refuse", "drop"] = Field(
        default="refuse", description="drop: serve on, and lose and count events when the reserve is used up"
    )
    usage_retention_days: int = Field(default=400, ge=1, description="single events; rollups are kept")
    usage_tally_days: int = Field(default=8, ge=1, description="what gateways counted is kept; see shared/tally.py")
    usage_partitions_ahead_days: int = Field(default=7, ge=1, le=366)
    usage_detach_timeout_seconds: float = Field(default=60.0, gt=0, description="waiting for queries on an old day")
    usage_storage_seconds: float = Field(default=900.0, gt=0, description="how often databases are measured")
    usage_dry_run: bool = Field(default=False, description="examine usage, insert nothing: see shared/dry_run.py")
    drain_poll_seconds: float = Field(default=1.0, gt=0)
    drain_linger_seconds: float = Field(default=60.0, ge=0, description="a run ends when nothing came for so long")
    drain_run_seconds: float = Field(default=60.0, gt=0)
