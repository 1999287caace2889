"""A machine with several tenants, for the tests of fleet runs."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared import fleet_run, registry
from shared.control_plane import ControlPlane
from shared.fleet import Fleet
from shared.fleet_run import Done, Run
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.tenant import TenantPaths
from shared.workdir import workdir
from tests.core_fixtures import add_memories, settings_in


@dataclass
class Machine:
    """One data directory under a machine id of its own, so that tests sharing a control plane keep apart."""

    settings: Settings
    control_plane: ControlPlane
    objects: ObjectStore
    tenants: list[str]

    def paths(self, tenant_id: str) -> TenantPaths:
        return TenantPaths.of(self.settings.tenants_dir, tenant_id)

    def write(self, tenant_id: str, content: str = "something new") -> None:
        add_memories(self.paths(tenant_id), content)

    def run(self, run_id: str = "", **fields: object) -> Run:
        return Run(run_id or secrets.token_hex(6), self.settings.machine_id, "scheduled", **fields)  # type: ignore[arg-type]

    def back_up(self, run: Run | None = None, retry_seconds: Sequence[float] = (), **settings: object) -> list[Done]:
        """A whole run in this process."""
        run = run or self.run()
        using = self.settings.model_copy(update=settings)
        fleet_run.begin(self.control_plane, run)
        work = Fleet(using, self.control_plane, self.objects, run, retry_seconds)
        with workdir(using.data_dir / "tmp", "backup") as directory:
            done = list(work.back_up(fleet_run.choose(self.control_plane, run), directory))
            assert list(directory.iterdir()) == [], "staging is cleared tenant by tenant"
        work.record(done)
        return done

    def count(self) -> int:
        """Objects in the store."""
        return len(self.objects.keys("tenants"))


def made(done: list[Done]) -> set[str]:
    return {d.tenant_id for d in done if not d.skipped and d.error is None}


def skipped(done: list[Done]) -> set[str]:
    return {d.tenant_id for d in done if d.skipped}


def make_machine(directory: Path, url: str, control_plane: ControlPlane, tenants: int = 4) -> Machine:
    token = secrets.token_hex(4)
    settings = settings_in(directory, url, machine_id=f"m-{token}")
    made = Machine(settings, control_plane, ObjectStore(settings), [f"t{n}-{token}" for n in range(tenants)])
    for tenant_id in made.tenants:
        registry.create(control_plane, settings, tenant_id)
        made.write(tenant_id, f"first of {tenant_id}")
    return made


@pytest.fixture
def machine(tmp_path: Path, core_url: str, core_control_plane: ControlPlane) -> Machine:
    return make_machine(tmp_path, core_url, core_control_plane)
