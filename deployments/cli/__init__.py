"""The command line. One module per concern under `deployments/cli/`; `COMMANDS` lists them.

Every command imports what it needs when it runs, so that `engram --help` stays fast. Results go to stdout, as one
JSON document with `--json`; everything else goes to stderr. `main` is the edge where errors become exit codes:
0 done, 1 failed, 2 usage, 3 refused, 130 interrupted.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_name

from shared.ending import ends_with
from shared.errors import exit_code, leave

# A module of this package, each with `register(app)`.
COMMANDS = (
    "stack",
    "tenants",
    "backup",
    "export",
    "retention",
    "keys",
    "restore",
    "sweep",
    "move",
    "usage",
    "act",
    "config",
    "diagnose",
    "bridge",
    "slo",
    "demo",
)

# How `engram --help` groups the commands: what a person is about to do.
PANELS = {
    "This machine": ("up", "down", "status", "demo", "config"),
    "Tenants": ("tenant", "token", "export", "usage", "move"),
    "Backups and restores": (
        *("backup", "backups", "restore", "restore-undo", "restore-test", "verify", "retention", "keys", "sweep"),
    ),
    "Incidents": ("diagnose", "act", "slo-report"),
    "Books": ("reconcile", "usage-import", "usage-dry-runs"),
    "Single processes, as production runs them": (
        *("serve", "worker", "drain", "litestream", "bridge", "monitor", "migrate"),
    ),
}
_FIRST_CLAUSE = re.compile(r"(.+?)((?<=\?)(?=\s)|(?=[.;:](\s|\Z))|\Z)", re.DOTALL)


class Overview(TyperGroup):
    """All commands in the order and the groups of `PANELS`, each in one line: the first clause of its own help."""

    def __init__(self, *, commands: dict[str, Any], **more: Any) -> None:
        super().__init__(commands=commands, **more)
        for panel, names in PANELS.items():
            for name in set(names) & set(commands):
                commands[name].rich_help_panel = panel
        for command in commands.values():
            clause = _FIRST_CLAUSE.match((command.help or "").strip())
            command.short_help = " ".join(clause[1].split()) if clause else ""

    def list_commands(self, ctx: Any) -> list[str]:
        first = [name for names in PANELS.values() for name in names if name in self.commands]
        return first + [name for name in self.commands if name not in first]


def _before_any() -> None:
    """Nothing: with it, one command is still a command of a group."""


app = typer.Typer(
    name="engram",
    cls=Overview,
    callback=_before_any,
    help="Operations for a hosted memory service: gateway, backups, restores, metering.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script `engram`."""
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").register(app)
    _keep_only(*sys.argv[1:2])
    try:
        with exit_code():
            app(prog_name="engram")
    except SystemExit as e:  # the end of every command: the last clause's class takes longer to import than most take
        if e.code is None or isinstance(e.code, int):
            ends_with(e.code or 0)
        raise
    except ValueError as e:
        leave(_setting_error(e), 2)
    except OSError as e:
        leave(str(e), 1)
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except _lacking_in_schema() as e:
        leave(f"the control plane lacks what this build needs, run `engram migrate`: {str(e).splitlines()[0]}", 1)


def _keep_only(*words: str) -> None:
    """Making all hundred commands is a third of what a run takes to start, which needs the one it names; help,
    completion and mistakes need them all."""
    commands = [
        c
        for c in app.registered_commands
        if (c.name or get_command_name(c.callback.__name__ if c.callback else "")) in words
    ]
    groups = [g for g in app.registered_groups if g.typer_instance and g.typer_instance.info.name in words]
    if commands or groups:
        app.registered_commands, app.registered_groups = commands, groups


def _lacking_in_schema() -> tuple[type[Exception], ...]:
    """What PostgreSQL says of an older schema. (Asked for when there is an error: importing it takes time.)"""
    from psycopg.errors import UndefinedColumn, UndefinedFunction, UndefinedTable

    return UndefinedColumn, UndefinedFunction, UndefinedTable


def _setting_error(e: ValueError) -> str:
    """Every setting that does not validate, without its value. Anything but pydantic's error is a bug: raised again."""
    from pydantic import ValidationError

    if not isinstance(e, ValidationError):
        raise e
    found = []
    for error in e.errors(include_input=False, include_url=False):
        name = "_".join(str(part) for part in error["loc"]).upper()
        name = name if name.startswith(("PREFECT_", "ENGRAM_")) or not name else f"ENGRAM_{name}"
        found.append(f"setting {name}: {error['msg']}" if name else error["msg"].removeprefix("Value error, "))
    return "; ".join(found)
