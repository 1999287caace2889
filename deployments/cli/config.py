"""`engram config check | diff | show`: what this environment runs with, what is unsafe in it, what differs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.output import Json, print_json, print_table
from shared import environment

if TYPE_CHECKING:
    from pydantic import ValidationError

    from shared.safety import Finding
    from shared.settings import Settings

config = typer.Typer(name="config", help="What an environment runs with, and whether it may.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(config)


@config.command()
def check(as_json: Json = False) -> None:
    """Name every unsafe value of this environment (ENGRAM_ENV) at once. Exit code 3 if there is one."""
    from shared.errors import Permanent, Refused
    from shared.safety import Finding, unsafe
    from shared.settings import variable

    settings, found = _readable()
    named = " ".join(f.name for f in found).split()
    found += unsafe(settings, {name for name in type(settings).model_fields if variable(name) in named})
    try:
        _load_certificate(settings)
    except Permanent as e:
        name, _, what = str(e).partition(": ")
        found.append(Finding(name, what, "the gateway would not start", "a pair that fits"))
    if as_json:
        print_json({"environment": settings.env, "safe": not found, "unsafe": [f._asdict() for f in found]})
    elif found:
        print_table(("name", "value", "why", "want"), [(f.name, f.value or "not set", f.why, f.want) for f in found])
    else:
        typer.echo(f"{settings.env}: nothing to object to")
    if found:
        names = dict.fromkeys(f.name for f in found)
        verdict = "would not start" if settings.env == "dev" else "is not safe to start"
        raise Refused(f"{settings.env} {verdict}, {len(found)} to mend: {', '.join(names)}")


@config.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="[A]", help="An environment: dev, staging or prod.")] = "",
    b: Annotated[str, typer.Argument(metavar="[B]", help="Another one.")] = "",
    as_json: Json = False,
) -> None:
    """What differs: between the value files of A and B, of A and the defaults, or (no A) here from the defaults."""
    from shared.settings import Settings, variable

    for name in filter(None, (a, b)):
        if name not in environment.ENVIRONMENTS:
            raise typer.BadParameter(f"{name} is no environment: choose from {', '.join(environment.ENVIRONMENTS)}")
    rows: list[tuple[str, ...]]
    if a:
        columns: tuple[str, ...] = ("name", a, b or "default")
        left, right = _values(_of_file(a)), _values(_of_file(b)) if b else _defaults()
        rows = [(variable(n), left[n], right[n]) for n in left if left[n] != right[n]]
    else:
        here = Settings()
        columns = ("name", "default", here.env, "from")
        left, right = _defaults(), _values(here)
        rows = [(variable(n), left[n], right[n], _origin(here, n)) for n in left if left[n] != right[n]]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, rows)


@config.command()
def show(as_json: Json = False) -> None:
    """Every setting with its value and where it comes from: the environment, the value file or the default."""
    from shared.settings import Settings, variable

    settings = Settings()
    rows = [(variable(name), value, _origin(settings, name)) for name, value in _values(settings).items()]
    if as_json:
        print_json([{"name": name, "value": value, "from": origin} for name, value, origin in rows])
    else:
        print_table(("name", "value", "from"), rows)


def _readable() -> tuple[Settings, list[Finding]]:
    """This environment's settings without the variables that no process could read, and a finding for each of these.
    Raises what a process would where leaving them out does not help."""
    from pydantic import ValidationError

    from shared.environment import UnknownSettings
    from shared.safety import Finding
    from shared.settings import Settings

    found: list[Finding] = []
    while True:
        try:
            return Settings(), found
        except (UnknownSettings, ValidationError) as e:
            wrong = list(e.found.items()) if isinstance(e, UnknownSettings) else _not_valid(e)
            left_out = [key for key in os.environ if any(key.upper() in names.upper().split() for names, _ in wrong)]
            if not left_out:
                raise
            for key in left_out:
                del os.environ[key]
            found += [Finding(names, "not shown", what, "a value that fits") for names, what in wrong]


def _not_valid(e: ValidationError) -> list[tuple[str, str]]:
    """The variables, separated by spaces, and what is wrong with them."""
    from shared.settings import Contradictions, variable

    wrong = []
    for error in e.errors(include_input=False, include_url=False):
        if isinstance(together := error.get("ctx", {}).get("error"), Contradictions):
            wrong += [(" ".join(map(variable, names)), what) for names, what in together.found]
        else:
            wrong.append((variable(str(error["loc"][0]).lower()), error["msg"]))
    return wrong


def _load_certificate(settings: Settings) -> None:
    from gateway.certificate import Certificate

    Certificate.of(settings)


def _values(settings: Settings) -> dict[str, str]:
    """Every setting, fit to be printed."""
    from shared.safety import shown

    return {name: shown(settings, name) for name in type(settings).model_fields}


def _defaults() -> dict[str, str]:
    from shared.settings import Settings

    return _values(Settings.model_construct()._consistent())  # type: ignore[operator]


def _of_file(env: str) -> Settings:
    """The settings of an environment in which nothing else is set."""
    from shared.settings import Settings

    nothing_else: dict[str, Any] = {"_env_prefix": "NOTHING_", "env": env, "prefect_api_url": ""}
    return Settings(**nothing_else)


def _origin(settings: Settings, name: str) -> str:
    from shared.settings import variable

    if any(key.upper() == variable(name) and value for key, value in os.environ.items()):
        return "environment"
    file = environment.value_file(settings.env)
    return file.name if name in environment.read(file, frozenset(type(settings).model_fields)) else "default"
