"""What a check saw, and the whole of a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import msgspec

from shared.diagnosis.proposal import Proposal
from shared.playbook.action import Finding as Seen
from shared.receipt import Receipt

Subject = Literal["auth", "tenant-db", "latency", "metering", "backups"]
SUBJECTS: tuple[Subject, ...] = ("auth", "tenant-db", "latency", "metering", "backups")

# What the decision table knows, one word a cause. `shared.diagnosis.table` has a row for each.
Symptom = Literal[
    "control_plane_down",
    "gateway_down",
    "volume_read_only",
    "volume_full",
    "volume_slow",
    "wal_large",
    "worker_silent",
    "clock_off",
    "issuer_down",
    "keys_unknown",
    "tokens_refused",
    "tokens_missing",
    "restore_left",
    "in_maintenance",
    "permissions_wrong",
    "database_corrupt",
    "database_missing",
    "schema_too_new",
    "database_unreadable",
    "open_failures",
    "tenant_dominates",
    "machine_busy",
    "memory_short",
    "searches_slow",
    "slow",
    "errors",
    "rate_limited",
    "usage_lost",
    "partitions_missing",
    "segments_stuck",
    "segments_quarantined",
    "usage_late",
    "spool_half_full",
    "flush_failures",
    "store_refuses",
    "store_down",
    "backups_corrupt",
    "backups_stale",
    "drill_failed",
    "drills_late",
    "not_seen",
]


class Finding(Seen, frozen=True):
    """One thing that was looked at. `ok` None: it could not be seen, and `seen` says why.

    `symptom` is what the decision table reads; empty when `ok`. `facts` is what it needs beside: a tenant, a backup.
    """

    symptom: Symptom | Literal[""] = ""
    facts: Mapping[str, Any] = msgspec.field(default_factory=dict)


class Diagnosis(Receipt, frozen=True):
    """`proposal` None: nothing to do. `looked_at` is when the checks had ended."""

    subject: Subject
    tenant_id: str | None
    machine_id: str
    looked_at: datetime
    findings: list[Finding]
    proposal: Proposal | None

    @property
    def healthy(self) -> bool:
        """Whether all was seen and all of it is normal."""
        return all(f.ok for f in self.findings)

    @property
    def sentence(self) -> str:
        wrong = [f.name for f in self.findings if f.ok is False]
        unseen = [f.name for f in self.findings if f.ok is None]
        parts = [f"{', '.join(wrong)} not normal"] if wrong else []
        parts += [f"{', '.join(unseen)} could not be seen"] if unseen else []
        return "; ".join(parts) or f"all {len(self.findings)} checks are normal"


def good(name: str, seen: Any, normal: str, **facts: Any) -> Finding:
    return Finding(name, seen, normal, True, "", facts)


def bad(name: str, seen: Any, normal: str, symptom: Symptom, **facts: Any) -> Finding:
    return Finding(name, seen, normal, False, symptom, facts)


def unseen(name: str, cause: object, normal: str = "") -> Finding:
    return Finding(name, f"not seen: {' '.join(str(cause).split())[:300]}", normal, None, "not_seen")
