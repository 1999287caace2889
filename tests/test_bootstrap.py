"""`python3 -m deployments` must run before anything is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import __main__ as bootstrap

DEPLOYMENTS = Path(bootstrap.__file__).parent


@pytest.mark.parametrize("file", ["__init__.py", "__main__.py"])
def test_the_bootstrap_imports_the_standard_library_alone(file: str) -> None:
    """In a fresh clone there is nothing else."""
    imported = set()
    for node in ast.walk(ast.parse((DEPLOYMENTS / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            imported.add(node.module.partition(".")[0])
    assert imported <= sys.stdlib_module_names


def test_it_is_importable_without_site_packages() -> None:
    """The claim itself, not only its text."""
    program = "import deployments.__main__, sys; print(*sorted(m for m in sys.modules if 'site-packages' in m))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(bootstrap.ROOT)!r}); {program}"]
    )
    assert done.returncode == 0


def test_constraints_name_versions_and_no_address() -> None:
    """A registry's address in a file would follow the project everywhere."""
    lines = [line for line in (DEPLOYMENTS / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    plain = re.compile(r"[a-z0-9][a-z0-9._-]*==[A-Za-z0-9.+!]+( ; [a-z_]+ [^/:@]+)?")
    assert lines
    assert [line for line in lines if not plain.fullmatch(line)] == []


def test_a_finished_installation_is_not_done_again_and_a_cut_short_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker is written last; a changed requirement changes the fingerprint it holds."""
    (tmp_path / "deployments").mkdir()
    (tmp_path / "pyproject.toml").write_text("a")
    (tmp_path / "deployments" / "constraints.txt").write_text("b")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", tmp_path / "deployments" / "constraints.txt")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, body in (
        ("pip", "exit 0"),
        ("python", 'echo x >> "$(dirname "$0")/calls"; exit "$(cat "$(dirname "$0")/code")"'),
    ):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    code, calls = tmp_path / ".venv" / "bin" / "code", tmp_path / ".venv" / "bin" / "calls"

    code.write_text("1")
    with pytest.raises(SystemExit):
        bootstrap.install("")
    code.write_text("0")
    for _ in range(2):
        bootstrap.install("")
    assert calls.read_text().count("x") == 2, "once in vain, once for real, then remembered"
    (tmp_path / "pyproject.toml").write_text("changed")
    bootstrap.install("")
    assert calls.read_text().count("x") == 3
    bootstrap.install("test")
    bootstrap.install("")
    assert calls.read_text().count("x") == 4, "the test installation contains the plain one"
