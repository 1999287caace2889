"""`engram act limits …`: the run-time limits of this machine, one by one. What they mean is `shared.limits`'s."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from deployments.cli.output import Json, note, print_json, print_table
from deployments.cli.playbook import DryRun, Reason, obeyed_by, quiet_settings, run

limits = typer.Typer(name="limits", help="The run-time limits of this machine, one by one.", no_args_is_help=True)
LimitName = Annotated[
    str,
    typer.Argument(metavar="LIMIT", help="rate_limit[:TENANT], rate_limit_mode, shed, pool_size, inflight[:TENANT]"),
]


@limits.command()
def show(as_json: Json = False) -> None:
    """What holds now beside the settings, until when and why; and which workers obey it."""
    from shared import limits as core
    from shared import workers

    settings = quiet_settings()
    active, damage = core.standing(settings)
    version = core.version_of(active)
    alive = {pid: obeyed == version for pid, obeyed in workers.announced(settings).items()}
    if as_json:
        rows = {
            name: {"value": e.value, "reason": e.reason, "set_at": _time(e.set_at), "expires_at": _time(e.expires_at)}
            for name, e in active.items()
        }
        print_json({"limits": rows, "workers": alive, "damage": damage or None})
        return
    rows_ = [(name, json.dumps(e.value), _time(e.expires_at), e.reason) for name, e in sorted(active.items())]
    print_table(("limit", "value", "until", "reason"), rows_)
    note(obeyed_by(alive))
    if damage:
        note(f"these are of the copy: {damage}")


@limits.command("set")
def set_(
    name: LimitName,
    value: Annotated[str, typer.Argument(help="64 · enforce · search,list · rps=50,burst=100 · or JSON")],
    ttl: Annotated[float, typer.Option(help="Seconds until it is gone by itself.")],
    reason: Reason,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Set one limit for every worker of this machine."""
    arguments = {"limit": name, "value": parsed(name, value)}
    run("set-limit", arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@limits.command()
def clear(
    name: LimitName,
    reason: Reason = "cleared by hand",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let the settings hold again."""
    run("clear-limit", arguments={"limit": name}, reason=reason, dry_run=dry_run, as_json=as_json)


def parsed(name: str, text: str) -> Any:
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


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
