"""Restores, the tests of them, and moves."""

from __future__ import annotations

from pydantic import BaseModel, Field


class RestoreTests(BaseModel):
    """`shared/selection.py`."""

    restore_test_share: float = Field(default=0.1, gt=0, le=1, description="of the tenants, drilled by one weekly run")
    restore_test_least: int = Field(default=4, ge=1, description="drills of a run, however few tenants there are")


class Restores(BaseModel):
    """`shared/restore.py`, and the sweep that finds those that died."""

    lease_seconds: float = Field(default=30.0, gt=0)
    restore_drain_timeout_seconds: float = Field(default=10.0, gt=0)
    restore_generations_kept: int = Field(default=1, ge=1, description="databases from before, engram.db.bak included")
    sweep_seconds: float = Field(default=2.0, gt=0, description="how often the resident drain looks for dead restores")


class Moves(BaseModel):
    """Moving a tenant to another machine: shared/move.py."""

    move_hold_seconds: float = Field(default=60.0, gt=0, description="longest that writes are refused; then given up")
    move_wait_seconds: float = Field(default=900.0, gt=0, description="for the other machine's part, nothing held")
    move_keep_hours: float = Field(default=24.0, ge=0, description="what the source keeps of a moved tenant")
