"""The book of actions: the table `actions`, and a file of this machine for when PostgreSQL is away.

A row is written as `begun` before anything is done and ended afterwards. When the control plane does not answer, a
person's action goes on all the same (an outage of PostgreSQL is no reason why load may not be shed) and its row goes
to `{data_dir}/actions/unrecorded.jsonl`, fsynced; the next action that reaches PostgreSQL takes the rows over. An
action without a person is not done then: its cap cannot be counted.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from shared.control_plane import ControlPlane, rows
from shared.errors import ControlPlaneUnavailable, Refused
from shared.ids import new_id
from shared.log import get_logger
from shared.playbook import autonomy
from shared.playbook.action import Action, Outcome, Request
from shared.playbook.autonomy import Caps
from shared.settings import Settings

State = Literal["begun", "done", "failed", "refused"]
MAX_ERROR_CHARS = 2_000
_LOCK = 0x616374696F6E  # "action"
_TOKEN = re.compile(r"eyJ[\w-]{8,}\.[\w-]+\.?[\w-]*")
_JSON_COLUMNS = ("arguments", "before", "after", "undo")
log = get_logger("playbook")


class Row(msgspec.Struct):
    """One row of `actions`, column by column."""

    action_id: UUID
    action: str
    kind: str
    tenant_id: str | None
    machine_id: str
    door: str
    requested_by: str
    who: str
    reason: str
    arguments: dict[str, Any]
    ttl_seconds: float | None
    dry_run: bool
    flow_run_id: str | None
    begun_at: datetime
    state: State = "begun"
    verified: bool | None = None
    before: Any = None
    after: Any = None
    undo: Any = None
    expires_at: datetime | None = None
    error: str | None = None
    finished_at: datetime | None = None

    def end(self, state: State, outcome: Outcome | None = None, error: str | None = None) -> None:
        self.state, self.finished_at = state, datetime.now(UTC)
        self.error = None if error is None else without_tokens(error)[:MAX_ERROR_CHARS]
        if outcome is not None:
            self.verified, self.undo, self.expires_at = outcome.verified, outcome.undo or None, outcome.expires_at
            self.before, self.after = msgspec.to_builtins(outcome.before), msgspec.to_builtins(outcome.after)


def without_tokens(text: str) -> str:
    """A token that somebody pasted where it does not belong is not kept, nor is what PostgreSQL takes for no text."""
    return _TOKEN.sub("[redacted]", text).replace("\0", "").encode("utf-8", "replace").decode()


class Book:
    """Where rows go. `recorded` is False once one had to go to the file."""

    def __init__(self, settings: Settings, control_plane: ControlPlane | None) -> None:
        self._settings = settings
        self._control_plane = control_plane
        self.recorded = True

    def begin(self, action: Action, request: Request, arguments: dict[str, Any]) -> Row:
        """The row, written. Raises `Refused` when this may not be done without a person; that is written too."""
        row = Row(
            action_id=new_id(),
            action=action.name,
            kind=action.kind,
            tenant_id=request.tenant_id,
            machine_id=self._settings.machine_id,
            door=request.door,
            requested_by=request.requested_by,
            who=without_tokens(request.who)[:100],
            reason=without_tokens(request.reason.strip()),
            arguments=arguments,
            ttl_seconds=request.ttl_seconds,
            dry_run=request.dry_run,
            flow_run_id=request.flow_run_id,
            begun_at=datetime.now(UTC),
        )
        how: dict[str, Any] = {"dry_run": request.dry_run}
        counted = autonomy.is_counted(action.kind, request.requested_by, **how)
        caps = Caps(self._settings.automation, self._settings.automation_actions_per_hour)
        refused: str | None = None
        try:
            if self._control_plane is None:
                raise ControlPlaneUnavailable("no control plane is configured")
            self._take_over(self._control_plane)
            with self._control_plane.transaction() as connection:
                count = 0
                if counted:
                    rows(connection, "actions_lock", lock=_LOCK)
                    count = rows(connection, "actions_by_themselves")[0]["actions"]
                refused = autonomy.refusal(action.kind, request.requested_by, caps=caps, in_last_hour=count, **how)
                if refused is not None:
                    row.end("refused", error=refused)
                rows(connection, "action_put", **_columns(row))
        except ControlPlaneUnavailable as e:
            if counted:
                raise
            refused = autonomy.refusal(action.kind, request.requested_by, caps=caps, in_last_hour=0, **how)
            if refused is not None and row.state == "begun":
                row.end("refused", error=refused)
            self._keep(row, e)
        if refused is not None:
            raise Refused(refused)
        return row

    def end(self, row: Row) -> None:
        """Write how it ended. Never raises for a control plane that is away."""
        log.info(
            "action",
            action=row.action,
            action_id=str(row.action_id),
            tenant_id=row.tenant_id,
            door=row.door,
            requested_by=row.requested_by,
            who=row.who,
            dry_run=row.dry_run,
            state=row.state,
            verified=row.verified,
            cause=row.error,
        )
        try:
            if self._control_plane is None or not self.recorded:
                raise ControlPlaneUnavailable("the row's beginning is in the file")
            self._control_plane.execute("action_put", **_columns(row))
        except ControlPlaneUnavailable as e:
            self._keep(row, e)

    def _keep(self, row: Row, cause: Exception) -> None:
        self.recorded = False
        log.warning("action_unrecorded", action=row.action, action_id=str(row.action_id), cause=str(cause)[:300])
        with _file(self._settings, create=True) as fd:
            assert fd is not None
            os.lseek(fd, 0, os.SEEK_END)
            os.write(fd, msgspec.json.encode(row) + b"\n")
            os.fsync(fd)

    def _take_over(self, control_plane: ControlPlane) -> None:
        """Rows of the file into the table. Ended rows stay as they are, so doing it twice changes nothing."""
        with _file(self._settings, create=False) as fd:
            if fd is None:
                return
            lines = os.pread(fd, os.fstat(fd).st_size, 0).splitlines()
            if not lines:
                return
            with control_plane.transaction() as connection:
                for line in lines:
                    try:
                        row = msgspec.json.decode(line, type=Row)
                    except (msgspec.MsgspecError, UnicodeDecodeError):  # cut by a full disk
                        log.error("action_row_damaged", bytes=len(line))
                        continue
                    rows(connection, "action_put", **_columns(row))
            os.ftruncate(fd, 0)
            log.info("actions_taken_over", rows=len(lines))


def history(
    control_plane: ControlPlane, *, tenant_id: str | None = None, action: str | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """Newest first; `interrupted` are those that began and never ended."""
    return control_plane.rows("action_history", tenant_id=tenant_id, action=action, limit=limit)


def _columns(row: Row) -> dict[str, Any]:
    found = {name: getattr(row, name) for name in Row.__struct_fields__}
    return found | {name: None if found[name] is None else Jsonb(found[name]) for name in _JSON_COLUMNS}


def file_of(settings: Settings) -> Path:
    return settings.data_dir / "actions" / "unrecorded.jsonl"


@contextmanager
def _file(settings: Settings, *, create: bool) -> Iterator[int | None]:
    """The file, locked; None when there is none and none is made."""
    path = file_of(settings)
    if create:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)
