"""How long a run over a machine's tenants takes: all changed, 1% changed, none changed.

    python -m tests.bench.fleet [RESULT.json] [--tenants 5000] [--directory DIR]

Databases of 50 to 500 KB in one directory, the local object store beside them, the embedded PostgreSQL. Each run is a
process of its own, so that its peak of memory is its own; the clock runs over the run, not over the start of Python.

    cp + sha256     every database file read, hashed, written and fsynced by one thread: the floor of a whole backup
    first run       nobody has a backup; stored, read back, registered
    none changed    the same again: what an idle night costs
    1% changed      one memory written to every hundredth tenant
    all stats moved every file touched: snapshots are taken, found equal, and nothing is uploaded
    N at a time     a forced run over a fifth of the tenants with ENGRAM_BACKUP_PARALLEL=N

Read the ratios where other work takes the cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from deployments.postgres import EmbeddedPostgres
from shared import log, registry
from shared.control_plane import ControlPlane
from shared.durable import fsync_path, replace_link
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.generation import link_names
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.ports import free_ports

KILOBYTES = (50, 100, 150, 250, 500)
PARALLEL = (1, 2, 4)
_SAMPLES = 5  # a forced run is over this part of the tenants
_ROW = "INSERT INTO tenants (tenant_id, state, schema_version, machine_id) SELECT unnest(%s::text[]), 'active', 1, %s"

CHILD = """
import json, resource, sys, time
from shared import fleet_run, log
from shared.control_plane import ControlPlane
from shared.fleet import Fleet
from shared.fleet_run import Run
from shared.objects import ObjectStore
from shared.settings import settings
from shared.workdir import workdir
run_id, shard, shards, force = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "force"
s = settings()
log.configure("error")
objects = ObjectStore(s)
with ControlPlane(s) as control_plane:
    control_plane.ping()
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began, cpu = time.perf_counter(), time.process_time()
    run = Run(run_id, s.machine_id, "scheduled", shard, shards, force)
    with fleet_run.holding(s, run), workdir(s.data_dir / "tmp", "backup") as directory:
        fleet_run.begin(control_plane, run)
        chosen = fleet_run.choose(control_plane, run)
        work = Fleet(s, control_plane, objects, run)
        done = list(work.back_up(chosen, directory))
        work.record(done)
    seconds = time.perf_counter() - began
