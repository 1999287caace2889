"""Where a process runs: the environment, the directory that everything lies in, how much is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel


class Place(BaseModel):
    """What every process is told, and the directories that follow from it."""

    env: Literal["dev", "staging", "prod"] = "dev"
    data_dir: Path = Path(".engram")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def spool_dir(self) -> Path:
        return self.data_dir / "spool"

    @property
    def tenants_dir(self) -> Path:
        return self.data_dir / "tenants"

    @property
    def run_dir(self) -> Path:
        """What the processes of this machine share while they run; nothing in it is worth a backup."""
        return self.data_dir / "run"

    @property
    def sandbox_dir(self) -> Path:
        """Where restore tests open copies: apart from `tenants_dir`, so a drill can never touch a tenant."""
        return self.data_dir / "sandbox"
