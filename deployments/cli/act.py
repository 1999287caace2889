"""`engram act …`: what an operator changes while the gateway runs. The actions are `shared.action`'s."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.output import Json, note, print_json, print_table

if TYPE_CHECKING:
    from shared.action import Outcome
    from shared.settings import Settings

act = typer.Typer(name="act", help="Change what a running gateway does, for a while.", no_args_is_help=True)
limits = typer.Typer(name="limits", help="Rates, shedding and pool sizes of this machine.", no_args_is_help=True)
act.add_typer(limits)

Name = Annotated[str, typer.Argument(help="rate_limit, rate_limit:TENANT, rate_limit_mode, shed, pool_size")]
Reason = Annotated[str, typer.Option(help="Kept with the change; whoever is on call next reads it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check it and say what would change.")]


def register(app: typer.Typer) -> None:
    app.add_typer(act)


@limits.command()
def show(as_json: Json = False) -> None:
    """What holds now beside the settings, until when and why; and which workers obey it."""
    from shared import limits as core
    from shared import workers

    settings = _settings()
    active = core.active(settings)
    version = core.version_of(active)
    alive = {pid: obeyed == version for pid, obeyed in workers.announced(settings).items()}
    if as_json:
        rows = {
            name: {"value": e.value, "reason": e.reason, "set_at": _time(e.set_at), "expires_at": _time(e.expires_at)}
            for name, e in active.items()
        }
        print_json({"limits": rows, "workers": alive})
        return
    rows_ = [(name, json.dumps(e.value), _time(e.expires_at), e.reason) for name, e in sorted(active.items())]
    print_table(("limit", "value", "until", "reason"), rows_)
    note(_workers(alive))


@limits.command("set")
def set_(
    name: Name,
    value: Annotated[str, typer.Argument(help="64 · enforce · search,list · rps=50,burst=100 · or JSON")],
    ttl: Annotated[float, typer.Option(help="Seconds until it is gone by itself.")],
    reason: Reason,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Set one limit for every worker of this machine."""
    from shared import action

    settings = _settings()
    given: Any = _value(name, value)
    how: dict[str, Any] = {"ttl_seconds": ttl, "reason": reason, "dry_run": dry_run}
    if name == "shed" and isinstance(given, list):
        _show(action.shed(settings, given, **how), as_json)
    else:
        _show(action.set_limit(settings, name, given, **how), as_json)


@limits.command()
def clear(name: Name, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Let the settings hold again."""
    from shared import action

    _show(action.clear_limit(_settings(), name, dry_run=dry_run), as_json)


@act.command("refresh-jwks")
def refresh_jwks(reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Have every worker fetch the token issuer's keys now."""
    from shared import action

    _show(action.refresh_jwks(_settings(), reason=reason, dry_run=dry_run), as_json)


def _settings() -> Settings:
    from deployments.running import running_settings
    from shared import log

    settings = running_settings()
    log.configure(settings.log_level)  # to stderr
    return settings


def _value(name: str, text: str) -> Any:
    """The friendly forms; anything else is JSON, or the text itself. `shared.limits` judges the result."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    if name == "shed":
        return [word.strip() for word in text.split(",") if word.strip()]
    if name.startswith("rate_limit") and "=" in text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        try:
            return {key.strip(): json.loads(number) for key, _, number in pairs}
        except ValueError:
            raise typer.BadParameter(f"{text!r}: rps=50,burst=100 is understood") from None
    return text


def _show(done: Outcome, as_json: bool) -> None:
    """Fails (exit 1) when a living worker does not obey: the change is written, but not in force everywhere."""
    import msgspec

    if as_json:
        print_json(msgspec.to_builtins(done))
    else:
        lines: list[tuple[str, Any]] = [
            ("limit", done.limit),
            ("before", json.dumps(done.before)),
            ("after", json.dumps(done.after)),
        ]
        lines += [("until", done.expires_at)] if done.expires_at else []
        lines += [("undo", shlex.join(done.undo))] if done.undo else []
        print_table(("", ""), lines)
        note("nothing was changed: a dry run" if done.dry_run else _workers(done.workers))
    if done.disobeying:
        note(f"engram: written, but not obeyed by worker {', '.join(map(str, done.disobeying))}")
        raise typer.Exit(1)


def _workers(alive: dict[int, bool]) -> str:
    if not alive:
        return "no gateway runs here"
    return f"obeyed by {sum(alive.values())} of {len(alive)} workers"


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
