"""`engram act …`: the incident playbook from a terminal. What the actions do is `shared.playbook`'s."""

from __future__ import annotations

import getpass
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.output import Json, note, print_json, print_table

if TYPE_CHECKING:
    from shared.control_plane import ControlPlane
    from shared.playbook.action import Outcome
    from shared.settings import Settings

LOOK, CHANGE, AFTERWARDS = "Look (changes nothing)", "Change (reversible, recorded)", "Afterwards"
act = typer.Typer(
    name="act",
    help="The incident playbook: look, then change what a running gateway does. Every action is recorded with its"
    " reason (`engram act history`), says how to undo it, and can be tried with --dry-run. A restore is not here: only"
    " a person starts one, with `engram restore` or the form of that deployment.",
    no_args_is_help=True,
)
limits = typer.Typer(name="limits", help="The run-time limits of this machine, one by one.", no_args_is_help=True)
act.add_typer(limits, rich_help_panel=CHANGE)

LimitName = Annotated[
    str,
    typer.Argument(metavar="LIMIT", help="rate_limit[:TENANT], rate_limit_mode, shed, pool_size, inflight[:TENANT]"),
]
Tenant = Annotated[str, typer.Argument(metavar="TENANT")]
MaybeTenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="None: of the whole machine.")]
Reason = Annotated[str, typer.Option(help="Kept with the action; whoever is on call next reads it.")]
Ttl = Annotated[float, typer.Option(help="Seconds until it is gone by itself.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check it and say what would change.")]
Rps = Annotated[float | None, typer.Option(help="Requests a second.")]


def register(app: typer.Typer) -> None:
    app.add_typer(act)


