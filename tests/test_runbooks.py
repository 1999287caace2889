"""Runbooks that cannot lie: each command, alert, metric, deployment and setting they name is held to the code."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
import yaml
from typer.core import TyperGroup
from typer.exceptions import TyperException

from deployments.cli import COMMANDS
from shared import metrics
from shared.settings import Settings
from tests.core_fixtures import ROOT
from tests.prometheus_fixtures import RULES
from tests.test_docs import README, deployments

DIRECTORY = ROOT / "deployments" / "runbooks"
RUNBOOKS = sorted(DIRECTORY.glob("*.md"))
BY_NAME = pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
FILLED_IN = {  # what stands for something in a command
    "TENANT": "acme", "LIMIT": "rate_limit", "FILE": str(DIRECTORY), "N": "5", "…": "why", "TIME": "2026-11-23",
    "SUBJECT": "auth",
}  # fmt: skip


def alerts() -> dict[str, dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.load(path.read_text(), yaml.CSafeLoader)["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@pytest.fixture(scope="module")
def program() -> TyperGroup:
    """The real command line."""
    app = typer.Typer()
    for name in COMMANDS:
        importlib.import_module(f"deployments.cli.{name}").register(app)
    made = typer.main.get_command(app)
    assert isinstance(made, TyperGroup)
    return made


def commands(text: str, programs: Collection[str] = ("engram",)) -> list[str]:
    """What is in code and is a command: each line of a block for a shell, and spans that begin with a program."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines() if line]
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    words = [" ".join(span.split()) for span in spans]
    return lines + [span for span in words if " " in span and span.split()[0] in programs]


def check(program: TyperGroup, line: str) -> None:
    """Parse a command as the shell and the program would, without running it."""
    words = [FILLED_IN.get(word, word) for word in shlex.split(line)[1:]]
    command: Any = program
    while isinstance(command, TyperGroup):
        assert words and words[0] in command.commands, f"no such command: {line}"
        command = command.commands[words.pop(0)]
    try:
        command.make_context(command.name, list(words))
    except typer.Exit:
        assert "--help" in words, line
    except TyperException as e:
        # Named, not typed: `engram tenant delete` in the middle of a sentence says which command, not how.
        if type(e).__name__ != "MissingParameter" or words:
            raise AssertionError(f"{line}: {e}") from e


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the README's table under a heading, without its head."""
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    """Whoever is woken by an alert finds its name in the file it points to."""
    told = {name: rule["annotations"]["runbook"] for name, rule in alerts().items()}
    assert set(told.values()) == {path.name for path in RUNBOOKS}
    for name, file in told.items():
        assert re.search(rf"\b{name}\b", (DIRECTORY / file).read_text()), name
    for path in RUNBOOKS:
        own = "Engram" + "".join(word.capitalize() for word in path.stem.split("-"))
        assert path.read_text().startswith(f"# {own}\n") and told[own] == path.name


def test_the_command_of_an_alert_is_the_first_one_of_its_runbook(program: TyperGroup) -> None:
    """The notification and the runbook must not send two people two ways."""
    for name, rule in alerts().items():
        text = (DIRECTORY / rule["annotations"]["runbook"]).read_text()
        check(program, rule["annotations"]["command"])
        if text.startswith(f"# {name}\n"):
            assert re.findall(r"^```sh\n(.+)\n```$", text, re.MULTILINE) == [rule["annotations"]["command"]], name


@BY_NAME
def test_a_runbook_says_what_it_is_and_when_to_stop(path: Path) -> None:
    """Severity first, one command, a table of what is seen, an end, and somebody to call; short enough to be read."""
    text = path.read_text()
    severity = next(r["labels"]["severity"] for r in alerts().values() if r["annotations"]["runbook"] == path.name)
    # "none" is the watchdog: whom its silence wakes, the dead man's switch wakes.
    assert {"page": "**Page.**", "ticket": "**Ticket.**", "none": "**Page.**"}[severity] in text.splitlines()[2]
    assert text.count("```") == 2 and "| you see | it means | do |" in text
    assert "**Stop when**" in text and "**Call the engineer" in text
    assert len(text.splitlines()) <= 45


@BY_NAME
def test_every_command_of_a_runbook_is_understood(program: TyperGroup, path: Path) -> None:
    """At 3 a.m. a command is pasted, with its options."""
    found = commands(path.read_text())
    assert found
    for line in found:
        check(program, line)


def test_the_check_of_commands_refuses_what_does_not_exist(program: TyperGroup) -> None:
    """A check that lets everything through would let the next rename through."""
    for wrong in (
        "engram",
        "engram act refresh",
        "engram backup --al",
        "engram act shed search --reasons why",
        "engram act shed search --reason why --ttl soon",
        "engram diagnose auth acme third",
    ):
        with pytest.raises(AssertionError):
            check(program, wrong)


@BY_NAME
def test_every_metric_deployment_setting_and_file_of_a_runbook_exists(path: Path) -> None:
    """What a runbook tells to look at is there to be looked at."""
    text = path.read_text()
    own = set(re.findall(r"^# TYPE (\w+) ", metrics.render().decode(), re.MULTILINE))
    groups = [group for path in RULES for group in yaml.load(path.read_text(), yaml.CSafeLoader)["groups"]]
    recorded = {rule.get("record") for group in groups for rule in group["rules"]}
    assert set(re.findall(r"\bengram[_:][a-z0-9_:]+\b", text)) <= own | recorded
    assert set(re.findall(r"`([a-z-]+)`\s+deployment", text)) <= deployments().keys()
    assert set(re.findall(r"\bENGRAM_[A-Z0-9_]+\b", text)) <= {f"ENGRAM_{n.upper()}" for n in Settings.model_fields}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"\bEngram[A-Z]\w+\b", text):
        assert name in alerts()


@BY_NAME
def test_every_check_a_runbook_names_is_one_of_a_diagnosis(path: Path) -> None:
    """`… NOT NORMAL` is looked for on the screen, word by word."""
    rows = re.findall(r"^\| (.*?) \|", path.read_text(), re.MULTILINE)
    named = {word for row in rows if "NOT NORMAL" in row for word in re.findall(r"`([^`]+)`", row)}
    source = "".join(p.read_text() for p in (ROOT / "shared" / "diagnosis").glob("*.py"))
    source += "".join(p.read_text() for p in (ROOT / "shared" / "playbook").glob("*.py"))
    assert all(f'"{word}"' in source for word in named), named


def test_the_readme_leads_from_a_symptom_to_one_command(program: TyperGroup) -> None:
    """Symptom → alert → runbook → one command, the alert's own; every alert and its runbook are reached from here."""
    rows = table(README, "At 3 a.m.")
    reached, listed = set(), set()
    for _symptom, alert_cell, runbook_cell, command_cell in rows:
        named = re.findall(r"`(Engram\w+)`", alert_cell)
        files = re.findall(r"\]\(deployments/runbooks/([\w-]+\.md)\)", runbook_cell)
        assert set(named) <= alerts().keys()
        assert {alerts()[name]["annotations"]["runbook"] for name in named} <= set(files) or not named
        assert all((DIRECTORY / file).exists() for file in files)
        reached |= set(files)
        listed |= set(named)
        assert commands(command_cell), command_cell
        for line in commands(command_cell):
            check(program, line)
        first = commands(command_cell)[0]
        assert all(f"{first} ".startswith(alerts()[name]["annotations"]["command"] + " ") for name in named), first
    assert listed == alerts().keys()
    assert reached == {path.name for path in RUNBOOKS}
