"""What a backup costs beside `cp` and sha256 of the same file: `python -m tests.bench.backup`.

    python -m tests.bench.backup [RESULT.json] [--sizes 1,100,1000] [--rounds 3] [--s3] [--judged]

One database a size; all ways of copying it take turns, round by round, so that whatever else this machine does falls
on all of them. Read the ratios: to_sha256sum and to_openssl are a backup's time by those of the first two ways, the
median over the rounds. `--rounds 15,5,1` gives each size its own; `--judged` leaves out all but `cp` and the backup.

    cp + sha256sum         `cp`, then coreutils' sha256sum of the copy: nothing checked, nothing synced
    cp + sha256            the same with OpenSSL's sha256 in this process (hashlib), which starts one process less
    cp + sha256sum + sync  the first, and what a backup promises beside it: `sync` of the copy and of its directory
    backup                 take → store: consistent, integrity and foreign keys checked, hashed, uploaded, durable; the
                           upload is written down in the control plane before; into a local store on the same
                           filesystem (a link). This is what the issue compares
    backup + its row       the same with its registration in the catalogue: the whole of a backup
    … again                the same once more by the same process (the median of a few), as a run over a fleet makes
                           them: the first pays for what a process does once
    backup, other disk     into a local store on another filesystem (a copy that is hashed)
    backup, zstd | + age   packed
    backup, S3             into SeaweedFS, read back (with --s3)
    restic, Litestream     a first snapshot of the file into a new local repository

Each with a writer beside it and without; with one, the longest commit of the writer meanwhile, and while only it ran.
`restore` brings the copy back to a file: `backup.fetch` with its sha256, `restic restore`, `litestream restore`.
Content is half random, half digits of it (zstd halves it). A process of its own makes each backup; its start is not
counted for ours and cannot be taken off the others', which matters at 1 MB alone; as `engram backup` does, it has
looked the tenant up in the control plane before. `rss` is its VmHWM in megabytes. What a writer added is taken away
again after its round: killed, it leaves a `-wal` of four megabytes, which the next to open the database has to read.

restic comes from PATH, Litestream from where the product looks. What is not there is "not installed", never a number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

from deployments.postgres import EmbeddedPostgres
from shared import catalogue, keys, registry
from shared.control_plane import ControlPlane
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.bench.backup_peers import TOOLS, cp, find_litestream, litestream, restic
from tests.core_fixtures import start_child
from tests.ports import free_ports

ABSENT = "not installed"
SMALL_MB = 10
PACKINGS = {"backup": {}, "backup, zstd": {"zstd"}, "backup, zstd + age": {"zstd", "age"}}

CHILD = """
    import json, statistics, sys, time
    from pathlib import Path
    from shared import backup, catalogue, registry
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore
    from shared.settings import Settings
    settings, what, tenant_id, file, again = Settings(), *sys.argv[1:]
    objects, clock = ObjectStore(settings), time.perf_counter
    with ControlPlane(settings) as control_plane:
        registry.get_active(control_plane, tenant_id)
        def once():
            begun = clock()
            with backup.work(settings.data_dir / "tmp", "bench") as directory:
                taken = backup.take(settings, tenant_id, directory)
                snapshot = clock() - begun
                stored = backup.store(objects, taken, control_plane)
                total = clock() - begun
                made = backup.register(control_plane, stored)
            return {"snapshot": snapshot, "store": total - snapshot, "total": total, "with_row": clock() - begun}, made
        def fetched():
            begun, made = clock(), catalogue.newest(control_plane, tenant_id)
            got = backup.fetch(objects, made, Path(file), control_plane)
            parts = {n: getattr(got, f"{n}_ms") / 1000 for n in ("download", "decrypt", "decompress", "write")}
            return parts | {"total": clock() - begun}, made
        window = [time.time()]
        seconds, made = once() if what == "backup" else fetched()
        window.append(time.time())
        more = [once()[0] for _ in range(int(again))]
    rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    more = {name: statistics.median(m[name] for m in more) for name in seconds} if more else None
    found = {"seconds": seconds, "again": more, "rss_mb": rss / 1024, "stored_bytes": made.stored_bytes}
    print(json.dumps(found | {"window": window}))
"""

WRITER = """
    import os, struct, sys, time
    from pathlib import Path
    from shared.engine import memories
    from shared.engine.database import TenantDatabase
    from shared.tenant import TenantPaths
    tenant = TenantDatabase(TenantPaths.of(Path(sys.argv[1]), sys.argv[2]))
    log = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while True:
        begun = time.time()
        with tenant.write() as connection:
            memories.create(connection, memories.NewMemory("a small memory"))
        os.write(log, struct.pack("dd", begun, time.time()))
        time.sleep(0.002)
