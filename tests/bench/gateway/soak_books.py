"""What the clients of a soak were told beside what was kept of it, line by line. Exact: a tolerance would hide the one
lost event this is about."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import Any

import psycopg

from shared import spool
from shared.engine.database import TenantDatabase
from tests.bench.gateway.world import World


class Books:
    """`lines` are {line, told, kept, differing}; `failures` say what does not agree."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.lines: list[dict[str, Any]] = []
        self.failures: list[str] = []

    def compare(
        self, tenants: list[str], statuses: Counter[str], sent: Counter[tuple[str, str]], seed_memories: int
    ) -> None:
        """`statuses` of the answers; requests `sent` by tenant and kind (search, get, create)."""
        settings = self._world.settings
        calls = {t: sum(sent[t, kind] for kind in ("search", "get", "create")) for t in tenants}
        searches = {t: sent[t, "search"] for t in tenants}
        creates = {t: sent[t, "create"] for t in tenants}
        with psycopg.connect(settings.control_plane_url.get_secret_value()) as connection:

            def counted(sql: str) -> dict[str, int]:
                return {str(key): int(n) for key, n in connection.execute(sql).fetchall()}

            events = counted("SELECT status, count(*) FROM usage_events GROUP BY 1")
            self._book("answers | events, by status", dict(statuses), events)
            by_tenant = "SELECT tenant_id, count(*) FROM usage_events GROUP BY 1"
            self._book("requests sent | events, by tenant", calls, counted(by_tenant))
            told_in = {"api_calls": calls, "search_queries": searches, "memories_created": creates}
            for table in ("usage_hourly", "usage_daily"):
                for column, told in told_in.items():
                    rolled = counted(f"SELECT tenant_id, sum({column}) FROM {table} GROUP BY 1")
                    self._book(f"requests sent | {table}.{column}, by tenant", told, rolled)
            set_aside = counted("SELECT reason, count(*) FROM usage_quarantine GROUP BY 1")
            self._book("nothing | quarantined events", {}, set_aside)
            [row] = connection.execute("SELECT sum(duplicates), sum(corrupt_bytes) FROM usage_segments").fetchall()
            self._book(
                "nothing | duplicate events, corrupt bytes",
                {"duplicates": 0, "corrupt": 0},
                dict(zip(("duplicates", "corrupt"), map(int, row), strict=True)),
            )
        memories = {t: self._memories(t) - seed_memories for t in tenants}
        self._book("creates acknowledged | memories in the databases, by tenant", creates, memories)
        left = [*spool.sealed(settings.spool_dir), *settings.spool_dir.glob("*.open")]
        if left:
            self.failures.append(f"segments left in the spool: {[p.name for p in left]}")

    def _book(self, what: str, told: dict[str, int], kept: dict[str, int]) -> None:
        differing = {k: (told.get(k, 0), kept.get(k, 0)) for k in told | kept if told.get(k, 0) != kept.get(k, 0)}
        line = {"line": what, "told": sum(told.values()), "kept": sum(kept.values()), "differing": differing}
        self.lines.append(line)
        if differing:
            self.failures.append(f"{what}: told {line['told']}, kept {line['kept']}, differing {differing}")

    def _memories(self, tenant_id: str) -> int:
        with closing(TenantDatabase(self._world.paths(tenant_id))) as handle, handle.read() as connection:
            count: int = connection.execute("SELECT count(*) FROM memories").fetchone()[0]
            return count
