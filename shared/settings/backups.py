"""Backups: how they are packed, how long they are kept, how often they are read again; the second layer beside them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, SecretStr


class Packing(BaseModel):
    """How new backups are packed (shared/pack.py) and who can open them (shared/keys.py)."""

    backup_compression: Literal["none", "zstd"] = "none"
    backup_compression_level: int = Field(default=3, ge=1, le=9, description="of zstd; 9 needs 15 MB more")
    backup_encryption: Literal["none", "age"] = "none"
    backup_master_key: SecretStr = Field(
        default=SecretStr(""), description="an age identity, AGE-SECRET-KEY-1…; wraps the tenants' keys"
    )
    backup_master_keys_older: SecretStr = Field(
        default=SecretStr(""), description="comma-separated; they still open keys, until `engram keys rotate`"
    )


class Retention(BaseModel):
    """How long backups are kept, beside what each plan says (shared/retention.py), and when they are read again."""

    retention_min_age_hours: float = Field(default=24.0, ge=0, description="no younger backup is deleted")
    retention_corrupt_days: int = Field(default=30, ge=0, description="a corrupt one is kept for whoever looks into it")
    retention_deleted_tenant_days: int = Field(default=30, ge=0, description="then all of its backups go")
    retention_orphan_hours: float = Field(
        default=24.0, gt=0, description="an object without a row, or an upload never finished, is dealt with when older"
    )
    verify_cycle_days: int = Field(default=30, ge=1, description="within which every stored backup is read again")
    verify_run_seconds: float = Field(default=14_400.0, gt=0, description="then the rest is left to the next run")
    verify_parallel: int = Field(default=2, ge=1, le=64)
    backup_stale_hours: float = Field(default=26.0, gt=0, description="a last good backup older than this is listed")


class PointInTime(BaseModel):
    """A second layer beside the backups: shared/litestream.py."""

    point_in_time: Literal["off", "litestream"] = "off"
    point_in_time_hours: float = Field(default=24.0, gt=0, description="back to which every second can be restored")
    point_in_time_poll_seconds: float = Field(default=1.0, gt=0, description="how soon a new generation is followed")
    litestream_path: str = Field(default="", description="empty: the extra's, beside this Python, else from PATH")
    litestream_restore_seconds: float = Field(default=3600.0, gt=0, description="then the backup is taken instead")


class Fleet(BaseModel):
    """Backup of all tenants of a machine: shared/fleet.py."""

    backup_parallel: int = Field(default=4, ge=1, le=64, description="tenants at a time in one run")
    backup_staging_bytes: int = Field(
        default=4_294_967_296, ge=1, description="temporary disk of one run; a larger tenant is refused"
    )
    disk_reserve_bytes: int = Field(
        default=536_870_912,
        ge=0,
        description="of the tenants' volume: no backup, restore test or check takes it",
    )
    backup_force_days: int = Field(
        default=7, ge=0, description="an unchanged tenant is stored anew when its last backup is older"
    )