"""


class Bench:
    """One control plane, one data directory, one tenant a size; a settings object for each way of storing."""

    def __init__(self, directory: Path, url: str, s3: dict[str, Any] | None, litestream: str | None) -> None:
        self.directory, self.litestream = directory, litestream
        base = {"data_dir": directory / "data", "control_plane_url": url, "backup_master_key": keys.new_master()[0]}
        self.ways = {name: dict(base) for name in PACKINGS}
        for name, packing in PACKINGS.items():
            self.ways[name] |= {"backup_compression": "zstd"} if "zstd" in packing else {}
            self.ways[name] |= {"backup_encryption": "age"} if "age" in packing else {}
        other = Path(tempfile.mkdtemp(dir="/dev/shm")) if Path("/dev/shm").is_dir() else None
        self.other = other
        if other is not None:
            self.ways["backup, other disk"] = base | {"object_store_url": other.as_uri()}
        if s3 is not None:
            self.ways["backup, S3"] = base | {"object_store_url": f"s3://engram/{uuid4().hex}", **s3}
        self.settings = Settings(**base)  # type: ignore[arg-type]
        self.control_plane = ControlPlane(self.settings)
        self.control_plane.migrate()

    def close(self) -> None:
        self.control_plane.close()
        if self.other is not None:
            shutil.rmtree(self.other)

    def tenant(self, megabytes: int) -> str:
        tenant_id = f"mb-{megabytes}"
        registry.create(self.control_plane, self.settings, tenant_id)
        database = TenantDatabase(TenantPaths.of(self.settings.tenants_dir, tenant_id))
        file = TenantPaths.of(self.settings.tenants_dir, tenant_id).database
        try:
            while file.stat().st_size < megabytes * 1_000_000:
                with database.write() as connection:
                    for number in range(min(1_000, 60 * megabytes)):
                        memories.create(connection, NewMemory(f"memory {number} " + os.urandom(4_000).hex()))
                with database.read() as connection:
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            database.close()
        if megabytes <= SMALL_MB:
            shutil.copy(file, self.directory / tenant_id)
        return tenant_id

    def reset(self, megabytes: int, tenant_id: str) -> None:
        """The database as it was made; a large one only without the `-wal`. Nobody has it open."""
        file = Path(os.path.realpath(TenantPaths.of(self.settings.tenants_dir, tenant_id).database))
        if megabytes > SMALL_MB:
            with contextlib.closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return
        for name in (file.name, f"{file.name}-wal", f"{file.name}-shm"):
            file.with_name(name).unlink(missing_ok=True)
        shutil.copy(self.directory / tenant_id, file)

    def child(self, way: str, what: str, tenant_id: str, *, again: int = 0) -> dict[str, Any]:
        env = os.environ | {f"ENGRAM_{k.upper()}": str(v) for k, v in self.ways[way].items()}
        with _environment(env):
            process = start_child(CHILD, what, tenant_id, self.directory / "back.sqlite", again)
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{way}: {what} failed")
        return dict(json.loads(out))

    def clear(self, way: str, tenant_id: str) -> None:
        """Make room: what the last round stored."""
        settings = Settings(**self.ways[way])  # type: ignore[arg-type]
        objects = ObjectStore(settings)
        for made in catalogue.list_of(self.control_plane, tenant_id):
            objects.delete(made.key)
        with self.control_plane.transaction() as connection:
            connection.execute("DELETE FROM backups WHERE tenant_id = %s", (tenant_id,))


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Writer:
    """Another process that commits one memory after the other, and how long each took."""

    def __init__(self, bench: Bench, tenant_id: str) -> None:
        self._log = bench.directory / "commits"
        self._log.unlink(missing_ok=True)
        self.process = start_child(WRITER, bench.settings.tenants_dir, tenant_id, self._log)
        while not self._log.exists() or not self._log.stat().st_size:
            time.sleep(0.01)

    def longest_ms(self, begun: float, ended: float) -> float:
        """The longest commit that was under way between two instants."""
        data = self._log.read_bytes()
        commits = struct.iter_unpack("dd", data[: len(data) // 16 * 16])
        return max((e - b for b, e in commits if e > begun and b < ended), default=0.0) * 1000

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def measure(bench: Bench, megabytes: int, rounds: int, *, judged: bool) -> list[dict[str, Any]]:
    tenant_id = bench.tenant(megabytes)
    file = Path(os.path.realpath(TenantPaths.of(bench.settings.tenants_dir, tenant_id).database))
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def note(way: str, what: str, beside: str, run: Callable[[], dict[str, Any]], writer: Writer | None) -> None:
        os.sync()
        time.sleep(0.1 if writer is not None else 0.0)  # the commit that waited for the sync is over
        begun = time.time()
        result = run()
        if writer is not None:
            result["longest_commit_ms"] = writer.longest_ms(*result.pop("window", (begun, time.time())))
        for name, one in _ways(way, result):
            found.setdefault((name, what, beside), []).append(one)

    again, alone = 5 if megabytes <= SMALL_MB else 1, 1.0 if judged else 3.0
    for _ in range(rounds):
        for beside in ("idle", "writer"):
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(Writer(bench, tenant_id)) if beside == "writer" else None
                if writer is not None:
                    note(
                        "writer alone",
                        "commit",
                        beside,
                        lambda: time.sleep(alone) or {"seconds": {"total": alone}},
                        writer,
                    )
                for tool in TOOLS:
                    note(f"cp + {tool}", "backup", beside, lambda t=tool: cp(file, bench.directory, t), writer)
                for way in bench.ways if beside == "idle" and not judged else ["backup"]:
                    note(way, "backup", beside, lambda w=way: bench.child(w, "backup", tenant_id, again=again), writer)
                    if beside == "idle" and not judged:
                        note(way, "restore", beside, lambda w=way: bench.child(w, "fetch", tenant_id), None)
                        (bench.directory / "back.sqlite").unlink()
                    bench.clear(way, tenant_id)
            bench.reset(megabytes, tenant_id)
        peers: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]] | None] = {
            "restic": (lambda: restic(file, bench.directory)) if shutil.which("restic") else None,
            "Litestream": (lambda p=bench.litestream: litestream(p, file, bench.directory))
            if bench.litestream
            else None,
        }
        for name, peer in peers.items() if not judged else ():
            os.sync()
            made, back = peer() if peer is not None else ({}, {})
            found.setdefault((name, "backup", "idle"), []).append(made)
            found.setdefault((name, "restore", "idle"), []).append(back)
    return [_row(megabytes, *key, results, found) for key, results in found.items()]


def _ways(way: str, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What one child measured: with the row and without, the first of its process and the others."""
    yield way, result
    for seconds, when in ((result["seconds"], ""), (result.get("again"), ", again")):
        if seconds and "with_row" in seconds:
            if when:
                yield way + when, {"seconds": seconds}
            yield f"{way} + its row{when}", {"seconds": {"total": seconds["with_row"]}}


