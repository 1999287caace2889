"""Owner and mode of a tenant's directory and everything in it: looked at, and brought back to what they must be.

    owner        that of the tenants' directory, which is whoever the gateway runs as
    directory    rwx for the owner; nothing at all for others at the top, no writing by others further down
    file         rw for the owner, no writing by others

Nothing outside of the directory is ever touched (`shared.playbook.file_tree`): links are neither followed nor changed,
and a file with a second name (a hard link) is left alone, for that name may be anywhere.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Meta

from shared.engine.database import TenantDatabase
from shared.errors import CorruptDatabase, EngramError, InMaintenance, Permanent, Refused
from shared.playbook.action import BadRequest, Context, Finding, Outcome, Request
from shared.playbook.file_tree import Entry, reach, walk
from shared.settings import Settings
from shared.tenant import TenantPaths

MAX_ROUNDS = 5  # a directory that could not be read hides what is below it until it is fixed
_LISTED = 100


class FixPermissions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`put_back`: the id of an earlier fix, whose changes are taken back."""

    put_back: Annotated[str, Meta(min_length=36, max_length=36)] | None = None


class NotPermitted(Permanent):
    """This process may not change the owner or mode of a file."""


class Change(msgspec.Struct, frozen=True):
    path: str
    uid: int
    gid: int
    mode: str

    @classmethod
    def of(cls, path: str, uid: int, gid: int, mode: int) -> Change:
        return cls(path, uid, gid, f"{mode:04o}")


def check(context: Context, request: Request, _: Any) -> Outcome:
    """What `fix-permissions` would change, and whether the database can be read and written now."""
    paths, entries, owner = _seen(context.settings, request)
    wrong = _wrong(entries, owner)
    works = _works(paths)
    left_alone = _left_alone(entries)
    findings = [
        Finding("wrong owner or mode", len(wrong), "0", not wrong),
        Finding("left alone (second names, foreign types)", len(left_alone), "0", not left_alone),
        Finding("the database can be read and written", works or "yes", "yes", not works),
    ]
    table = [
        {"path": e.path, "owner": f"{e.uid}:{e.gid}", "mode": f"{e.mode:04o}", "wanted": _wanted_words(e, owner)}
        for e in wrong
    ]
    alone = [{"path": e.path, "type": e.type, "links": e.links} for e in left_alone]
    return Outcome(
        action=request.action,
        kind="read",
        target=str(paths.root),
        summary=f"{len(wrong)} of {len(entries)} entries have the wrong owner or mode"
        + (f"; {works}" if works else "; the database can be read and written"),
        findings=findings,
        tables={"wrong": table[:_LISTED]} | ({"left alone": alone[:_LISTED]} if alone else {}),
        proposal=["engram", "act", "fix-permissions", paths.tenant_id, "--reason", "wrong permissions"]
        if wrong
        else [],
    )


def fix(context: Context, request: Request, arguments: FixPermissions) -> Outcome:
    """Change what is wrong and look again. It does not end by itself: what it repairs should stay repaired. Its row in
    the book has what was before, and `--put-back` brings that back."""
    paths, entries, owner = _seen(context.settings, request)
    wanted = None if arguments.put_back is None else _earlier(context, request, arguments.put_back)
    before: list[Change] = []
    after: list[Change] = []
    for _ in range(MAX_ROUNDS):
        changes = _changes(entries, owner, wanted)
        before += [Change.of(e.path, e.uid, e.gid, e.mode) for e, *_ in changes]
        after += [Change.of(e.path, *to) for e, *to in changes]
        if request.dry_run or not changes or _apply(paths, changes) == 0:
            break
        entries = list(walk(paths))
    verified: bool | None = None
    trouble = ""
    if not request.dry_run:
        left = _changes(entries, owner, wanted)
        trouble = f"{len(left)} entries, the first is {left[0][0].path}" if left else ""
        if not trouble and wanted is None:
            trouble = _works(paths)
        verified = not trouble
    undo: list[str] = []
    if after and not request.dry_run:
        undo = ["engram", "act", "fix-permissions", paths.tenant_id, "--put-back", "ACTION_ID", "--reason", "undo"]
    would = "would change" if request.dry_run else "changed"
    return Outcome(
        action=request.action,
        kind="reversible",
        target=str(paths.root),
        summary=f"{would} {len(after)} of {len(entries)} entries" + (f"; still wrong: {trouble}" if trouble else ""),
        before=before,
        after=after,
        undo=undo,
        dry_run=request.dry_run,
        verified=verified,
    )


