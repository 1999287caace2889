"""`engram --help` is read before anything else: grouped, one line a command, completion that works."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from deployments import cli
from tests.environment_fixtures import bare

ROOT = Path(__file__).resolve().parent.parent


def commands() -> dict[str, click.Command]:
    """Every command by the words that call it."""
    app = typer.Typer(add_completion=False)
    for name in cli.COMMANDS:
        importlib.import_module(f"deployments.cli.{name}").register(app)
    found: dict[str, click.Command] = {}

    def walk(group: Any, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            found[" ".join((*words, name))] = command
            if hasattr(command, "commands"):
                walk(command, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def overview(**variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "--help"],
        env=bare() | {"COLUMNS": "100", "NO_COLOR": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_every_command_is_in_one_group_and_every_group_names_commands_that_exist() -> None:
    """A command that is in none would lie about at the end, under no heading."""
    listed = [name for names in cli.PANELS.values() for name in names]
    assert sorted(listed) == sorted(name for name in commands() if " " not in name)


def test_the_overview_shows_the_groups_and_each_command_in_one_line() -> None:
    """A person looks for the line; details are behind `engram COMMAND --help`."""
    text = overview()
    headings = [text.index(f"─ {panel} ─") for panel in cli.PANELS]
    assert headings == sorted(headings)
    for names in cli.PANELS.values():
        for name in names:
            line = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
            assert len(line.strip("│ ").removeprefix(name).strip()) > 8, line
    rows = [line for line in text.partition(next(iter(cli.PANELS)))[2].splitlines() if line.startswith("│")]
    assert len(rows) == sum(map(len, cli.PANELS.values())), "one of them needs a second line"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_says_what_it_is_for(name: str) -> None:
    """Its first line is all the overview shows."""
    command = commands()[name]
    assert command.help and len(command.help.split(".")[0]) >= 10, name


def test_completion_works_in_a_real_bash() -> None:
    """What `engram --install-completion` puts into a shell, asked as the shell asks."""
    script = (
        'eval "$(_ENGRAM_COMPLETE=source_bash engram)"; COMP_WORDS=(engram rest); COMP_CWORD=1;'
        "complete -p engram; _engram_completion engram; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=bare() | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert "-F _engram_completion engram" in done.stdout, done.stderr
    assert {"restore", "restore-undo", "restore-test"} <= set(done.stdout.split())
