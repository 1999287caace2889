"""A run over the tenants of one machine, or of one shard of them: its name, its lock, its row, which tenants it has.

One at a time on a machine, but for shards: `holding`. A run that was killed, or left failed
tenants, is taken up again by its name: `unfinished`.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from shared.control_plane import ControlPlane
from shared.errors import LeaseHeld, Permanent
from shared.ids import new_id
from shared.receipt import Receipt
from shared.settings import Settings


class Last(Receipt, frozen=True):
    """A tenant's last good backup, as far as a run needs it. `key_current`: its key, if it has one, is not retired."""

    backup_id: UUID
    ts: datetime
    key: str
    sha256: str
    size_bytes: int
    packing: str
    key_current: bool


class Chosen(Receipt, frozen=True):
    """A tenant of this run: its last good backup and the mark that goes with exactly that backup."""

    tenant_id: str
    last: Last | None
    fingerprint: str | None
    run_id: str | None


class Done(Receipt, frozen=True):
    """What became of one tenant. `skipped`: nothing new was stored, `backup_id` still is what the database holds."""

    tenant_id: str
    backup_id: UUID | None = None
    key: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    skipped: bool = False
    error: str | None = None
    outage: bool = False  # the error is not the tenant's: the store or the control plane was away

    def as_dict(self) -> dict[str, Any]:
        """The public shape."""
        shown = {name: value for name, value in msgspec.structs.asdict(self).items() if name != "outage"}
        return shown | {"backup_id": str(self.backup_id) if self.backup_id else None}


class Run(Receipt, frozen=True):
    """One run over tenants of one machine. `force`: also of what has not changed a new backup is stored. `whole`: it is
    for all of them, or all of one shard, not for some that were named."""

    run_id: str
    machine_id: str
    kind: str
    shard: int = 0
    shards: int = 1
    force: bool = False
    flow_run_id: str | None = None
    whole: bool = True


class Unfinished(Receipt, frozen=True):
    """A run to go on with."""

    run_id: str
    shards: int
    force: bool


@contextmanager
def holding(settings: Settings, run: Run) -> Iterator[None]:
    """This machine's lock for fleet runs: shards run together, each once, a whole run alone. Shards of two divisions
    run together, too; a tenant of both may be stored twice.

    Raises `LeaseHeld` at once when another run has it. The kernel frees it with the process.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = [("backup-all.lock", fcntl.LOCK_EX if run.shards == 1 else fcntl.LOCK_SH)]
    if run.shards > 1:
        wanted.append((f"backup-all-{run.shard}-of-{run.shards}.lock", fcntl.LOCK_EX))
    held: list[int] = []
    try:
        for name, mode in wanted:
            held.append(os.open(settings.run_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            try:
                fcntl.flock(held[-1], mode | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise LeaseHeld(f"another backup of all tenants is running on machine {run.machine_id}") from e
        yield
    finally:
        for fd in held:
            os.close(fd)


def new_run_id() -> str:
    return str(new_id())


def unfinished(
    control_plane: ControlPlane, settings: Settings, shard: int | None = None, shards: int = 1
) -> Unfinished:
    """The newest run over all tenants of this machine, or of one shard, when it was killed or left failed tenants.

    Raises `Permanent` when there is none.
    """
    row = control_plane.row("fleet_run_newest", machine_id=settings.machine_id, shard=shard, shards=shards)
    if row is None or not row["unfinished"]:
        raise Permanent(f"machine {settings.machine_id} has no unfinished backup run")
    return Unfinished(row["run_id"], row["shards"], row["force"])


def begin(control_plane: ControlPlane, run: Run) -> Run:
    """Enter the run, or take it up again, forced as it was."""
    names = ("run_id", "machine_id", "shard", "shards", "kind", "flow_run_id", "whole", "force")
    row = control_plane.row("fleet_run_begin", **{name: getattr(run, name) for name in names})
    assert row is not None  # an upsert returns its row
    return msgspec.structs.replace(run, force=row["force"])


def choose(control_plane: ControlPlane, run: Run, tenant_ids: Sequence[str] | None = None) -> list[Chosen]:
    """The run's tenants, those longest without a true backup first."""
    rows = control_plane.rows(
        "fleet_tenants", machine_id=run.machine_id, tenant_ids=list(tenant_ids) if tenant_ids is not None else None
    )
    return [_chosen(row) for row in rows if run.shards == 1 or shard_of(row["tenant_id"], run.shards) == run.shard]


def made_by(
    control_plane: ControlPlane, flow_run_id: str, tenant_ids: Sequence[str] | None, *, error: str | None
) -> list[Done]:
    """What a run on another machine stored. A named tenant without a row has `error`, or that it has no row."""
    rows = control_plane.rows(
        "backups_of_flow_run",
        flow_run_id=flow_run_id,
        tenant_ids=list(tenant_ids) if tenant_ids is not None else None,
    )
    done = {row["tenant_id"]: Done(**row) for row in rows}
    missing = error or f"run {flow_run_id} ended without a backup of it"
    return [done.get(t) or Done(t, error=missing) for t in tenant_ids] if tenant_ids is not None else [*done.values()]


def shard_of(tenant_id: str, shards: int) -> int:
    """The same for ever and on every machine."""
    return zlib.crc32(tenant_id.encode()) % shards


def _chosen(row: dict[str, Any]) -> Chosen:
    if row["backup_id"] is None:
        return Chosen(row["tenant_id"], None, None, None)
    last = Last(*(row[name] for name in Last.__struct_fields__))
    if row["marked_backup_id"] != row["backup_id"]:  # the mark is of an older backup, and proves nothing of this one
        return Chosen(row["tenant_id"], last, None, None)
    return Chosen(row["tenant_id"], last, row["fingerprint"], row["run_id"])
