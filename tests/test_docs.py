"""Documents that cannot lie: what the README and the deployments say is compared with the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from deployments.cli import COMMANDS, app
from shared import queues
from shared.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def deployments() -> dict[str, dict[str, Any]]:
    return {d["name"]: d for d in yaml.load((ROOT / "prefect.yaml").read_text(), yaml.CSafeLoader)["deployments"]}


def flow_steps(module: str) -> list[str]:
    """The task names of a flow module in the order of their definition."""
    tree = ast.parse((ROOT / "flows" / f"{module}.py").read_text())
    return [
        keyword.value.value
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "task"
        for keyword in decorator.keywords
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
    ]


def test_the_flows_of_the_readme_are_the_deployments() -> None:
    """An operator reads the table first; a flow that is missing there does not exist for them."""
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| ([^|]+) \|$", README, re.MULTILINE))
    assert rows.keys() == deployments().keys()
    for name, deployment in deployments().items():
        listed = [step.strip() for step in rows[name].split("→")]
        module = deployment["entrypoint"].split(".")[1]
        own = flow_steps(module)
        assert [s for s in listed if s in own] == [s for s in own if s in listed], name
        assert set(own) - {"put-back"} <= set(listed), name


def test_what_holds_writes_or_what_operators_wait_for_never_yields_the_cpu_and_all_else_does() -> None:
    """A restore or a move that yields keeps a tenant's writes waiting for longer; a night's backups that do not yield
    keep every request of the machine waiting."""
    commands = {name: d["work_pool"]["job_variables"]["command"] for name, d in deployments().items()}
    yielding = {name for name, command in commands.items() if command.endswith(" --yielding")}
    assert yielding == commands.keys() - queues.URGENT.keys() - {"move"}


def test_every_deployment_names_an_importable_flow_by_module() -> None:
    """The path form of an entrypoint loads the file twice."""
    for name, deployment in deployments().items():
        module, _, function = deployment["entrypoint"].rpartition(".")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name
        assert len(deployment["description"]) > 40


def test_every_setting_the_readme_names_exists() -> None:
    """A variable that does nothing is worse than none."""
    known = {f"ENGRAM_{name.upper()}" for name in Settings.model_fields} | {"PREFECT_API_URL", "ENGRAM_CRASH_POINTS"}
    assert set(re.findall(r"ENGRAM_[A-Z0-9_]+[A-Z0-9]", README)) <= known


def test_every_command_the_readme_names_exists() -> None:
    """At 3 a.m. a command is pasted, not thought about."""
    import importlib

    for name in COMMANDS:
        importlib.import_module(f"deployments.cli.{name}").register(app)
    names = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands if c.callback}
    names |= {g.typer_instance.info.name for g in app.registered_groups if g.typer_instance}
    assert set(re.findall(r"`engram ([a-z-]+)", README)) <= names


def test_every_file_and_folder_the_readme_points_to_exists() -> None:
    """A promise whose proof was renamed is a promise without one."""
    for path in set(
        re.findall(
            r"`((?:tests|shared|flows|gateway|deployments|\.ci)/[\w./-]*)`", README.replace("/ENV.env", "/prod.env")
        )
    ):
        assert (ROOT / path).exists(), path
