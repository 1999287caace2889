"""The one way to carry an action out, whichever door it is asked for through.

    check the request → write the row as `begun` (refused: as that) → do it, which verifies its effect → end the row

A process that dies in between leaves the row `begun`: `engram act history` says that nobody knows what became of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from shared import registry
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, EngramError, Refused, UnknownTenant, UnsafeTenantId
from shared.limits import MAX_TTL_SECONDS, BadLimit
from shared.playbook.action import DEFAULT_TTL_SECONDS, MAX_REASON_CHARS, Action, BadRequest, Context, Outcome, Request
from shared.playbook.audit import Book
from shared.playbook.table import ACTIONS
from shared.settings import Settings
from shared.tenant import TenantPaths, check_tenant_id


def perform(settings: Settings, control_plane: ControlPlane | None, request: Request) -> Outcome:
    """Raises `BadRequest` (nonsense; not recorded), `Refused` (not now, or not by you), what the action itself
    raises, and `ControlPlaneUnavailable` for an action without a person whose cap cannot be counted."""
    action, arguments = checked(request)
    if action.ttl and request.ttl_seconds is None:
        request = msgspec.structs.replace(request, ttl_seconds=DEFAULT_TTL_SECONDS)
    book = Book(settings, control_plane)
    row = book.begin(action, request, msgspec.to_builtins(arguments))
    try:
        if request.tenant_id is not None:
            # A control plane that has just not answered is not asked again: somebody is waiting.
            _check_place(settings, control_plane if book.recorded else None, request.tenant_id)
        outcome = action.do(Context(settings, control_plane), request, arguments)
        undo = [str(row.action_id) if word == "ACTION_ID" else word for word in outcome.undo]
        outcome = msgspec.structs.replace(outcome, undo=undo)
        row.end("done", outcome)
    except BaseException as e:
        refused = isinstance(e, Refused | BadRequest | BadLimit | UnknownTenant)
        said = str(e) if isinstance(e, EngramError | OSError) else f"{type(e).__name__}: {e}"
        row.end("refused" if refused else "failed", error=said)
        raise
    finally:
        book.end(row)
    return msgspec.structs.replace(outcome, action_id=str(row.action_id), recorded=book.recorded)


def checked(request: Request) -> tuple[Action, Any]:
    """The action and its arguments as its struct. Raises `BadRequest`; touches nothing."""
    action = ACTIONS.get(request.action)
    if action is None:
        raise BadRequest(f"there is no action {request.action!r:.80}; there are {', '.join(sorted(ACTIONS))}")
    if request.door not in action.doors:
        raise BadRequest(f"{action.name} is not offered here: {', '.join(action.doors)} only")
    if request.tenant_id is None and action.tenant == "required":
        raise BadRequest(f"{action.name} needs a tenant")
    if request.tenant_id is not None:
        if action.tenant == "none":
            raise BadRequest(f"{action.name} is about this machine, not about a tenant")
        try:
            check_tenant_id(request.tenant_id)
        except UnsafeTenantId as e:
            raise BadRequest(str(e)) from e
    if action.kind != "read" and not request.reason.strip():
        raise BadRequest(f"{action.name} needs a reason")
    if len(request.reason) > MAX_REASON_CHARS or not _is_text(request.reason):
        raise BadRequest(f"a reason is text of at most {MAX_REASON_CHARS} characters, and none is NUL")
    if request.ttl_seconds is not None:
        if not action.ttl:
            raise BadRequest(f"{action.name} leaves nothing that would end by itself: give no time")
        if not 0 < request.ttl_seconds <= MAX_TTL_SECONDS:
            raise BadRequest(f"the time must be above 0 and at most {MAX_TTL_SECONDS:.0f} seconds")
    if (request.token is not None) != (action.name == "explain-token"):
        raise BadRequest("explain-token, and nothing else, takes a token")
    return action, _arguments(action, request.arguments)


def _arguments(action: Action, given: Mapping[str, Any]) -> Any:
    try:
        converted = msgspec.convert(dict(given), action.arguments)
        if b"\\u0000" in msgspec.json.encode(converted):
            raise BadRequest(f"{action.name}: no text of an argument may hold NUL")
    except (msgspec.ValidationError, UnicodeEncodeError) as e:
        raise BadRequest(f"{action.name}: {e}") from e
    return converted


def _is_text(text: str) -> bool:
    """Whether PostgreSQL takes it: a terminal may hand over bytes that are no UTF-8."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _check_place(settings: Settings, control_plane: ControlPlane | None, tenant_id: str) -> None:
    """A tenant that exists, on this machine. Without a control plane its directory must do."""
    try:
        if control_plane is not None:
            machine_id = registry.get(control_plane, tenant_id).machine_id
            if machine_id != settings.machine_id:
                raise Refused(
                    f"tenant {tenant_id} is on machine {machine_id}: act there, or through the deployment `act`"
                )
            return
    except ControlPlaneUnavailable:
        pass
    if not os.path.isdir(TenantPaths.of(settings.tenants_dir, tenant_id).root):
        raise UnknownTenant(f"there is no tenant {tenant_id} on this machine")
