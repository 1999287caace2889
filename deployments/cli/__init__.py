"""The command line. One module per concern under `deployments/cli/`; `COMMANDS` lists them.

Every command imports what it needs when it runs, so that `engram --help` stays fast. Results go to stdout, as one
JSON document with `--json`; everything else goes to stderr. `main` is the edge where errors become exit codes:
0 done, 1 failed, 2 usage, 3 refused, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys

import typer

from shared.errors import EngramError

# A module of this package, each with `register(app)`.
COMMANDS = (
    "stack",
    "tenants",
    "backup",
    "export",
    "retention",
    "keys",
    "restore",
    "usage",
    "act",
    "config",
    "diagnose",
    "bridge",
    "slo",
    "demo",
)

app = typer.Typer(
    name="engram",
    help="Operations for a hosted memory service: gateway, backups, restores, metering.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script `engram`."""
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").register(app)
    try:
        app(prog_name="engram")
    except EngramError as e:
        _fail(str(e), e.exit_code)
    except ValueError as e:
        _fail(_setting_error(e), 2)
    except OSError as e:
        _fail(str(e), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


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


def _fail(message: str, exit_code: int) -> None:
    print(f"engram: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(exit_code)
