"""What a restore costs whoever writes, and what the fence costs every request.

    python -m tests.bench.restore_window [RESULT.json] [--sizes 1,100,1000] [--no-prefect]

Real PostgreSQL, a local object store, databases in a temporary directory (about five times the largest size; sizes
that do not fit are left out). Read ratios: absolute times are this machine's, today.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

from deployments.postgres import EmbeddedPostgres
from shared import backup, plan, registry, restore
from shared.control_plane import ControlPlane
from shared.engine import memories
from shared.engine.connection import connect
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import InMaintenance
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.ports import free_ports

ROUNDS = 5  # restores at each size, without and with a writer
FENCE_ROUNDS, FENCE_USES = 15, 400
_COPIES = 5  # live, before, before that, object, on its way in
_CONTENT = "a memory of about a thousand characters, because that is what people keep " * 13


class Bench:
    """One control plane and one data directory; a tenant a size."""

    def __init__(self, directory: Path, url: str) -> None:
        self.settings = Settings(data_dir=directory / "data", control_plane_url=url)  # type: ignore[arg-type]
        self.control_plane = ControlPlane(self.settings)
        self.control_plane.migrate()
        self.objects = ObjectStore(self.settings)

    def tenant(self, tenant_id: str, megabytes: int) -> tuple[TenantPaths, str]:
        """A tenant with a database of that size and a backup of it; its paths and the backup's id."""
        registry.create(self.control_plane, self.settings, tenant_id)
        paths = TenantPaths.of(self.settings.tenants_dir, tenant_id)
        _fill(paths, megabytes * 1_000_000)
        with backup.work(self.settings.data_dir / "tmp", "bench") as directory:
            taken = backup.take(self.settings, tenant_id, directory)
            made = backup.register(self.control_plane, backup.store(self.objects, taken), kind="manual")
        return paths, str(made.backup_id)

    def restore(self, tenant_id: str, backup_id: str) -> float:
        """A restore as the flow does it, without Prefect; its locked_ms."""
        chosen = plan.plan(self.settings, self.control_plane, tenant_id, backup_id=backup_id)
        with restore.running(self.settings, self.control_plane, chosen) as hold:
            staged = restore.download(self.objects, hold, chosen)
            lease = restore.lock(staged, holder=f"bench {chosen.restore_id}", reason="bench")
            verified = restore.verify(restore.swap(staged, lease))
            return restore.release(chosen, lease, verified).locked_ms

    def restore_with_prefect(self, tenant_id: str, backup_id: str) -> float:
        """The flow itself, in this process; its locked_ms."""
        from flows.restore import restore as flow

        result = flow(tenant_id, UUID(backup_id), with_safety_backup=False)
        return float(result["locked_ms"])


