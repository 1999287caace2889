"""How a move ends on a machine when its run does not say so itself: by the journal's word, and never by a guess.

    source   current is here             it never left: let writes in again, tell the journal
             it has left, undone         rename `current` back, let everybody in
             it has left, routed         it is gone for good; the files are kept until the journal says they may go
    target   undone                      remove what was staged or prepared
             routed                      activate what was prepared: from here on it serves
             anything before             undone first, which only works while it is not routed

A run that fails or is cancelled calls it for itself; for one that was killed the sweep does, which holds the tenant's
`RestoreMutex` and so knows that the run is gone. A machine that cannot reach the control plane does nothing with a
tenant that has left: it is not served here, and only the control plane knows whether it is served elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC
from uuid import UUID

import msgspec

from shared import generation, lease, litestream, move_disk, move_journal, watermark
from shared.control_plane import ControlPlane
from shared.durable import fsync_path, remove_tree, unlink
from shared.errors import EngramError, LitestreamUnavailable, Permanent
from shared.fence import Fence
from shared.log import get_logger
from shared.move_journal import Row
from shared.settings import Settings
from shared.sweep import Swept
from shared.tenant import TenantPaths, tenants_on_disk

log = get_logger("move")


@contextmanager
def else_left_to_the_sweep(what: str, tenant_id: str) -> Iterator[None]:
    """For a run that failed. What cannot be settled now (a control plane that is away, a full disk) is left to the
    sweep, and must not hide the cause."""
    try:
        yield
    except (EngramError, OSError) as e:
        log.error(f"{what}_left_to_the_sweep", tenant_id=tenant_id, cause=str(e))


def settle_source(
    settings: Settings, control_plane: ControlPlane, paths: TenantPaths, move_id: UUID, fence: Fence | None, error: str
) -> Row:
    """Let the tenant be served here again, or leave it gone, as the journal says; the row as it is then.

    The caller holds the mutex. Raises `ControlPlaneUnavailable`: a tenant that had not left is served again all the
    same, one that had stays away.
    """
    try:
        if not move_disk.has_left(paths):
            _let_in(paths, fence)
            return move_journal.undo(control_plane, move_id, error)
        row = move_journal.undo(control_plane, move_id, error)
        if row.state == "undone":
            move_disk.come_back(paths)
            _let_in(paths, fence)
            log.warning("move_undone", tenant_id=paths.tenant_id, move_id=str(move_id), cause=error)
        else:
            left_for_good(settings, paths, fence)
        return row
    finally:
        if fence is not None:
            fence.leave_locked()  # a process that lives on must not go on holding it; nothing when it is lowered


def _let_in(paths: TenantPaths, fence: Fence | None) -> None:
    """Lower the mark, which is the move's own when there is a marker. Nothing was changed under it: who is inside may
    stay there."""
    if move_disk.read(paths) is not None:
        _lower(paths, fence)
        move_disk.clear(paths)
    elif fence is not None:
        fence.lower()


def _lower(paths: TenantPaths, fence: Fence | None) -> None:
    if fence is not None:
        fence.lower()
    unlink(paths.mark)  # that of a fence that was given up before, too


def left_for_good(settings: Settings, paths: TenantPaths, fence: Fence | None) -> None:
    """The route is changed: nothing here is the tenant's database any more. Doing it twice is fine."""
    marker = move_disk.read(paths)
    if marker is not None and not marker.settled:
        move_disk.write(paths, msgspec.structs.replace(marker, settled=True))
    _lower(paths, fence)
    try:
        litestream.let_go(settings, paths, keep=None)
    except LitestreamUnavailable as e:  # who follows it tries again, and the removal waits for it
        log.error("departed_still_copied", tenant_id=paths.tenant_id, cause=str(e))


def settle_target(
    settings: Settings, control_plane: ControlPlane, paths: TenantPaths, move_id: UUID, error: str
) -> Row:
    """Serve what was prepared, or remove it, as the journal says; the row as it is then. The caller holds the mutex.

    Raises `ControlPlaneUnavailable`, nothing changed, and `Permanent` when the tenant is routed here and what was
    prepared is not there.
    """
    row = move_journal.undo(control_plane, move_id, error)
    if row.state == "undone":
        if os.path.lexists(paths.current):
            move_disk.clear(paths)
        else:
            move_disk.give_up_arrival(settings, paths, _prepared(paths))
        return row
    serve(settings, control_plane, paths, row)
    return move_journal.get(control_plane, move_id)


def serve(settings: Settings, control_plane: ControlPlane, paths: TenantPaths, row: Row) -> None:
    """The target's last step, once the row is routed; twice is once. Raises `Permanent` when nothing is prepared."""
    number = row.to_generation or 0
    if row.state == "routed" and not generation.active(paths):  # else it arrived, or was restored since
        if not (paths.generation_dir(number) / "engram.db").exists():
            raise Permanent(
                f"tenant {row.tenant_id} is routed here and generation {number} is not there; backup"
                f" {row.final_backup_id} holds all of it: engram restore {row.tenant_id} --backup {row.final_backup_id}"
            )
        move_disk.arrive(paths, number)
    if row.state == "routed":
        move_journal.done(control_plane, row, generation.active(paths), settings.move_keep_hours * 3600)
    if (marker := move_disk.read(paths)) is not None and marker.move_id == str(row.move_id):
        move_disk.clear(paths)


