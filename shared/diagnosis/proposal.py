"""What a diagnosis proposes: an action of the playbook, a run of another deployment, or a person's work."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import msgspec

from shared.receipt import Receipt

_TTL_SECONDS = 3600.0


class Proposal(Receipt, frozen=True):
    """The one thing to do now. `deployment` names the one whose run form does it with `parameters`; None: only the
    command does. `destructive`: it replaces data, so a person starts it; nothing here ever does."""

    action: str
    arguments: Mapping[str, Any]
    command: str
    why: str
    destructive: bool = False
    deployment: str | None = None
    parameters: Mapping[str, Any] = msgspec.field(default_factory=dict)


def act(
    name: str,
    why: str,
    *options: str,
    tenant: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    reads: bool = False,
    ttl: bool = False,
    form: bool = True,
) -> Proposal:
    """An action of the playbook, by `engram act NAME [TENANT] …` and, with `form`, by the `act` deployment."""
    given = dict(arguments or {})
    reason = f"diagnosis: {why}"[:200]
    last = [] if reads else [*(("--ttl", f"{_TTL_SECONDS:g}") if ttl else ()), "--reason", reason]
    parameters = {
        "name": name,
        "tenant_id": tenant,
        "arguments": given,
        "reason": reason,
        "dry_run": False,
        "ttl_seconds": _TTL_SECONDS if ttl else None,
    }
    return Proposal(
        action=name,
        arguments=given | ({"tenant_id": tenant} if tenant else {}),
        command=shlex.join(("engram", "act", name, *([tenant] if tenant else []), *options, *last)),
        why=why,
        deployment="act" if form else None,
        parameters=parameters if form else {},
    )


def run(deployment: str, why: str, *command: str, destructive: bool = False, **parameters: Any) -> Proposal:
    """A run of another deployment."""
    return Proposal(deployment, parameters, shlex.join(("engram", *command)), why, destructive, deployment, parameters)


def by_hand(why: str, *command: str) -> Proposal:
    """Nothing of ours mends it: what a person does, and the command that shows where."""
    return Proposal("by-hand", {}, shlex.join(("engram", *command)), why)
