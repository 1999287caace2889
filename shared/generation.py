"""Generations: the directories a tenant's databases live in, and the one rename that chooses among them.

`prepare` builds the next generation beside the active one, where nobody looks; `activate` moves `current`;
`collect` removes what neither `engram.db` nor `engram.db.bak` names any more. Layout: `shared.tenant`.
"""

from __future__ import annotations

import os
from pathlib import Path

from shared.durable import fsync_path, remove_tree, replace_link
from shared.errors import Permanent
from shared.tenant import TenantPaths


def active(paths: TenantPaths) -> int:
    """The active generation's number; 0 when the tenant has no database on this machine."""
    try:
        return paths.generation()
    except FileNotFoundError:
        return 0


def prepare(paths: TenantPaths, file: Path, *, previous: int, after: int = 0) -> int:
    """Move `file` (checked, closed, fsynced) into a new generation whose `.bak` names `previous`; its number, higher
    than any here and than `after`.

    Invisible until `activate`. A crash leaves a directory that `collect` removes.
    """
    paths.generations.mkdir(parents=True, exist_ok=True, mode=0o700)
    number = max([previous, after, *(_numbers(paths))]) + 1
    directory = paths.generation_dir(number)
    directory.mkdir(mode=0o700)
    os.rename(file, directory / "engram.db")
    if previous:
        os.symlink(f"../{paths.generation_dir(previous).name}/engram.db", directory / "engram.db.bak")
    fsync_path(directory)
    fsync_path(paths.generations)
    link_names(paths)
    fsync_path(paths.root)
    return number


def activate(paths: TenantPaths, number: int) -> None:
    """Make a generation the active one: one rename, durable when this returns."""
    if not (paths.generation_dir(number) / "engram.db").exists():
        raise Permanent(f"tenant {paths.tenant_id}: generation {number} has no database")
    replace_link(paths.current, f"generations/{paths.generation_dir(number).name}")


def link_names(paths: TenantPaths) -> None:
    """Make sure the two public names exist; both go through `current` and never change."""
    for name in (paths.database, paths.backup):
        if not os.path.lexists(name):
            replace_link(name, f"current/{name.name}")
        elif not name.is_symlink():
            raise Permanent(f"tenant {paths.tenant_id}: {name.name} is a plain file, not this product's link")


def collect(paths: TenantPaths, *, keep_previous: int = 1) -> list[int]:
    """Remove old generations; return their numbers. The caller holds the mutex.

    What a public name reaches stays, and so do the newest `keep_previous` that were active before the current one.

    The highest number keeps its directory, emptied: a number given twice would be taken for the generation that
    some process still has open. Without an active generation nothing is removed.
    """
    if not (current := active(paths)):
        return []
    keep = {current}
    for name in (paths.database, paths.backup):
        if name.exists():
            keep.add(int(Path(os.path.realpath(name)).parent.name))
    numbers = _numbers(paths)
    before = [n for n in numbers if n < current and (paths.generation_dir(n) / "engram.db").exists()]
    keep.update(before[len(before) - keep_previous :] if keep_previous < len(before) else before)
    removed = [n for n in numbers if n not in keep]
    for number in removed:
        directory = paths.generation_dir(number)
        if number == numbers[-1]:
            for file in directory.iterdir():
                remove_tree(file) if file.is_dir() else file.unlink(missing_ok=True)
        else:
            remove_tree(directory)
    if removed:
        fsync_path(paths.generations)
    return removed


def fsync_database(file: Path) -> None:
    """fsync a closed database file and its directory; nothing may lie beside it."""
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    fsync_path(file)
    fsync_path(file.parent)


def _numbers(paths: TenantPaths) -> list[int]:
    return sorted(int(p.name) for p in paths.generations.iterdir() if p.name.isdigit())
