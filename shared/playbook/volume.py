"""Is the volume under the tenants healthy: space, inodes, read-only, how long a write and its fsync take, WALs.

Files of live databases are only `stat`ed: opening and closing one would drop SQLite's locks in a gateway (FACTS).
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec

from shared.playbook.action import Context, Finding, Outcome, Request
from shared.storage import volume_bytes
from shared.tenant import TenantPaths, tenants_on_disk

FREE_SHARE = 0.1
FSYNC_MS = 100.0  # a healthy SSD or network volume takes 0.3 to 20
WAL_BYTES = 64 << 20  # folded at 4 to 8 MB; more is a reader that never ends, or a writer that is never let in
PROBES = 5
_PROBE_BYTES = 4_096
_LISTED = 10


class Volume(msgspec.Struct, frozen=True):
    """Of one file system. `writes_ms` and `fsyncs_ms` are of each probe; `error` is why a probe failed, else empty."""

    free_bytes: int
    total_bytes: int
    free_inodes: int
    total_inodes: int
    read_only: bool
    writes_ms: list[float]
    fsyncs_ms: list[float]
    error: str


def health(context: Context, request: Request, _: Any) -> Outcome:
    settings = context.settings
    where = settings.tenants_dir if settings.tenants_dir.is_dir() else settings.data_dir
    seen = look(where, settings.run_dir)
    findings = judged(seen)
    if request.tenant_id is not None:
        of_tenant = TenantPaths.of(settings.tenants_dir, request.tenant_id)
        wal_bytes = _wal_bytes(of_tenant)
        size = volume_bytes(of_tenant)
        findings += [
            Finding("database (bytes)", size, "above 0", size > 0),
            Finding("its WAL (bytes)", wal_bytes, f"at most {WAL_BYTES}", wal_bytes <= WAL_BYTES),
        ]
        tables = {}
    else:
        wals = sorted(_wals(where), key=lambda row: -row["wal_bytes"])
        total = sum(row["wal_bytes"] for row in wals)
        large = sum(row["wal_bytes"] > WAL_BYTES for row in wals)
        findings += [
            Finding("WALs, all tenants (bytes)", total, "a few MB for each busy tenant", None),
            Finding("tenants with a large WAL", large, f"0 above {WAL_BYTES} bytes", large == 0),
        ]
        tables = {"largest WALs": wals[:_LISTED]}
    bad = [finding.name for finding in findings if finding.ok is False]
    return Outcome(
        action=request.action,
        kind="read",
        target=request.tenant_id or str(where),
        summary=f"not as it should be: {', '.join(bad)}" if bad else "healthy",
        findings=findings,
        tables=tables,
    )


def look(directory: Path, probe_dir: Path) -> Volume:
    """Five small files are written to `probe_dir`, fsynced and removed, when `directory` is on the same file system;
    else they are written to `directory`."""
    found = os.statvfs(directory)
    if not probe_dir.is_dir() or os.stat(probe_dir).st_dev != os.stat(directory).st_dev:
        probe_dir = directory
    writes_ms: list[float] = []
    fsyncs_ms: list[float] = []
    error = ""
    try:
        for _ in range(PROBES):
            written_ms, synced_ms = _probe(probe_dir)
            writes_ms.append(written_ms)
            fsyncs_ms.append(synced_ms)
    except OSError as e:
        error = e.strerror or str(e)
    return Volume(
        free_bytes=found.f_bavail * found.f_frsize,
        total_bytes=found.f_blocks * found.f_frsize,
        free_inodes=found.f_favail,
        total_inodes=found.f_files,
        read_only=bool(found.f_flag & os.ST_RDONLY),
        writes_ms=writes_ms,
        fsyncs_ms=fsyncs_ms,
        error=error,
    )


def judged(seen: Volume) -> list[Finding]:
    """Pure. Inodes cannot be judged where the file system has no fixed number of them (btrfs says 0)."""
    share = seen.free_bytes / seen.total_bytes if seen.total_bytes else 0.0
    inodes = seen.free_inodes / seen.total_inodes if seen.total_inodes else None
    slowest_ms = max(seen.fsyncs_ms, default=None)
    return [
        Finding(
            "free space (bytes)",
            seen.free_bytes,
            f"at least {FREE_SHARE:.0%} of {seen.total_bytes}",
            share >= FREE_SHARE,
        ),
        Finding(
            "free inodes",
            seen.free_inodes,
            f"at least {FREE_SHARE:.0%} of {seen.total_inodes}",
            None if inodes is None else inodes >= FREE_SHARE,
        ),
        Finding("mounted read-only", seen.read_only, "no", not seen.read_only),
        Finding("a file can be written", seen.error or "yes", "yes", not seen.error),
        Finding("write (ms, slowest of 5)", max(seen.writes_ms, default=None), "below 10", None),
        Finding(
            "fsync (ms, slowest of 5)",
            slowest_ms,
            f"below {FSYNC_MS:g}",
            None if slowest_ms is None else slowest_ms < FSYNC_MS,
        ),
    ]


def _probe(directory: Path) -> tuple[float, float]:
    """Milliseconds that one small write and its fsync took."""
    path = directory / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        began = time.perf_counter()
        os.write(fd, bytes(_PROBE_BYTES))
        written = time.perf_counter()
        os.fsync(fd)
        synced = time.perf_counter()
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
    return round((written - began) * 1_000, 3), round((synced - written) * 1_000, 3)


def _wals(tenants_dir: Path) -> list[dict[str, Any]]:
    """Every tenant of this machine with its WAL's size: two `stat`s each."""
    return [
        {"tenant": name, "wal_bytes": _wal_bytes(TenantPaths.of(tenants_dir, name))}
        for name in tenants_on_disk(tenants_dir)
    ]


def _wal_bytes(paths: TenantPaths) -> int:
    try:
        return os.stat(f"{os.path.realpath(paths.database)}-wal").st_size
    except OSError:
        return 0
