"""What the commands of `engram act` share: an action is carried out, and what became of it is shown."""

from __future__ import annotations

import getpass
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.output import note, print_json, print_table

if TYPE_CHECKING:
    from shared.control_plane import ControlPlane
    from shared.playbook.action import Outcome
    from shared.settings import Settings

Reason = Annotated[str, typer.Option(help="Kept with the action; whoever is on call next reads it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check it and say what would change.")]


def run(
    name: str,
    tenant_id: str | None = None,
    *,
    as_json: bool,
    arguments: dict[str, Any] | None = None,
    reason: str = "",
    ttl: float | None = None,
    dry_run: bool = False,
    token: Any = None,
) -> None:
    """Carry one action out and show what became of it. Exit 1 when its effect was looked for and is not there."""
    from shared.playbook.action import Request
    from shared.playbook.perform import perform

    request = Request(
        action=name,
        tenant_id=tenant_id,
        arguments=arguments or {},
        reason=reason,
        dry_run=dry_run,
        ttl_seconds=ttl,
        who=getpass.getuser(),
        door="cli",
        token=token,
    )
    with _control_plane() as (settings, control_plane):
        outcome = perform(settings, control_plane, request)
    _show(outcome, as_json)
    if outcome.verified is False:
        behind = f" by worker {', '.join(map(str, outcome.disobeying))}" if outcome.disobeying else ""
        note(f"engram: done, but its effect is not there{behind}")
        raise typer.Exit(1)


@contextmanager
def _control_plane() -> Iterator[tuple[Settings, ControlPlane | None]]:
    """None where none is configured: an action by a person goes on without its book."""
    from shared.control_plane import ControlPlane

    settings = quiet_settings()
    if not settings.control_plane_url.get_secret_value():
        yield settings, None
        return
    with ControlPlane(settings) as opened:
        yield settings, opened


def quiet_settings() -> Settings:
    """The stack's; only warnings are logged, unless another level was asked for."""
    from deployments.running import running_settings
    from shared import log

    settings = running_settings()
    log.configure(settings.log_level if settings.log_level != "info" else "warning")  # to stderr
    return settings


def _show(done: Outcome, as_json: bool) -> None:
    import msgspec

    if as_json:
        print_json(msgspec.to_builtins(done))
        return
    marks = {True: "ok", False: "BAD", None: "-"}
    if done.findings:
        print_table(("", "checked", "seen", "normal"), [(marks[f.ok], f.name, f.seen, f.normal) for f in done.findings])
    for title, rows in done.tables.items():
        if rows:
            print_table((title, *[""] * (len(rows[0]) - 1)), [])
            print_table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])
    lines: list[tuple[str, Any]] = [("result", done.summary)]
    if done.kind != "read":
        lines += [("target", done.target), ("before", _cell(done.before)), ("after", _cell(done.after))]
    lines += [("until", done.expires_at)] if done.expires_at else []
    lines += [("undo", shlex.join(done.undo))] if done.undo else []
    lines += [("proposed", shlex.join(done.proposal))] if done.proposal else []
    print_table(("", ""), lines)
    if done.dry_run:
        note("nothing was changed: a dry run")
    elif done.kind != "read":
        note(obeyed_by(done.workers) if done.action != "fix-permissions" else f"recorded as {done.action_id}")
    if not done.recorded:
        note("the control plane did not answer: the record is in this machine's file and will be taken over")


def _cell(value: Any) -> str:
    import msgspec

    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def obeyed_by(alive: dict[int, bool]) -> str:
    if not alive:
        return "no gateway runs here"
    return f"obeyed by {sum(alive.values())} of {len(alive)} workers"