def _changes(
    entries: list[Entry], owner: tuple[int, int], wanted: dict[str, tuple[int, int, int]] | None
) -> list[tuple[Entry, int, int, int]]:
    """Who must become what: as every entry must be, or as `wanted` says of some."""
    if wanted is None:
        return [(e, *_wanted(e, owner)) for e in _wrong(entries, owner)]
    ours = [(e, *wanted[e.path]) for e in entries if e.path in wanted and _is_ours(e)]
    return [change for change in ours if (change[0].uid, change[0].gid, change[0].mode) != change[1:]]


def _seen(settings: Settings, request: Request) -> tuple[TenantPaths, list[Entry], tuple[int, int]]:
    assert request.tenant_id is not None  # `perform` refuses a request without one
    paths = TenantPaths.of(settings.tenants_dir, request.tenant_id)
    top = os.stat(settings.tenants_dir)
    return paths, list(walk(paths)), (top.st_uid, top.st_gid)


def _wanted(entry: Entry, owner: tuple[int, int]) -> tuple[int, int, int]:
    """The owner, group and mode this entry must have."""
    if entry.path == ".":
        return *owner, 0o700
    mode = entry.mode & 0o755 | (0o700 if entry.type == "directory" else 0o600)
    return *owner, mode


def _wanted_words(entry: Entry, owner: tuple[int, int]) -> str:
    uid, gid, mode = _wanted(entry, owner)
    return f"{uid}:{gid} {mode:04o}"


def _wrong(entries: list[Entry], owner: tuple[int, int]) -> list[Entry]:
    return [e for e in entries if _is_ours(e) and (e.uid, e.gid, e.mode) != _wanted(e, owner)]


def _left_alone(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if e.type != "link" and not _is_ours(e)]


def _is_ours(entry: Entry) -> bool:
    return entry.type == "directory" or (entry.type == "file" and entry.links == 1)


def _apply(paths: TenantPaths, changes: list[tuple[Entry, int, int, int]]) -> int:
    """How many were made. Each entry is reached again and must be the one that was seen."""
    done = 0
    for entry, uid, gid, mode in changes:
        fd = reach(paths, entry)
        if fd is None:
            continue
        try:
            # By its own name, which leads to it alone: fchown and fchmod refuse an `O_PATH` descriptor.
            name = f"/proc/self/fd/{fd}"
            if (entry.uid, entry.gid) != (uid, gid):
                os.chown(name, uid, gid)
            os.chmod(name, mode)
            done += 1
        except PermissionError as e:
            raise NotPermitted(f"{entry.path}: {e.strerror}; run this as its owner or as root") from e
        finally:
            os.close(fd)
    return done


def _works(paths: TenantPaths) -> str:
    """Empty when the database can be read and a transaction begun; else why not."""
    try:
        with closing(TenantDatabase(paths, busy_timeout_seconds=2.0, lock_wait_seconds=2.0)) as database:
            with database.read() as connection:
                connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            with database.write():
                return ""
    except InMaintenance:
        return ""  # a restore holds it, which is not a matter of permissions
    except CorruptDatabase as e:
        return f"{e}; see propose-restore"
    except (EngramError, sqlite3.DatabaseError) as e:
        return str(e)


def _earlier(context: Context, request: Request, action_id: str) -> dict[str, tuple[int, int, int]]:
    """What an earlier fix of this tenant found before it changed it, by path."""
    try:
        wanted = UUID(action_id)
    except ValueError:
        raise BadRequest(f"{action_id!r:.60} is not the id of an action") from None
    if context.control_plane is None:
        raise Refused("without the control plane there is no book of earlier actions")
    row = context.control_plane.row("action_get", action_id=wanted)
    if row is None or row["action"] != "fix-permissions" or row["tenant_id"] != request.tenant_id:
        raise BadRequest(f"there is no fix-permissions of {request.tenant_id} with the id {action_id}")
    if row["machine_id"] != context.settings.machine_id or not row["before"]:
        raise Refused(f"action {action_id} changed nothing on this machine")
    changes = msgspec.convert(row["before"], list[Change])
    return {change.path: (change.uid, change.gid, int(change.mode, 8)) for change in changes}
