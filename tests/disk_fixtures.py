"""A disk that is full, read-only or another one than its neighbours."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def file_system(directory: Path, options: str) -> Iterator[Path]:
    """One of its own there (a tmpfs with options as "size=2m" or "ro"), or the test is skipped: mounting needs root."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"cannot mount here: {tried.stderr.strip()[:200]}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(filler: Path) -> Path:
    """Take every byte there is left beside it."""
    for size in (65_536, 4_096):
        with suppress(OSError), filler.open("ab", buffering=0) as f:
            while f.write(b"x" * size):
                pass
    return filler