def _row(
    megabytes: int, way: str, what: str, beside: str, results: list[dict[str, Any]], found: dict[Any, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"megabytes": megabytes, "way": way, "what": what, "beside": beside}
    if not results[0]:
        return row | {"seconds": ABSENT}
    parts = {name: round(median(r["seconds"][name] for r in results), 4) for name in results[0]["seconds"]}
    parts.pop("with_row", None)
    row |= {"seconds": parts.pop("total"), "parts": parts, "rounds": len(results)}
    if what == "backup":
        for name, tool in (("to_sha256sum", "cp + sha256sum"), ("to_openssl", "cp + sha256")):
            floor = [r["seconds"]["total"] for r in found[(tool, "backup", beside)]]
            row[name] = round(median(r["seconds"]["total"] / f for r, f in zip(results, floor, strict=True)), 2)
    for name in ("rss_mb", "longest_commit_ms"):
        values = [r[name] for r in results if r.get(name) is not None]
        row |= {name: round(max(values), 1)} if values else {}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    columns = (
        "megabytes",
        "beside",
        "what",
        "way",
        "seconds",
        "to_sha256sum",
        "to_openssl",
        "rss_mb",
        "longest_commit_ms",
        "parts",
    )
    table = [[str(row.get(c, "")) if c != "parts" else _parts(row) for c in columns] for row in rows]
    table.sort(key=lambda r: (int(r[0]), r[2], r[1]))
    widths = [max(len(line[i]) for line in [list(columns), *table]) for i in range(len(columns))]
    for line in [list(columns), *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _parts(row: dict[str, Any]) -> str:
    return " ".join(f"{name} {seconds}" for name, seconds in row.get("parts", {}).items() if seconds)


@contextlib.contextmanager
def seaweed() -> Iterator[dict[str, Any]]:
    """The tests' SeaweedFS, without pytest around it."""
    from tests import s3_fixtures

    with tempfile.TemporaryDirectory(prefix="engram-bench-s3-") as directory:

        class Factory:
            def mktemp(self, name: str) -> Path:
                path = Path(directory) / name
                path.mkdir()
                return path

        make = s3_fixtures.s3.__wrapped__(Factory())  # type: ignore[attr-defined]
        try:
            yield next(make)
        finally:
            make.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A backup beside cp, sha256, restic and Litestream.")
    parser.add_argument("result", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "backup.json")
    parser.add_argument("--sizes", default="1,100,1000", help="megabytes, comma-separated")
    parser.add_argument("--rounds", default="3", help="one number, or one a size, comma-separated")
    parser.add_argument("--judged", action="store_true", help="only cp and the backup, idle and under a writer")
    parser.add_argument("--s3", action="store_true", help="also into SeaweedFS (at most a few hundred megabytes)")
    options = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engram-bench-backup-")))
        postgres = stack.enter_context(EmbeddedPostgres(directory / "postgres", free_ports(1)[0]))
        s3 = stack.enter_context(seaweed()) if options.s3 else None
        bench = Bench(directory, postgres.url("engram"), s3, find_litestream(Settings()))
        stack.callback(bench.close)
        sizes, rounds = [int(n) for n in options.sizes.split(",")], [int(n) for n in options.rounds.split(",")]
        for megabytes, count in zip(sizes, rounds * len(sizes) if len(rounds) == 1 else rounds, strict=True):
            rows += measure(bench, megabytes, count, judged=options.judged)
            options.result.write_text(json.dumps(rows, indent=2))
    show(rows)
    print(
        f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}; "
        f"a writer's longest commit is over all rounds"
    )
    print(f"JSON: {options.result}")


if __name__ == "__main__":
    main()
