"""What an operator may change while the gateway runs: one function an action, whichever door it is called through.

Each takes effect on every worker of this machine (`shared.limits`), ends by itself, can be tried without effect
(`dry_run`) and tells what it did: before, after, how to undo it, when it ends, and which workers obey it by now.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from shared import limits, workers
from shared.errors import Refused
from shared.settings import Settings

OBEYED_SECONDS = 3.0
REFRESH_TTL_SECONDS = 60.0


class Outcome(msgspec.Struct, frozen=True):
    """`before` and `after` are values, None where the settings hold. `undo` is the words of a command, empty when there
    is nothing to undo. `workers` are those alive, and whether each obeys; empty when no gateway runs here."""

    action: str
    limit: str
    before: Any
    after: Any
    undo: list[str]
    expires_at: datetime | None
    dry_run: bool
    workers: dict[int, bool]

    @property
    def disobeying(self) -> list[int]:
        return [pid for pid, obeys in self.workers.items() if not obeys]


def set_limit(
    settings: Settings, name: str, value: object, *, ttl_seconds: float, reason: str, dry_run: bool = False
) -> Outcome:
    """Any limit of `shared.limits`. Raises `Permanent` for what makes no sense, before anything is written."""
    before = limits.active(settings).get(name)
    entry = limits.entry(name, value, ttl_seconds=ttl_seconds, reason=reason)
    if not dry_run:
        limits.put(settings, name, entry)
    return _outcome(settings, "limits set", name, before, entry, dry_run)


def clear_limit(settings: Settings, name: str, *, dry_run: bool = False) -> Outcome:
    """What the settings say holds again. Not set is not an error: the state that was asked for is there."""
    limits.check_name(name)
    before = limits.active(settings).get(name)
    if before is not None and not dry_run:
        limits.clear(settings, name)
    return _outcome(settings, "limits clear", name, before, None, dry_run)


def shed(settings: Settings, classes: Sequence[limits.RouteClass], **how: Any) -> Outcome:
    """Refuse these classes of routes with 503. Refuses to refuse all of them: that is what stopping is for."""
    if set(classes) >= {"search", "list", "write", "get"}:
        raise Refused("shedding every class of routes would be an outage; stop the gateway if that is meant")
    return set_limit(settings, "shed", list(classes), **how)


def limit_rate(settings: Settings, rate: limits.Rate, tenant_id: str | None = None, **how: Any) -> Outcome:
    """How often one tenant, or every tenant, may ask."""
    name = "rate_limit" if tenant_id is None else f"rate_limit:{tenant_id}"
    return set_limit(settings, name, msgspec.to_builtins(rate), **how)


def refresh_jwks(settings: Settings, *, reason: str, dry_run: bool = False) -> Outcome:
    """Every worker fetches the issuer's keys now, and drops the tokens it verified with keys that are gone."""
    done = set_limit(settings, "jwks_refresh", True, ttl_seconds=REFRESH_TTL_SECONDS, reason=reason, dry_run=dry_run)
    return msgspec.structs.replace(done, action="refresh-jwks", before=None, undo=[])


def _outcome(
    settings: Settings, action: str, name: str, before: limits.Entry | None, after: limits.Entry | None, dry_run: bool
) -> Outcome:
    """Waits for the workers, a poll of theirs or two."""
    obeying: dict[int, bool] = {}
    if not dry_run:
        version = limits.version_of(limits.active(settings))
        obeying = dict(workers.wait_until_obeyed(settings, version, OBEYED_SECONDS + settings.limits_poll_seconds))
    return Outcome(
        action=action,
        limit=name,
        before=None if before is None else before.value,
        after=None if after is None else after.value,
        undo=_undo(name, before, after),
        expires_at=None if after is None else datetime.fromtimestamp(after.expires_at, UTC),
        dry_run=dry_run,
        workers=obeying,
    )


def _undo(name: str, before: limits.Entry | None, after: limits.Entry | None) -> list[str]:
    """Back to what held before, for as long as it would have held."""
    if before is None:
        return [] if after is None else ["engram", "act", "limits", "clear", name]
    value = msgspec.json.encode(before.value).decode()
    left = max(1, round(before.expires_at - datetime.now(UTC).timestamp()))
    return ["engram", "act", "limits", "set", name, value, "--ttl", str(left), "--reason", before.reason]
