"""Is this tenant's database corrupt, and what would a restore bring back and lose? Proposes; a person confirms.

The check reads the active generation's file on a connection of its own beside the restore fence: a generation is never
written to once another took its place, and a check of seconds must not keep a restore waiting.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from typing import Any

from shared import plan as planning
from shared.engine import schema
from shared.engine.connection import connect
from shared.errors import CorruptDatabase, SchemaTooNew, TenantDatabaseUnavailable, UnknownBackup
from shared.playbook.action import Context, Finding, Outcome, Request
from shared.tenant import TenantPaths

CHECK_SECONDS = 30.0
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # ERROR: its tables are not there


def propose(context: Context, request: Request, _: Any) -> Outcome:
    """Raises `ControlPlaneUnavailable`: without the catalogue nothing can be proposed."""
    settings, tenant_id = context.settings, request.tenant_id
    assert tenant_id is not None  # `perform` refuses a request without one
    verdict, problem = examine(TenantPaths.of(settings.tenants_dir, tenant_id))
    corrupt = verdict == "corrupt"
    findings = [
        Finding("the live database", problem or "whole", "whole", None if verdict == "unknown" else not problem)
    ]
    chosen: planning.Plan | None = None
    if context.control_plane is not None:
        try:
            chosen = planning.plan(settings, context.control_plane, tenant_id)
        except UnknownBackup as e:
            findings.append(Finding("last good backup", str(e), "verified, of the last day", False))
    if chosen is not None and chosen.backup is not None:
        lost = "unknown" if chosen.writes_lost is None else chosen.writes_lost
        findings += [
            Finding("last good backup", f"{chosen.source_at:%F %T} UTC", "verified, of the last day", True),
            Finding("its age (s)", round(chosen.age_seconds), "below 93600", chosen.age_seconds < 93_600),
            Finding("memories in it", chosen.source_memories, "what the tenant had", None),
            Finding("memories changed since, which would be lost", lost, "as few as can be", None),
            Finding("its schema", planning.schema_change(chosen.source_schema_version), "not newer than known", None),
        ]
    if chosen is not None and chosen.note:
        findings.append(Finding("what may be newer", chosen.note, "nothing", False))
    proposal: list[str] = []
    if corrupt and chosen is not None and chosen.backup is not None:
        backup_id = str(chosen.backup.backup_id)
        proposal = ["engram", "restore", tenant_id, "--backup", backup_id, "--reason", "corrupt"]
        summary = f"corrupt: restore the backup of {chosen.source_at:%F %T} UTC (a person starts it)"
    elif corrupt:
        summary = "corrupt, and there is no good backup: engram.db.bak and point in time are what is left to look at"
    elif verdict == "whole":
        summary = "the database is whole: nothing to restore"
    else:
        summary = f"cannot be judged: {problem}"
    return Outcome(
        action=request.action, kind="read", target=tenant_id, summary=summary, findings=findings, proposal=proposal
    )


def examine(paths: TenantPaths) -> tuple[str, str]:
    """(whole | corrupt | unknown, what is wrong). Bit rot in a row's text passes: only a backup's sha256 finds it."""
    file = paths.root / os.path.realpath(paths.database)
    if not file.exists():
        return ("corrupt", "the file is missing") if paths.root.is_dir() else ("unknown", "there is no such directory")
    try:
        with closing(connect(file, readonly=True)) as connection:
            cut = threading.Timer(CHECK_SECONDS, connection.interrupt)
            cut.start()
            try:
                schema.check_identity(connection, paths.tenant_id)
                said = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
                broken = connection.execute("PRAGMA foreign_key_check").fetchone()
            finally:
                cut.cancel()
                cut.join()
    except CorruptDatabase as e:
        code = getattr(e.__cause__, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        return ("corrupt" if code in _CORRUPT else "unknown"), str(e)
    except (TenantDatabaseUnavailable, SchemaTooNew) as e:
        return "unknown", str(e)
    except sqlite3.DatabaseError as e:
        code = getattr(e, "sqlite_errorcode", 0) & 0xFF
        if code in _CORRUPT:
            return "corrupt", str(e)
        interrupted = code == sqlite3.SQLITE_INTERRUPT
        return "unknown", f"the check took longer than {CHECK_SECONDS:g} s" if interrupted else str(e)
    if said != ["ok"]:
        return "corrupt", f"integrity_check: {'; '.join(said)[:200]}"
    return ("corrupt", f"foreign_key_check: table {broken[0]} refers to missing rows") if broken else ("whole", "")
