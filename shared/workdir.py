"""A private directory for one run's temporary files, gone when the run ends, however it ends.

The directory's own flock says "the owner lives". Whoever makes the next one clears those of dead owners, so a
SIGKILLed run leaves nothing for longer than until the next run.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workdir(parent: Path, purpose: str) -> Iterator[Path]:
    """Yield a fresh directory `{parent}/{purpose}-{random}`."""
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    clear_dead(parent, purpose)
    path = parent / f"{purpose}-{secrets.token_hex(6)}"
    path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def clear_dead(parent: Path, purpose: str) -> list[Path]:
    """Remove the directories whose owner is gone; return them."""
    cleared = []
    for path in parent.glob(f"{purpose}-*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A directory just made and not yet locked is empty: leave it, its owner is about to lock it.
            if any(path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)
                cleared.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return cleared