def _prepared(paths: TenantPaths) -> int:
    marker = move_disk.read(paths)
    return marker.generation if marker is not None else 0


def sweep_moves(settings: Settings, control_plane: ControlPlane) -> list[Swept]:
    """Finish or undo every move of this machine whose run here is gone, and remove what was kept for long enough.

    Raises `ControlPlaneUnavailable`.
    """
    _remove_trash(settings)
    swept: list[Swept] = []
    found = {r["tenant_id"]: r["move_id"] for r in control_plane.rows("moves_open_on", machine_id=settings.machine_id)}
    found |= {paths.tenant_id: UUID(marker.move_id) for paths, marker in _unsettled(settings)}
    for tenant_id, move_id in sorted(found.items()):
        paths = TenantPaths.of(settings.tenants_dir, tenant_id)
        if (one := _attend(settings, control_plane, paths, move_id)) is not None:
            swept.append(one)
    for row in control_plane.rows("moves_to_remove", machine_id=settings.machine_id, tenant_id=None):
        if (one := _remove(settings, control_plane, row["tenant_id"])) is not None:
            swept.append(one)
    _cover_books(settings, control_plane)
    return swept


def _unsettled(settings: Settings) -> Iterator[tuple[TenantPaths, move_disk.Moving]]:
    for tenant_id in tenants_on_disk(settings.tenants_dir, missing_ok=True):
        paths = TenantPaths.of(settings.tenants_dir, tenant_id)
        with suppress(Permanent, OSError):
            if (marker := move_disk.read(paths)) is not None and not marker.settled:
                yield paths, marker


def _attend(settings: Settings, control_plane: ControlPlane, paths: TenantPaths, move_id: UUID) -> Swept | None:
    found = f"move {move_id} of a dead run"
    if (mutex := move_disk.locked(paths)) is None:
        return None
    try:
        row = move_journal.get(control_plane, move_id)
        marker = move_disk.read(paths)
        if row.source == settings.machine_id and row.state == "routed" and marker is not None and marker.settled:
            return None  # the rest is the target's
        if row.source == settings.machine_id:
            ended = settle_source(settings, control_plane, paths, move_id, None, "its run on the source died (sweep)")
            if ended.state != "routed":  # then it is the target's until it serves
                lease.release(control_plane, row.tenant_id, holder_of(move_id))
        else:
            ended = settle_target(settings, control_plane, paths, move_id, "its run on the target died (sweep)")
        log.warning("move_settled", tenant_id=row.tenant_id, move_id=str(move_id), state=ended.state)
        serving = row.target if ended.state in ("routed", "done") else row.source
        return Swept(row.tenant_id, found, f"{ended.state}, machine {serving} serves it")
    except (EngramError, OSError) as e:
        log.critical("move_not_settled", tenant_id=paths.tenant_id, move_id=str(move_id), cause=str(e))
        return Swept(paths.tenant_id, found, f"not settled: {e}", ok=False)
    finally:
        with suppress(OSError):  # the next sweep finds it not empty
            mutex.release()


def _remove(settings: Settings, control_plane: ControlPlane, tenant_id: str) -> Swept | None:
    found = "files of a tenant that was moved away"
    paths = TenantPaths.of(settings.tenants_dir, tenant_id)
    if (mutex := move_disk.locked(paths)) is None:
        return None
    try:
        # Again under the mutex, which an arrival needs: none can begin from here on.
        if not control_plane.rows("moves_to_remove", machine_id=settings.machine_id, tenant_id=tenant_id):
            return None
        move_disk.remove(settings, paths)
        control_plane.execute("moves_removed", tenant_id=tenant_id, machine_id=settings.machine_id)
        log.info("moved_files_removed", tenant_id=tenant_id)
        return Swept(tenant_id, found, "removed")
    except (EngramError, OSError) as e:
        log.error("moved_files_kept", tenant_id=tenant_id, cause=str(e))
        return Swept(tenant_id, found, f"kept: {e}", ok=False)
    finally:
        with suppress(OSError):
            mutex.release()


def _remove_trash(settings: Settings) -> None:
    """What a removal that died had renamed already."""
    for aside in settings.tenants_dir.glob(".moved-*"):
        remove_tree(aside)
        fsync_path(settings.tenants_dir)


def _cover_books(settings: Settings, control_plane: ControlPlane) -> None:
    """An idle machine says nothing of its books; after a move its last word must cover the moved tenant's requests."""
    row = control_plane.row("moves_unsettled_books", machine_id=settings.machine_id)
    if row is None or row["routed_at"] is None or not settings.spool_dir.is_dir():
        return
    until = watermark.of_spool(settings)
    if until > row["routed_at"].astimezone(UTC):
        control_plane.execute("usage_watermark_set", machine_id=settings.machine_id, complete_until=until)


def holder_of(move_id: UUID) -> str:
    """The lease's holder."""
    return f"move {move_id}"
