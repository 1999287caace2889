"""Segments that cannot be drained for a reason of their own: an unreadable file, an I/O error, data that no check
foresaw. They are kept aside so that the others go on, and tried again.

    spool/stuck/*.seg    given back to the spool when due

No state but the file's: its mtime is when it was last written, its ctime when it was put here. It waits as long again
as it has waited by then, between `MIN_SECONDS` and `MAX_SECONDS`: a doubling that survives every restart.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from shared.durable import fsync_path
from shared.log import get_logger

MIN_SECONDS, MAX_SECONDS = 5.0, 300.0
_STUCK = "stuck"
log = get_logger("stuck")


def put(path: Path, cause: Exception) -> None:
    """Take a segment out of the others' way. When even that fails it stays where it is, and is said so."""
    where = path.parent / _STUCK
    log.error("usage_segment_stuck", segment=path.stem, cause=" ".join(str(cause).split())[:300])
    try:
        where.mkdir(exist_ok=True, mode=0o700)
        os.rename(path, where / path.name)
        fsync_path(where)
        fsync_path(path.parent)
    except FileNotFoundError:  # another drainer was here first
        return
    except OSError as e:
        log.error("usage_segment_not_set_aside", segment=path.stem, cause=e.strerror)


def segments(spool_dir: Path) -> list[Path]:
    return sorted((spool_dir / _STUCK).glob("*.seg"))


def give_back(spool_dir: Path) -> list[Path]:
    """Those whose wait is over, as sealed segments of the spool again."""
    given = []
    for path in segments(spool_dir):
        try:
            found = path.stat()
            if time.time() - found.st_ctime < min(MAX_SECONDS, max(MIN_SECONDS, found.st_ctime - found.st_mtime)):
                continue
            os.rename(path, spool_dir / path.name)
        except OSError as e:
            log.error("usage_segment_not_given_back", segment=path.stem, cause=e.strerror)
            continue
        given.append(spool_dir / path.name)
    return given
