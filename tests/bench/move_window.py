"""How long a move holds writes, by the size of the database, with a writer that never pauses and one that is idle.

    python -m tests.bench.move_window [MEGABYTES …]

Both machines on this host, the object store a directory: a network's time for one upload and one download of the
database comes on top, unless nothing was written since the first copy.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from deployments.postgres import EmbeddedPostgres
from shared import log
from shared.control_plane import ControlPlane
from tests.core_fixtures import settings_in
from tests.move_fixtures import Pair, Stubborn, new_pair, perform
from tests.ports import free_ports


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, metavar="MEGABYTES", default=[1, 10, 100])
    sizes = parser.parse_args().sizes
    log.configure("ERROR")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(EmbeddedPostgres(directory / "postgres", free_ports(1)[0]))
        control_plane = stack.enter_context(ControlPlane(settings_in(directory, postgres.url())))
        control_plane.migrate()
        for size in sizes:
            pair = new_pair(directory, postgres.url(), control_plane, f"mb{size}")
            _fill(pair, size)
            time.sleep(3)  # younger files prove nothing: `shared.fingerprint`
            idle = perform(pair).held_ms
            with Stubborn(pair.b, "w") as writer:
                busy = perform(pair).held_ms
            print(
                f"{size} MB: writes held for {idle:.0f} ms when idle, {busy:.0f} ms beside a writer;"
                f" {len(writer.acknowledged)} acknowledged, {len(pair.a.rows())} rows at the end"
            )


def _fill(pair: Pair, megabytes: int) -> None:
    """Memories of 2 KB, written at once."""
    with sqlite3.connect(pair.a.paths.database.resolve()) as connection:
        connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO memories (id, content, memory_type, tags, metadata, importance, created_at, updated_at,"
            " version) SELECT 'm' || i, hex(randomblob(1000)), 'note', '[]', '{}', 0, '2026-01-01T00:00:00+00:00',"
            " '2026-01-01T00:00:00+00:00', 1 FROM n",
            (megabytes * 300,),
        )
    connection.close()


if __name__ == "__main__":
    main()
