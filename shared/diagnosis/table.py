"""The decision table: findings → exactly one proposal, or nothing to do. Pure; no row looks at anything.

A row answers one symptom. The first row that has a finding decides, so the order is the argument: what is below all
else first (control plane, volume, gateway), then causes, then what may only be the effect of them, last what could not
be seen. A symptom without a row, or with two, does not get past the tests.

Where no action of ours helps, the proposal is to look closer and `why` says what a person has to do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import NamedTuple

from shared.diagnosis.finding import Finding, Symptom
from shared.diagnosis.proposal import Proposal, act, by_hand, run
from shared.engine import schema

_MOST_TENANTS = 20  # named in one command
Answer = Callable[[Finding], Proposal]


class Row(NamedTuple):
    symptom: Symptom
    answer: Answer


def decide(findings: Iterable[Finding]) -> Proposal | None:
    """The answer of the first row that has a finding; None when nothing is wrong."""
    found: dict[str, Finding] = {}
    for finding in findings:
        if finding.symptom:
            found.setdefault(finding.symptom, finding)
    return next((row.answer(found[row.symptom]) for row in ROWS if row.symptom in found), None)


def _volume(finding: Finding) -> str:
    return f"the volume {finding.facts.get('path', '')}".strip()


def _restore(finding: Finding) -> Proposal:
    """The only destructive one: the form is filled in, a person sends it."""
    tenant, backup_id = finding.facts["tenant_id"], finding.facts.get("backup_id")
    what = "is missing" if finding.symptom == "database_missing" else "is corrupt"
    if backup_id is None:
        return by_hand(
            f"the database of {tenant} {what} and there is no verified backup: look for one, and at engram.db.bak, "
            f"before anything is written",
            *("backups", tenant),
        )
    reason = f"diagnosis: the database {what}"
    return run(
        "restore",
        f"the database of {tenant} {what}: {finding.seen}; the newest verified backup is from "
        f"{finding.facts.get('backup_at', '?')}",
        *("restore", tenant, "--backup", str(backup_id), "--reason", reason),
        destructive=True,
        tenant_id=tenant,
        backup_id=str(backup_id),
        reason=reason,
    )


def _open_failures(finding: Finding) -> Proposal:
    why = f"the gateway fails to open a database that is whole on disk ({finding.seen}): its handles are stale"
    if tenant := finding.facts.get("tenant_id"):
        return act("restart-tenant", why, tenant=tenant)
    return act("restart-workers", f"{why}, and no tenant is named")


def _wal(finding: Finding) -> Proposal:
    why = f"a write-ahead log grows ({finding.seen}): a reader in the gateway never ends"
    if tenant := finding.facts.get("tenant_id"):
        return act("restart-tenant", why, tenant=tenant)
    return act("restart-workers", why)


def _backup(finding: Finding) -> Proposal:
    """Named tenants at once; too many for a command line: all that changed."""
    tenants: list[str] = list(finding.facts.get("tenants", ()))
    why = f"{finding.name}: {finding.seen}"
    if 0 < len(tenants) <= _MOST_TENANTS:
        return run("backup", why, "backup", *tenants, tenants=tenants, all=False)
    return run("backup", why, "backup", "--all", all=True)


def _again(finding: Finding) -> Proposal:
    tenant = finding.facts["tenant_id"]
    return Proposal(
        "wait",
        {"tenant_id": tenant},
        shlex.join(("engram", "diagnose", "tenant-db", tenant)),
        f"a restore of {tenant} is running ({finding.seen}): its writes come back by themselves; look again when it "
        f"has ended",
    )


def _rate(finding: Finding) -> Proposal:
    """Half of what the tenant asks for now: it stays served, the others get room."""
    tenant = finding.facts["tenant_id"]
    rps = max(1.0, float(round(finding.facts.get("rps", 2.0) / 2)))
    return act(
        "set-rate-limit",
        f"{tenant} takes most of this machine: {finding.seen}",
        *("--rps", f"{rps:g}"),
        tenant=tenant,
        arguments={"rps": rps},
        ttl=True,
    )


def _shed(classes: list[str], why: str) -> Proposal:
    return act("shed", why, ",".join(classes), arguments={"classes": classes}, ttl=True)


ROWS: tuple[Row, ...] = (
    # What everything stands on.
    Row(
        "control_plane_down",
        lambda f: by_hand(
            f"PostgreSQL does not answer ({f.seen}): bring it back. Requests are still served and usage waits on disk; "
            f"backups and restores do not run",
            "status",
        ),
    ),
    Row(
        "volume_read_only",
        lambda f: act(
            "volume-health",
            f"{_volume(f)} cannot be written ({f.name}: {f.seen}): mount it read-write again; its file system may have "
            f"found errors (dmesg)",
            reads=True,
        ),
    ),
    Row(
        "volume_full",
        lambda f: act(
            "volume-health",
            f"{_volume(f)} is full ({f.name}: {f.seen}): make it larger, or free space outside of tenants/ and spool/",
            reads=True,
        ),
    ),
    Row("gateway_down", lambda f: by_hand(f"the gateway does not answer ({f.seen}): start it, read its log", "status")),
    Row("worker_silent", lambda f: act("restart-workers", f"a worker does not answer: {f.seen}")),
    # Tokens.
    Row(
        "clock_off",
        lambda f: by_hand(f"this machine's clock is wrong ({f.seen}): tokens expire early or late; set it", "status"),
    ),
    Row(
        "issuer_down",
        lambda f: act(
            "jwks-status",
            f"the token issuer gives no keys ({f.seen}): call whoever runs it. Workers go on with the keys they have",
            reads=True,
        ),
    ),
    Row(
        "keys_unknown", lambda f: act("refresh-jwks", f"tokens are signed with keys the workers do not have: {f.seen}")
    ),
    Row(
        "tokens_refused",
        lambda f: act(
            "explain-token",
            f"tokens are refused although the keys are right ({f.seen}): find the check that one of them fails, and "
            f"compare issuer, audience and claims with the settings",
            reads=True,
            form=False,  # it takes a token, and everybody reads a run's parameters
        ),
    ),
    Row(
        "tokens_missing",
        lambda f: act("top", f"requests without a usable token ({f.seen}): a client, or somebody trying", reads=True),
    ),
    # One tenant's database: what a repair would trip over comes before the repair.
    Row(
        "restore_left", lambda f: run("sweep", f"a dead restore left {f.facts['tenant_id']} locked: {f.seen}", "sweep")
    ),
    Row("in_maintenance", _again),
    Row(
        "permissions_wrong",
        lambda f: act(
            "fix-permissions", f"the gateway may not open its files: {f.seen}", tenant=f.facts.get("tenant_id")
        ),
    ),
    Row("database_missing", _restore),
    Row("database_corrupt", _restore),
    Row(
        "schema_too_new",
        lambda f: by_hand(
            f"{f.facts['tenant_id']} was written by a newer build ({f.seen}; this one knows "
            f"v{schema.SCHEMA_VERSION}): start that build again",
            *("tenant", "show", f.facts["tenant_id"]),
        ),
    ),
    Row(
        "database_unreadable",
        lambda f: act(
            "volume-health",
            f"the database of {f.facts['tenant_id']} cannot be read ({f.seen}) and is not corrupt: the disk below it",
            reads=True,
        ),
    ),
    Row("open_failures", _open_failures),
    Row("wal_large", _wal),
    # Load.
    Row(
        "volume_slow",
        lambda f: act("volume-health", f"{_volume(f)} is slow ({f.seen}): every write waits", reads=True),
    ),
    Row("tenant_dominates", _rate),
    Row(
        "memory_short",
        lambda f: act(
            "cap-pool",
            f"memory is short: {f.seen}",
            "--open-databases",
            "256",
            arguments={"open_databases": 256},
            ttl=True,
        ),
    ),
    Row("machine_busy", lambda f: _shed(["search", "list"], f"the machine has more work than it can do: {f.seen}")),
    Row("searches_slow", lambda f: _shed(["search"], f"searches are slow: {f.seen}")),
    Row("slow", lambda f: act("top", f"slow ({f.seen}) without a cause seen here: who asks for what?", reads=True)),
    Row("errors", lambda f: act("top", f"errors ({f.seen}) without a cause seen here: whose, and where?", reads=True)),
    Row("rate_limited", lambda f: act("top", f"many are refused by their limits ({f.seen}): who?", reads=True)),
    # Usage.
    Row(
        "partitions_missing",
        lambda f: run(
            "retention",
            f"too few days have a partition ({f.seen}); its first step makes them",
            "retention",
            dry_run=False,
        ),
    ),
    Row("usage_late", lambda f: run("metering", f"usage waits on this machine: {f.seen}", "drain")),
    Row("spool_half_full", lambda f: run("metering", f"the spool fills: {f.seen}", "drain")),
    Row("segments_stuck", lambda f: run("metering", f"{f.seen}; given back to the drain when due", "drain")),
    Row("flush_failures", lambda f: act("volume-health", f"usage could not be written: {f.seen}", reads=True)),
    Row("usage_lost", lambda f: run("reconcile", f"{f.seen}: say for which tenants and days", "reconcile", days=3)),
    Row(
        "segments_quarantined",
        lambda f: run(
            "reconcile", f"{f.seen} with damage or what cannot be billed; see what the books lack", "reconcile", days=3
        ),
    ),
    # Backups.
    Row("store_refuses", lambda f: by_hand(f"the object store refuses us ({f.seen}): credentials, bucket", "status")),
    Row(
        "store_down", lambda f: by_hand(f"the object store does not answer ({f.seen}): its side, or the way", "status")
    ),
    Row("backups_corrupt", _backup),
    Row("backups_stale", _backup),
    Row("drill_failed", _backup),
    Row("drills_late", lambda f: run("restore-test", f"restore tests: {f.seen}", "restore-test")),
    Row(
        "not_seen", lambda f: by_hand(f"{f.name} could not be seen ({f.seen}): nothing is known to be wrong", "status")
    ),
)
