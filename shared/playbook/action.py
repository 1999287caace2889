"""What an action of the playbook is, how one is asked for, and what it answers.

read          looks, changes nothing; may run by itself
reversible    changes something that can be taken back; by itself only within caps (`autonomy`)
destructive   replaces data; only a person starts it, and none is performed here: `propose-restore` names the
              command and the run form of the `restore` deployment
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from pydantic import SecretStr

from shared.errors import Permanent
from shared.receipt import Receipt

if TYPE_CHECKING:
    from shared.control_plane import ControlPlane
    from shared.settings import Settings

Kind = Literal["read", "reversible", "destructive"]
Door = Literal["cli", "api", "prefect"]
RequestedBy = Literal["person", "automation"]
Name = Literal[
    "jwks-status",
    "explain-token",
    "volume-health",
    "check-permissions",
    "top",
    "propose-restore",
    "refresh-jwks",
    "fix-permissions",
    "restart-tenant",
    "restart-workers",
    "set-rate-limit",
    "cap-pool",
    "shed",
    "set-limit",
    "clear-limit",
]
DEFAULT_TTL_SECONDS = 3600.0
MAX_REASON_CHARS = 500


class BadRequest(Permanent):
    """The request for an action makes no sense: no such action, wrong arguments, no reason. Nothing was done."""

    exit_code = 2


class Request(Receipt, frozen=True):
    """`arguments` are checked against the action's own (`Action.arguments`). `ttl_seconds` None is the default of
    actions that end by themselves. `who` is a name for people: an operating system user, a token's tenant, a flow run.
    `token` is only for `explain-token` and is never written anywhere."""

    action: str
    tenant_id: str | None = None
    arguments: Mapping[str, Any] = msgspec.field(default_factory=dict)
    reason: str = ""
    dry_run: bool = False
    ttl_seconds: float | None = None
    requested_by: RequestedBy = "person"
    who: str = ""
    door: Door = "cli"
    token: SecretStr | None = None
    flow_run_id: str | None = None


class Finding(Receipt, frozen=True):
    """One thing that was looked at. `ok` None: it could not be judged."""

    name: str
    seen: Any
    normal: str
    ok: bool | None


class Outcome(Receipt, frozen=True):
    """What an action did, or in a dry run would do.

    `before` and `after` are the state that was changed; None where the settings hold, or nothing is changed. `undo`
    is the words of a command, empty when there is nothing to undo. `verified`: the effect was looked for and is there
    (True), is not (False), or could not be looked for (None: a dry run, no gateway runs here). `workers` are the
    gateway workers alive and whether each obeys. `findings` and `tables` are what a reading action saw; `proposal` is
    the words of the command it proposes. `recorded` False: the audit table did not answer; a local file has the row.
    """

    action: str
    kind: Kind
    target: str
    summary: str
    before: Any = None
    after: Any = None
    undo: list[str] = msgspec.field(default_factory=list)
    expires_at: datetime | None = None
    dry_run: bool = False
    verified: bool | None = None
    workers: dict[int, bool] = msgspec.field(default_factory=dict)
    findings: list[Finding] = msgspec.field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = msgspec.field(default_factory=dict)
    proposal: list[str] = msgspec.field(default_factory=list)
    action_id: str = ""
    recorded: bool = True

    @property
    def disobeying(self) -> list[int]:
        return [pid for pid, obeys in self.workers.items() if not obeys]


class Context(Receipt, frozen=True):
    """What an implementation may reach for. `control_plane` is None where none is configured."""

    settings: Settings
    control_plane: ControlPlane | None


class Action(Receipt, frozen=True):
    """One row of the playbook. `arguments` is a struct of what it takes beside tenant and reason; `ttl` whether it
    ends by itself. `do` gets the request with its arguments checked (the struct, as its third parameter)."""

    name: str
    kind: Kind
    about: str
    do: Callable[[Context, Request, Any], Outcome]
    arguments: type[msgspec.Struct]
    tenant: Literal["none", "optional", "required"] = "none"
    ttl: bool = False
    doors: tuple[Door, ...] = ("cli", "api", "prefect")
