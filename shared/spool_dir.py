"""The spool's directory, as any process of the machine sees it: what dead workers left, what is sealed, how much it is.

    spool/*.tmp, *.open, *.seg   segments (`shared.segment`)
    spool/quarantine/*.bad       damaged bytes of drained segments, with their offsets; a person decides about them
    spool/quarantine/*.refused   events that cannot be billed, as a segment: `engram usage-import` tries them again
    spool/dry-run/*.seg          segments a dry run examined (`shared.dry_run`); so does it about these
    spool/import/*.seg           an import on its way in (`shared.correction`)
    spool/stuck/*.seg            segments that could not be drained; they are tried again (`shared.stuck`)

A file that cannot be dealt with never holds up the others: it is logged (`usage_flush_failed`) and stays. Adopting is
the drain's, which has no metrics: a segment that stays shows in the age gauge, which each gateway worker measures.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared import metrics
from shared.durable import fsync_path, write_file
from shared.log import get_logger
from shared.segment import MAGIC, SegmentContent, frame
from shared.usage import UsageEvent

_BLOCK_BYTES = 4_096
_QUARANTINE, _STUCK = "quarantine", "stuck"
_NOT_WAITING = (_QUARANTINE, "dry-run", "import")  # for a person, or for the import that is on its way
log = get_logger("spool")


def flush_failed(step: str, e: OSError, segment: str = "") -> None:
    metrics.usage_flush_failures_total.inc()
    log.error("usage_flush_failed", step=step, segment=segment, errno=e.errno, cause=e.strerror or str(e))


def adopt(directory: Path) -> list[Path]:
    """Seal the segments of dead owners; return those sealed. A live owner's flock keeps us off."""
    adopted: list[Path] = []
    # `.tmp` first: beside an `.open` of its name it is an unfinished copy of that, and must not take its place.
    for path in [*sorted(directory.glob("*.tmp")), *sorted(directory.glob("*.open"))]:
        try:
            if (sealed_path := _adopt(path)) is not None:
                adopted.append(sealed_path)
        except OSError as e:
            flush_failed("adopt", e, path.stem)
    return adopted


def _adopt(path: Path) -> Path | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _still_there(path, fd):  # sealed or replaced between listing and locking
            return None
        copy = path.suffix == ".tmp" and path.with_suffix(".open").exists()
        if copy or os.fstat(fd).st_size <= len(MAGIC):
            path.unlink(missing_ok=True)  # its owner, alive after all, may have given it up
            return None
        os.fdatasync(fd)
        sealed_path = path.with_suffix(".seg")
        os.rename(path, sealed_path)
        fsync_path(path.parent)
        log.info("usage_segment_adopted", segment=path.stem)
        return sealed_path
    except BlockingIOError:
        return None
    finally:
        os.close(fd)


def _still_there(path: Path, fd: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False


def sealed(directory: Path) -> list[Path]:
    """Sealed segments, oldest first."""
    return sorted(directory.glob("*.seg"))


def quarantine(path: Path, content: SegmentContent) -> Path | None:
    """Keep the damaged bytes of a segment beside the spool, durably; None when there is no damage. Doing it twice
    is fine."""
    if not content.damage:
        return None
    lines = [f"@{offset} {len(piece)}\n".encode() + piece + b"\n" for offset, piece in content.damage]
    kept = _keep(path, ".bad", b"".join(lines))
    log.error("usage_segment_damaged", segment=path.stem, corrupt_bytes=content.corrupt_bytes, kept=str(kept))
    return kept


def keep_refused(path: Path, refused: Sequence[tuple[UsageEvent, str]]) -> Path | None:
    """Keep the events of a segment that cannot be billed beside the spool, too: what lies there raises the alert, and
    a clock that was wrong is put right one day. None when there is no such event. Doing it twice is fine."""
    if not refused:
        return None
    kept = _keep(path, ".refused", MAGIC + b"".join(frame(event) for event, _ in refused))
    reasons = sorted({reason for _, reason in refused})
    log.error("usage_events_refused", segment=path.stem, events=len(refused), reasons=reasons, kept=str(kept))
    return kept


def _keep(path: Path, suffix: str, data: bytes) -> Path:
    directory = path.parent / _QUARANTINE
    directory.mkdir(exist_ok=True, mode=0o700)
    fsync_path(path.parent)
    kept = directory / f"{path.stem}{suffix}"
    write_file(kept, data)
    return kept


@dataclass(frozen=True, slots=True)
class Survey:
    """The whole directory at a glance: `size_bytes` in blocks as the disk has them, of everything below it.

    `oldest_age_seconds` is 0 when every event here is drained, or waits for a person's decision.
    """

    size_bytes: int
    oldest_age_seconds: float
    quarantined: int
    stuck: int = 0  # segments that wait to be tried again (`shared.stuck`)


class Surveyor:
    """Looks again and again; what never changes any more (a sealed segment) is measured once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sealed: dict[str, int] = {}

    def look(self) -> Survey:
        """Blocking: a listing, and a stat for each file that is new or still growing."""
        size_bytes, quarantined, stuck = 0, 0, 0
        waiting: list[str] = []
        sealed: dict[str, int] = {}
        for entry in _entries(self._directory):
            name = entry.name
            if name.endswith(".seg"):
                used = sealed[name] = self._sealed.get(name) or _used(entry)
                waiting.append(name)
            elif entry.is_dir(follow_symlinks=False):
                kept = list(_entries(entry))
                used = sum(map(_used, kept))
                quarantined += len({Path(k.name).stem for k in kept}) if name == _QUARANTINE else 0
                stuck += len(kept) if name == _STUCK else 0
                waiting += [] if name in _NOT_WAITING else [k.name for k in kept if k.name.endswith(".seg")]
            else:
                used = _used(entry)
                waiting += [name] if name.endswith(".open") and used else []
            size_bytes += used
        self._sealed = sealed
        oldest = min(map(_created, waiting), default=None)
        return Survey(size_bytes, max(0.0, time.time() - oldest) if oldest is not None else 0.0, quarantined, stuck)


def survey(directory: Path) -> Survey:
    return Surveyor(directory).look()


def _entries(directory: os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except FileNotFoundError:
        return


def _used(entry: os.DirEntry[str]) -> int:
    """Bytes on the disk, by the block; 0 for a segment without an event yet and for a file that has just gone."""
    try:
        size = entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
    return 0 if size <= len(MAGIC) else -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _created(name: str) -> float:
    """Segments are named after the microsecond from which on the requests of their events began."""
    digits = name.partition("-")[0]
    return int(digits) / 1e6 if digits.isdecimal() else time.time()
