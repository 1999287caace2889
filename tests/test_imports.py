"""The house's directions: flows → shared ← gateway, held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core_fixtures import ROOT
from tests.environment_fixtures import bare

FORBIDDEN = {
    "shared": {"prefect", "litestar", "granian", "gateway", "flows", "deployments"},
    "gateway": {"prefect", "flows", "deployments"},
    "flows": {"gateway", "litestar", "granian", "deployments"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_package_imports_nothing_from_the_wrong_side(package: str) -> None:
    """The core stays true whoever runs it, and the two shells meet only in files and rows."""
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(ast.parse(path.read_text()))
        if name in FORBIDDEN[package]
    }
    assert sources(package)
    assert not found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_module_escapes_the_check_by_importing_with_a_string(package: str) -> None:
    """`import_module("flows")` would pass the test above and still tie the packages together."""
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert called not in {"__import__", "import_module"}, path


@pytest.mark.parametrize("package", ["gateway", "flows"])
def test_no_type_hides_behind_type_checking(package: str) -> None:
    """Litestar and Prefect resolve annotations at run time; a name only a checker sees breaks them."""
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If):
                assert "TYPE_CHECKING" not in ast.unparse(node.test), path


def test_the_check_sees_imports_inside_functions_and_from_imports() -> None:
    """A check that only read the first lines of a file would miss the import that matters."""
    tree = ast.parse("def f():\n    from prefect.client import x\n    import gateway.app as g\n")
    assert set(imported(tree)) == {"prefect", "gateway"}


@pytest.mark.parametrize("command", ["down", "status"])
def test_a_command_that_only_looks_at_processes_imports_no_client_of_a_server(command: str, tmp_path: Path) -> None:
    """Not even on its way out: each would take longer than the command."""
    program = (
        "import sys, atexit\n"
        "from deployments.cli import main\n"
        "heavy = {'prefect', 'psycopg', 'httpx', 'litestar', 'structlog'}\n"
        "atexit.register(lambda: print(sorted(heavy & sys.modules.keys())))\n"
        f"sys.argv = ['engram', '{command}', '--json']\n"
        "main()\n"
    )
    environment = bare() | {"ENGRAM_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