print(json.dumps({
    "seconds": seconds, "cpu_seconds": time.process_time() - cpu, "tenants": len(done),
    "made": sum(not d.skipped and not d.error for d in done), "skipped": sum(d.skipped for d in done),
    "failed": sum(d.error is not None for d in done), "causes": sorted({d.error for d in done if d.error})[:5],
    "rss_start_bytes": before_bytes, "rss_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "staging_peak_bytes": work.staging.peak_bytes,
}))
"""


class Machine:
    """`tenants` databases of one data directory."""

    def __init__(self, directory: Path, tenants: int, url: str) -> None:
        self.settings = Settings(data_dir=directory / "data", control_plane_url=url, machine_id="bench")  # type: ignore[arg-type]
        self.tenant_ids = [f"tenant-{n:05d}" for n in range(tenants)]
        self.environment = os.environ | {
            "ENGRAM_DATA_DIR": str(self.settings.data_dir),
            "ENGRAM_CONTROL_PLANE_URL": url,
            "ENGRAM_MACHINE_ID": "bench",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        }

    def make(self) -> int:
        """Copies of a few databases, each told whose it is; the bytes of all."""
        with ControlPlane(self.settings) as control_plane:
            control_plane.migrate()
            samples = [self._sample(control_plane, kilobytes) for kilobytes in KILOBYTES]
            with control_plane.transaction() as connection:
                connection.execute("DELETE FROM tenants")
                connection.execute(_ROW, (self.tenant_ids, self.settings.machine_id))
        for n, tenant_id in enumerate(self.tenant_ids):
            self._copy(samples[n % len(samples)], tenant_id)
        return sum(file.stat().st_size for file in self.files())

    def _sample(self, control_plane: ControlPlane, kilobytes: int) -> Path:
        paths = TenantPaths.of(self.settings.tenants_dir, f"sample-{kilobytes}")
        registry.create(control_plane, self.settings, paths.tenant_id)
        chance, file = random.Random(kilobytes), paths.database.resolve()
        with closing(TenantDatabase(paths)) as database:
            while file.stat().st_size < kilobytes * 1000:
                with database.write() as connection:
                    for _ in range(10):
                        memories.create(connection, NewMemory(chance.randbytes(150).hex(), tags=["bench"]))
                    connection.execute("SELECT 1")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sample = self.settings.data_dir / f"{paths.tenant_id}.sqlite"
        file.rename(sample)
        shutil.rmtree(paths.root)
        return sample

    def _copy(self, sample: Path, tenant_id: str) -> None:
        paths = TenantPaths.of(self.settings.tenants_dir, tenant_id)
        directory = paths.generation_dir(1)
        directory.mkdir(parents=True)
        shutil.copyfile(sample, directory / "engram.db")
        with closing(sqlite3.connect(directory / "engram.db", isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("UPDATE meta SET value = ? WHERE key = 'tenant_id'", (tenant_id,))
        paths.lock.touch()
        replace_link(paths.current, "generations/000001")
        link_names(paths)

    def files(self) -> list[Path]:
        return [self.settings.tenants_dir / t / "generations/000001/engram.db" for t in self.tenant_ids]

    def write(self, every: int) -> None:
        for tenant_id in self.tenant_ids[::every]:
            with (
                closing(TenantDatabase(TenantPaths.of(self.settings.tenants_dir, tenant_id))) as database,
                database.write() as connection,
            ):
                memories.create(connection, NewMemory("written between two runs"))

    def floor(self) -> float:
        """Seconds of `cp` + sha256 + fsync of every file."""
        to = self.settings.data_dir / "floor"
        to.mkdir()
        began = time.perf_counter()
        for n, file in enumerate(self.files()):
            data = file.read_bytes()
            hashlib.sha256(data).hexdigest()
            (to / str(n)).write_bytes(data)
            fsync_path(to / str(n))
        seconds = time.perf_counter() - began
        shutil.rmtree(to)
        return seconds

    def run(self, name: str, *, parallel: int = 0, shard: int = 0, shards: int = 1, force: bool = False) -> Any:
        chosen = {"ENGRAM_BACKUP_PARALLEL": str(parallel)} if parallel else {}
        words = [sys.executable, "-c", CHILD, name, str(shard), str(shards), "force" if force else "changed"]
        said = subprocess.run(words, env=self.environment | chosen, check=True, capture_output=True, text=True).stdout
        return {"name": name, **json.loads(said)}


def measure(machine: Machine) -> Iterator[dict[str, Any]]:
    began = time.perf_counter()
    size = machine.make()
    print(f"{len(machine.tenant_ids)} databases, {size / 1e6:,.0f} MB, made in {time.perf_counter() - began:.0f} s")
    time.sleep(2.5)  # younger than two seconds proves nothing
    floor = machine.floor()
    yield {"name": "cp + sha256", "seconds": floor, "tenants": len(machine.tenant_ids), "bytes": size}
    yield machine.run("first run")
    yield machine.run("none changed")
    machine.write(every=100)
    yield machine.run("1% changed")
    for file in machine.files():
        os.utime(file)
    time.sleep(2.5)
    yield machine.run("all stats moved")
    yield machine.run("none changed again")
    for parallel in PARALLEL:
        name = f"{parallel} at a time"
        yield machine.run(name, parallel=parallel, shard=0, shards=_SAMPLES, force=True)


def show(found: dict[str, Any]) -> None:
    rate = found["tenants"] / found["seconds"]
    line = f"{found['name']:20}{found['seconds']:9.2f} s{rate:9.0f}/s"
    if "made" in found:
        line += f"{found['made']:7}{found['skipped']:9}{found['failed']:8}{found['cpu_seconds']:9.1f} s"
        line += f"{found['rss_peak_bytes'] / 1e6:8.0f} MB{found['staging_peak_bytes'] / 1e6:9.2f} MB"
    print(line, *found.get("causes", []), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "fleet.json")
    parser.add_argument("--tenants", type=int, default=5_000)
    parser.add_argument("--directory", type=Path, help="a disk with four times the databases' bytes free")
    arguments = parser.parse_args()
    log.configure("error")
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="fleet-", dir=arguments.directory, ignore_cleanup_errors=True) as made,
        EmbeddedPostgres(Path(made), free_ports(1)[0]) as postgres,
    ):
        postgres.create_databases()
        columns = f"{'':20}{'seconds':>11}{'tenants':>11}{'made':>7}{'skipped':>9}{'failed':>8}{'CPU':>11}"
        print(columns + f"{'RSS peak':>11}{'staged peak':>12}")
        for found in measure(Machine(Path(made), arguments.tenants, postgres.url("engram"))):
            results.append(found)
            show(found)
            arguments.result.write_text(json.dumps(results, indent=2))
    print(f"written to {arguments.result}")


if __name__ == "__main__":
    main()
