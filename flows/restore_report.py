"""What an operator reads of a restore or an undo: the plan, the result, or the cause."""

from typing import Any

from flows import artifact
from shared.catalogue import Backup
from shared.plan import Plan, schema_change
from shared.restore import Released, Staged

_WORDS = {"restore": "Restore", "undo": "Undo of the last restore"}


def planned(chosen: Plan) -> dict[str, Any]:
    sentence = f"Dry run: nothing was changed; {chosen.writes_lost or 0} live writes would be lost"
    if chosen.live_error is not None:
        sentence = "Dry run: nothing was changed; the live database cannot be read"
    _report(chosen, f"Plan: {_WORDS[chosen.kind].lower()} of {chosen.tenant_id}", sentence, {})
    return {"tenant_id": chosen.tenant_id, "backup_id": _backup_id(chosen), "outcome": "dry_run"}


def done(chosen: Plan, staged: Staged, released: Released, safety: Backup | None) -> dict[str, Any]:
    _report(
        chosen,
        f"{_WORDS[chosen.kind]}: {chosen.tenant_id}",
        f"Back to {artifact.cell(chosen.source_at)}; writes were held for {released.locked_ms:.1f} ms"
        + (f". {chosen.note}" if chosen.note else ""),
        {
            "outcome": released.outcome,
            "writes held for ms": released.locked_ms,
            "active generation": released.generation,
            "stored schema": f"v{staged.migrated_from}",
            "safety backup": safety.backup_id if safety else "none",
            "previous database": released.previous,
        },
    )
    return {
        "restore_id": str(released.restore_id),
        "tenant_id": released.tenant_id,
        "backup_id": _backup_id(chosen),
        "outcome": released.outcome,
        "locked_ms": released.locked_ms,
        "previous": str(released.previous) if released.previous else None,
    }


def failed(chosen: Plan, error: BaseException) -> None:
    title = f"{_WORDS[chosen.kind]} of {chosen.tenant_id} failed"
    _report(chosen, title, f"{type(error).__name__}: {error}", {})


def _report(chosen: Plan, title: str, sentence: str, more: dict[str, Any]) -> None:
    fallback = chosen.copy is not None
    live = chosen.live_memories if chosen.live_error is None else f"unreadable: {chosen.live_error}"
    artifact.report(
        artifact.key(chosen.kind, chosen.tenant_id),
        title,
        sentence,
        {
            "tenant": chosen.tenant_id,
            "from": chosen.source,
            "but": chosen.note,
            "in its place, should it fail": f"backup {chosen.backup.backup_id}" if fallback and chosen.backup else None,
            "state of": chosen.source_at,
            "age in seconds": chosen.age_seconds,
            "size in bytes": chosen.size_bytes,
            "sha256": chosen.backup.sha256 if chosen.backup and not fallback else None,
            "schema": schema_change(chosen.source_schema_version),
            "memories in it": chosen.source_memories,
            "memories in the live database": live,
            "live writes younger than it": chosen.writes_lost,
            "usual window in ms": chosen.window_ms,
            **more,
        },
    )


def _backup_id(chosen: Plan) -> str | None:
    return str(chosen.backup.backup_id) if chosen.backup and chosen.copy is None else None