@act.command("top", rich_help_panel=LOOK)
def top(
    seconds: Annotated[float, typer.Option(help="To watch the routes for; 0: since the gateway's start.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Top routes and tenants by p95, rate and errors."""
    _run("top", as_json=as_json, arguments={"seconds": seconds})


@act.command("jwks-status", rich_help_panel=LOOK)
def jwks_status(as_json: Json = False) -> None:
    """The token issuer's keys now, against those each worker holds."""
    _run("jwks-status", as_json=as_json)


@act.command("explain-token", rich_help_panel=LOOK)
def explain_token(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="With the token in it; - is stdin.")] = Path("-"),
    as_json: Json = False,
) -> None:
    """Which check does this token fail? It is never shown, logged or stored."""
    from pydantic import SecretStr

    if str(file) == "-" and sys.stdin.isatty():
        note("paste the token, then Ctrl-D")
    raw = sys.stdin.read(65_536) if str(file) == "-" else file.read_text()[:65_536]
    if not raw.strip():
        raise typer.BadParameter("there is no token in it")
    _run("explain-token", as_json=as_json, token=SecretStr(raw.strip()))


@act.command("volume-health", rich_help_panel=LOOK)
def volume_health(tenant_id: MaybeTenant = None, as_json: Json = False) -> None:
    """Space, inodes, read-only, write and fsync time, WAL sizes."""
    _run("volume-health", tenant_id, as_json=as_json)


@act.command("check-permissions", rich_help_panel=LOOK)
def check_permissions(tenant_id: Tenant, as_json: Json = False) -> None:
    """Owner and mode of a tenant's directory and files; can its database be read and written?"""
    _run("check-permissions", tenant_id, as_json=as_json)


@act.command("propose-restore", rich_help_panel=LOOK)
def propose_restore(tenant_id: Tenant, as_json: Json = False) -> None:
    """Is the database corrupt; which backup would come back, what would be lost? Proposes only."""
    _run("propose-restore", tenant_id, as_json=as_json)


@act.command("refresh-jwks", rich_help_panel=CHANGE)
def refresh_jwks(reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Have every worker fetch the token issuer's keys now."""
    _run("refresh-jwks", reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("fix-permissions", rich_help_panel=CHANGE)
def fix_permissions(
    tenant_id: Tenant,
    reason: Reason,
    put_back: Annotated[
        str | None, typer.Option(metavar="ACTION_ID", help="Take an earlier fix back; from `engram act history`.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Bring owner and mode of a tenant's directory and files back."""
    arguments = {} if put_back is None else {"put_back": put_back}
    _run("fix-permissions", tenant_id, arguments=arguments, reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("restart-tenant", rich_help_panel=CHANGE)
def restart_tenant(tenant_id: Tenant, reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Close and reopen one tenant's database in every worker."""
    _run("restart-tenant", tenant_id, reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("restart-workers", rich_help_panel=CHANGE)
def restart_workers(reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Replace the gateway's workers one after the other, each by one that serves already."""
    _run("restart-workers", reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("set-rate-limit", rich_help_panel=CHANGE)
def set_rate_limit(
    reason: Reason,
    tenant_id: MaybeTenant = None,
    rps: Rps = None,
    burst: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    read_rps: Rps = None,
    write_rps: Rps = None,
    search_rps: Rps = None,
    ttl: Ttl = 3600,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Reduce the burst or tighten the rate of one tenant, or of each. What is not given stays."""
    given = {"rps": rps, "burst": burst, "read_rps": read_rps, "write_rps": write_rps, "search_rps": search_rps}
    arguments = {name: value for name, value in given.items() if value is not None}
    _run("set-rate-limit", tenant_id, arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@act.command("cap-pool", rich_help_panel=CHANGE)
def cap_pool(
    reason: Reason,
    tenant_id: MaybeTenant = None,
    in_flight: Annotated[int | None, typer.Option(help="Of a tenant's requests at work at once, a worker.")] = None,
    open_databases: Annotated[int | None, typer.Option(help="That a worker keeps open.")] = None,
    ttl: Ttl = 3600,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Cap one tenant's requests at work, or each tenant's, or the open databases."""
    given = {"in_flight": in_flight, "open_databases": open_databases}
    arguments = {name: value for name, value in given.items() if value is not None}
    _run("cap-pool", tenant_id, arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@act.command("shed", rich_help_panel=CHANGE)
def shed(
    classes: Annotated[str, typer.Argument(metavar="CLASSES", help="Of search,list,write,get; never all.")],
    reason: Reason,
    ttl: Ttl = 600,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Refuse expensive classes of routes with 503."""
    _run(
        "shed", arguments={"classes": _value("shed", classes)}, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json
    )


@act.command("history", rich_help_panel=AFTERWARDS)
def history(
    tenant_id: Annotated[str | None, typer.Option("--tenant", metavar="TENANT")] = None,
    action: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """What was done, by whom, why, and what became of it. Newest first."""
    from deployments.cli import beside
    from shared.playbook import audit

    with beside.control_plane() as (_, control_plane):
        rows = audit.history(control_plane, tenant_id=tenant_id, action=action, limit=limit)
    if as_json:
        print_json(rows)
        return
    print_table(
        ("begun", "action", "tenant", "by", "state", "reason", "id"),
        [
            (
                f"{row['begun_at']:%m-%d %H:%M:%S}",
                row["action"] + (" (dry run)" if row["dry_run"] else ""),
                row["tenant_id"] or "",
                f"{row['who']} ({row['door']}{', by itself' if row['requested_by'] == 'automation' else ''})",
                _became(row),
                row["reason"],
                row["action_id"],
            )
            for row in rows
        ],
    )


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
    name: LimitName,
    value: Annotated[str, typer.Argument(help="64 · enforce · search,list · rps=50,burst=100 · or JSON")],
    ttl: Annotated[float, typer.Option(help="Seconds until it is gone by itself.")],
    reason: Reason,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Set one limit for every worker of this machine."""
    arguments = {"limit": name, "value": _value(name, value)}
    _run("set-limit", arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@limits.command()
def clear(
    name: LimitName,
    reason: Reason = "cleared by hand",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Let the settings hold again."""
    _run("clear-limit", arguments={"limit": name}, reason=reason, dry_run=dry_run, as_json=as_json)


def _run(
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

    settings = _settings()
    if not settings.control_plane_url.get_secret_value():
        yield settings, None
        return
    with ControlPlane(settings) as opened:
        yield settings, opened


def _settings() -> Settings:
    from deployments.running import running_settings
    from shared import log

    settings = running_settings()
    log.configure(settings.log_level if settings.log_level != "info" else "warning")  # to stderr
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
        note(_workers(done.workers) if done.action != "fix-permissions" else f"recorded as {done.action_id}")
    if not done.recorded:
        note("the control plane did not answer: the record is in this machine's file and will be taken over")


def _cell(value: Any) -> str:
    import msgspec

    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _became(row: dict[str, Any]) -> str:
    if row["interrupted"]:
        return "INTERRUPTED: nobody knows whether it took effect"
    if row["error"]:
        return f"{row['state']}: {row['error']}"
    return f"{row['state']}, effect not there" if row["verified"] is False else str(row["state"])


def _workers(alive: dict[int, bool]) -> str:
    if not alive:
        return "no gateway runs here"
    return f"obeyed by {sum(alive.values())} of {len(alive)} workers"


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
