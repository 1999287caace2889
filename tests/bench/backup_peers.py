"""The other ways of copying a database that `tests.bench.backup` measures: `cp`, restic and Litestream."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from shared.errors import Permanent
from shared.litestream import program
from shared.settings import Settings

TOOLS = ("sha256sum", "sha256", "sha256sum + sync")


def find_litestream(settings: Settings) -> str | None:
    try:
        return program(settings)
    except Permanent:
        return None


def timed(*command: object, **env: str) -> float:
    begun = time.perf_counter()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr[-400:]}")
    return time.perf_counter() - begun


def cp(file: Path, directory: Path, tool: str) -> dict[str, Any]:
    copy = directory / "copy"
    seconds = timed("cp", file, copy)
    if tool.startswith("sha256sum"):
        seconds += timed("sha256sum", copy)
        seconds += timed("sync", copy, directory) if tool.endswith("sync") else 0.0
    else:
        begun = time.perf_counter()
        with copy.open("rb", buffering=0) as opened:
            hashlib.file_digest(opened, "sha256")
        seconds += time.perf_counter() - begun
    copy.unlink()
    return {"seconds": {"total": seconds}}


def restic(file: Path, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    repository, env = directory / "restic", {"RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(directory / "cache")}
    try:
        timed("restic", "-r", repository, "init", **env)
        made = _measured("restic", "-r", repository, "backup", file, **env)
        back = _measured("restic", "-r", repository, "restore", "latest", "--target", directory / "back", **env)
    finally:
        for path in (repository, directory / "back", directory / "cache"):
            shutil.rmtree(path, ignore_errors=True)
    return made, back


def litestream(program: str, file: Path, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """On a copy: it keeps a directory of its own beside a database."""
    own, replica, back = directory / "ls" / "copy.db", directory / "ls" / "replica", directory / "ls" / "back.db"
    own.parent.mkdir()
    try:
        shutil.copy(file, own)
        made = _measured(program, "replicate", "-once", "-force-snapshot", own, replica.as_uri())
        return made, _measured(program, "restore", "-o", back, replica.as_uri())
    finally:
        shutil.rmtree(own.parent)


def _measured(*command: object, **env: str) -> dict[str, Any]:
    return {"seconds": {"total": timed(*command, **env)}}
