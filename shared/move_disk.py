"""The disk's half of a move: a tenant leaves this machine, or arrives on it, by one rename of `current`.

    moving     the marker: which move, between which machines. While it exists nothing is restored or deleted here, and
               a tenant without `current` is under maintenance instead of broken
    departed   what `current` is called from the moment the tenant has left; the generations stay as they are

Without `current` no process of this machine can read or write the tenant, whatever it has open and whatever it believes
about who serves it: every use reads that link under the shared lock first (`shared.engine.database`), and the rename is
done under the exclusive one. Directory and lock file stay in place, so that nobody keeps a lock that others do not see.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from shared import generation, litestream
from shared.durable import fsync_path, remove_tree, unlink, unlink_database, write_file
from shared.errors import LeaseHeld, Permanent
from shared.fence import Fence, Mark, RestoreMutex
from shared.settings import Settings
from shared.tenant import TenantPaths


class Moving(msgspec.Struct, frozen=True):
    """The content of the `moving` file. `generation`: on the source the one that was active; on the target the one that
    was prepared, 0 before. `settled`: the tenant is gone from here for good."""

    move_id: str
    tenant_id: str
    source: str
    target: str
    generation: int = 0
    settled: bool = False


def read(paths: TenantPaths) -> Moving | None:
    """Raises `Permanent` for a file that no move wrote."""
    try:
        return msgspec.json.decode(paths.moving.read_bytes(), type=Moving)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as e:
        raise Permanent(f"{paths.moving} was not written by a move; remove it by hand") from e


def write(paths: TenantPaths, marker: Moving) -> None:
    write_file(paths.moving, msgspec.json.encode(marker))


def clear(paths: TenantPaths) -> None:
    unlink(paths.moving)


def refuse(paths: TenantPaths) -> None:
    """Raises `LeaseHeld` when the tenant is on its way to or from another machine, or has left this one."""
    if (marker := read(paths)) is not None:
        raise LeaseHeld(f"tenant {paths.tenant_id} moves from machine {marker.source} to {marker.target}")


def has_left(paths: TenantPaths) -> bool:
    return not os.path.lexists(paths.current) and os.path.lexists(paths.departed)


def stays(paths: TenantPaths, machine_id: str) -> bool:
    """Whether this is the source of a move that the tenant has not left."""
    marker = read(paths)
    return marker is not None and marker.source == machine_id and os.path.lexists(paths.current)


def stay(paths: TenantPaths) -> None:
    """Let writes in again at a source that was not left. The caller holds the mutex; nothing was changed under the
    mark: who is inside may stay there."""
    unlink(paths.mark)
    clear(paths)


def leave(paths: TenantPaths) -> None:
    """Durable when this returns. The caller holds the exclusive lock: nobody is inside."""
    _rename(paths.current, paths.departed)


def come_back(paths: TenantPaths) -> None:
    _rename(paths.departed, paths.current)


def _rename(link: Path, to: Path) -> None:
    os.rename(link, to)
    fsync_path(link.parent)


def make_room(paths: TenantPaths) -> None:
    """A directory with the two locks for a tenant that arrives; nothing in it can be used yet."""
    os.close(os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    fsync_path(paths.root)
    fsync_path(paths.root.parent)


def arrive(paths: TenantPaths, number: int) -> None:
    """Serve a prepared generation from now on, and forget what an earlier stay left. Twice is once."""
    if generation.active(paths) != number:
        generation.activate(paths, number)
    paths.departed.unlink(missing_ok=True)
    clear(paths)
    generation.collect(paths, keep_previous=0)


def give_up_arrival(settings: Settings, paths: TenantPaths, number: int) -> None:
    """Remove what was staged for a tenant that does not come; what an earlier stay left is kept for its time."""
    unlink_database(paths.restore_file)
    if not os.path.lexists(paths.departed):
        remove(settings, paths)
        return
    departed = _departed_generation(paths)
    if number and number != departed:
        remove_tree(paths.generation_dir(number))
        fsync_path(paths.generations)
    if (marker := read(paths)) is not None:  # as it was before: gone to where it did not come back from
        write(paths, Moving(marker.move_id, marker.tenant_id, marker.target, marker.source, departed, settled=True))


def _departed_generation(paths: TenantPaths) -> int:
    return int(os.path.basename(os.readlink(paths.departed)))


def remove(settings: Settings, paths: TenantPaths, *, holder: str = "move") -> None:
    """Remove the tenant's directory from a machine that does not serve it. The caller holds its `RestoreMutex`.

    Under the exclusive lock until the lock file is gone: who waits for it then opens anew, and finds nothing. Raises
    `Permanent` when there is an active database, `DrainTimeout`.
    """
    if os.path.lexists(paths.current):
        raise Permanent(f"tenant {paths.tenant_id} has an active database here; nothing was removed")
    fence = Fence(paths, Mark(paths.tenant_id, holder, 0, 0, 0, 0.0))
    try:
        fence.raise_(settings.restore_drain_timeout_seconds)
        litestream.let_go(settings, paths, keep=None)
        aside = paths.root.with_name(f".moved-{paths.tenant_id}")
        remove_tree(aside)  # of a removal that died
        os.rename(paths.root, aside)
        fsync_path(settings.tenants_dir)
        remove_tree(aside)
        fsync_path(settings.tenants_dir)
    except BaseException:
        if paths.root.exists():
            fence.lower()
        raise
    finally:
        fence.leave_locked()


def locked(paths: TenantPaths) -> RestoreMutex | None:
    """The tenant's mutex, None when a run of this machine has it."""
    try:
        return RestoreMutex(paths)
    except LeaseHeld:
        return None
