"""What clients were answered, request by request, and whether PostgreSQL bills exactly that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

import psycopg

from shared.usage import Counters, count
from tests.metering_fixtures import COUNTERS


@dataclass
class Ledger:
    """What the clients know of one tenant: each answer by the request id it carried, and how many never came."""

    answers: dict[UUID, tuple[str, int]] = field(default_factory=dict)
    unanswered: int = 0


def check_billed(url: str, ledgers: dict[str, list[Ledger]]) -> Counter[str]:
    """Answered = rows = rollups in that database, tenant by tenant; what has no answer is there at most once."""
    totals = Counter[str]()
    for tenant, parts in ledgers.items():
        answers = {k: v for part in parts for k, v in part.answers.items()}
        assert len(answers) == sum(len(part.answers) for part in parts)  # ids are never given twice
        unanswered = sum(part.unanswered for part in parts)
        with psycopg.connect(url) as connection:
            stored = {
                row[0]: row[1:]
                for row in connection.execute(
                    f"SELECT request_id, route, status, {', '.join(COUNTERS)} FROM usage_events WHERE tenant_id = %s",
                    (tenant,),
                )
            }
            for key, (route, status) in answers.items():
                if status >= 500 and key not in stored:
                    totals["answers that reached no tenant"] += 1  # a worker that had not read the tenants yet
                    continue
                created = int((route, status) == ("/v1/memories", 201))
                assert stored.get(key) == (route, status, *count(route, status, created)), (tenant, key)
            extra = stored.keys() - answers.keys()
            assert len(extra) <= unanswered, tenant
            for table, unit in (("usage_hourly", "hour"), ("usage_daily", "day")):
                rolled = {
                    row[0]: Counters(*row[1:])
                    for row in connection.execute(
                        f"SELECT bucket, {', '.join(COUNTERS)} FROM {table} WHERE tenant_id = %s", (tenant,)
                    )
                }
                assert rolled == sums_of(stored, unit), (tenant, table)
        totals["answered"] += len(answers)
        totals["rows"] += len(stored)
        totals["rows whose answer was lost"] += len(extra)
        totals["requests without an answer"] += unanswered
        for _, status in answers.values():
            totals[f"{status // 100}xx"] += 1
    return totals


def sums_of(stored: dict[UUID, tuple[object, ...]], unit: str) -> dict[datetime, Counters]:
    """What the rollups must say of these rows: by the time in the id."""
    found: dict[datetime, Counters] = {}
    for key, (_, _, *counters) in stored.items():
        at = datetime.fromtimestamp((key.int >> 80) / 1000, UTC).replace(minute=0, second=0, microsecond=0)
        bucket = at if unit == "hour" else at.replace(hour=0)
        sums = found.get(bucket, Counters(0, 0, 0))
        found[bucket] = Counters(*(a + int(str(b)) for a, b in zip(sums, counters, strict=True)))
    return found