def _fill(paths: TenantPaths, size_bytes: int) -> None:
    """Real memories for the first megabyte, their rows copied inside SQLite up to the size."""
    database = TenantDatabase(paths)
    try:
        with database.write() as connection:
            for number in range(250):
                memories.create(connection, NewMemory(f"{number} {_CONTENT}", tags=["bench"]))
        while (size := _size(paths)) < size_bytes:
            per_row = max(size // max(1, _count(database)), 1)
            step = min(20_000, max(1, (size_bytes - size) // per_row))
            with database.write() as connection:
                connection.execute(
                    "INSERT INTO memories (id, content, memory_type, tags, metadata, importance, created_at,"
                    " updated_at, version) SELECT lower(hex(randomblob(16))), m.content, m.memory_type, m.tags,"
                    " m.metadata, m.importance, m.created_at, m.updated_at, m.version FROM memories m, memories n"
                    " LIMIT ?",
                    (step,),
                )
            with database.read() as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        database.close()


def _size(paths: TenantPaths) -> int:
    return paths.database.stat().st_size


def _count(database: TenantDatabase) -> int:
    with database.read() as connection:
        return int(connection.execute("SELECT count(*) FROM memories").fetchone()[0])


class Writer:
    """A client that writes as fast as it is answered; when each answer came."""

    def __init__(self, paths: TenantPaths) -> None:
        self._paths = paths
        self.answers: list[float] = []
        self.refused = 0
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._loop)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _loop(self) -> None:
        database = TenantDatabase(self._paths)
        try:
            while not self._stop.is_set():
                try:
                    with database.write() as connection:
                        memories.create(connection, NewMemory("written while it is restored"))
                    self.answers.append(time.perf_counter())
                except InMaintenance:
                    self.refused += 1
                    time.sleep(0.001)
        finally:
            database.close()

    def longest_gap_ms(self, since: float, until: float) -> float:
        inside = [at for at in self.answers if since - 1 <= at <= until + 1]
        return max((b - a for a, b in itertools.pairwise(inside)), default=0.0) * 1000


def window(
    bench: Bench, tenant_id: str, paths: TenantPaths, backup_id: str, run: Callable[[str, str], float]
) -> dict[str, float]:
    """Medians over the rounds."""
    run(tenant_id, backup_id)  # the first pays for what the others find warm
    rounds = ROUNDS if _size(paths) < 500_000_000 else ROUNDS // 2 + 1
    quiet = [run(tenant_id, backup_id) for _ in range(rounds)]
    locked, gaps, seconds = [], [], []
    for _ in range(rounds):
        writer = Writer(paths)
        with writer.running():
            time.sleep(0.3)
            began = time.perf_counter()
            locked.append(run(tenant_id, backup_id))
            ended = time.perf_counter()
            time.sleep(0.3)
        gaps.append(writer.longest_gap_ms(began, ended))
        seconds.append(ended - began)
    return {
        "locked_ms_quiet": statistics.median(quiet),
        "locked_ms": statistics.median(locked),
        "locked_ms_max": max(locked),
        "gap_ms": statistics.median(gaps),
        "gap_ms_max": max(gaps),
        "restore_seconds": statistics.median(seconds),
    }


def fence_cost(bench: Bench) -> dict[str, float]:
    """µs of one use with and without the fence, interleaved; the difference is what the fence costs a request."""
    paths, _ = bench.tenant("fence", 1)
    database = TenantDatabase(paths)
    bare = connect(Path(os.path.realpath(paths.database)))
    with database.read() as connection:
        memory_id = connection.execute("SELECT id FROM memories LIMIT 1").fetchone()[0]
    update = "UPDATE memories SET importance = importance WHERE id = ? AND importance < -1"  # writes no page

    def read_fenced() -> None:
        with database.read() as connection:
            memories.get(connection, memory_id)

    def read_bare() -> None:
        memories.get(bare, memory_id)

    def write_fenced() -> None:
        with database.write() as connection:
            connection.execute(update, (memory_id,))

    def write_bare() -> None:
        bare.execute("BEGIN IMMEDIATE")
        bare.execute(update, (memory_id,))
        bare.execute("COMMIT")

    loops = {"read_fenced": read_fenced, "read_bare": read_bare, "write_fenced": write_fenced, "write_bare": write_bare}
    samples: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(FENCE_ROUNDS + 1):
        for name, loop in loops.items():
            began = time.perf_counter()
            for _ in range(FENCE_USES):
                loop()
            if number:
                samples[name].append((time.perf_counter() - began) / FENCE_USES * 1e6)
    database.close()
    bare.close()
    median = {name: statistics.median(values) for name, values in samples.items()}
    return {
        **median,
        "read_fence": statistics.median(map(float.__sub__, samples["read_fenced"], samples["read_bare"])),
        "write_fence": statistics.median(map(float.__sub__, samples["write_fenced"], samples["write_bare"])),
    }


@contextmanager
def prefect(bench: Bench) -> Iterator[None]:
    """A Prefect server for the flow in this process."""
    os.environ |= {
        "ENGRAM_DATA_DIR": str(bench.settings.data_dir),
        "ENGRAM_CONTROL_PLANE_URL": bench.settings.control_plane_url.get_secret_value(),
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def run(directory: Path, sizes: list[int], *, with_prefect: bool) -> Iterator[dict[str, Any]]:
    """Everything so far, after every step: the last one is the result."""
    with EmbeddedPostgres(directory / "postgres", free_ports(1)[0]) as server:
        server.create_databases()
        bench = Bench(directory, server.url("engram"))
        result: dict[str, Any] = {"fence_us": fence_cost(bench), "window": {}}
        yield result
        with prefect(bench) if with_prefect else nullcontext():
            for megabytes in sizes:
                tenant_id = f"size{megabytes}"
                paths, backup_id = bench.tenant(tenant_id, megabytes)
                found: dict[str, Any] = {
                    "bytes": _size(paths),
                    "core": window(bench, tenant_id, paths, backup_id, bench.restore),
                }
                if with_prefect:
                    found["flow"] = window(bench, tenant_id, paths, backup_id, bench.restore_with_prefect)
                result["window"][megabytes] = found
                shutil.rmtree(paths.root)
                shutil.rmtree(bench.settings.data_dir / "objects" / "tenants" / tenant_id)
                yield result
        bench.control_plane.close()


def show(result: dict[str, Any]) -> None:
    columns = ("locked_ms_quiet", "locked_ms", "locked_ms_max", "gap_ms", "gap_ms_max", "restore_seconds")
    print("size        ", *(f"{name:>16}" for name in columns), "   to the smallest")
    first: dict[str, float] = {}
    for megabytes, found in result["window"].items():
        for kind in ("core", "flow"):
            if kind in found:
                ratio = found[kind]["locked_ms"] / first.setdefault(kind, found[kind]["locked_ms"])
                values = (f"{found[kind][name]:16.2f}" for name in columns)
                print(f"{megabytes:>5} MB {kind}", *values, f"{ratio:12.2f} ×")
    fence = result["fence_us"]
    for what in ("read", "write"):
        cost, bare = fence[f"{what}_fence"], fence[f"{what}_bare"]
        print(f"fence, {what}: {cost:.2f} µs a request, {bare:.2f} without it ({cost / bare:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "restore_window.json")
    parser.add_argument("--sizes", default="1,100,1000", help="megabytes")
    parser.add_argument("--no-prefect", action="store_true", help="the core alone")
    arguments = parser.parse_args()
    wanted = [int(size) for size in arguments.sizes.split(",")]
    with tempfile.TemporaryDirectory(prefix="restore-window-", ignore_cleanup_errors=True) as directory:
        free_bytes = shutil.disk_usage(directory).free
        sizes = [size for size in wanted if size * 1_000_000 * _COPIES < free_bytes]
        if left_out := sorted(set(wanted) - set(sizes)):
            print(f"left out, {free_bytes:,} bytes are free: {left_out} MB")
        for result in run(Path(directory), sizes, with_prefect=not arguments.no_prefect):
            arguments.result.write_text(json.dumps(result, indent=2))
    show(result)
    print(f"written to {arguments.result}")


if __name__ == "__main__":
    main()
