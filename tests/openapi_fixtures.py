"""Schemathesis over a gateway's OpenAPI document, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.core_fixtures import ROOT

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")


def compared(url: str, token: str, directory: Path, *options: str, hooks: str = "") -> dict[str, Any]:
    """The report of a run in which nothing was found."""
    report = directory / "report.json"
    words = ["--config-file", str(CONFIGURATION), "run", f"{url}/schema/openapi.json", "--no-color"]
    words += ["--header", f"Authorization: Bearer {token}", "--report", "json", "--report-json-path", str(report)]
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words, *options],
        cwd=directory,
        env=environment | ({"SCHEMATHESIS_HOOKS": hooks} if hooks else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["failures"] == found["errors"] == []
    return found
