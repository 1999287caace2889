"""Backups: the object store, the catalogue's ages, the restore tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shared import catalogue
from shared.diagnosis.finding import Finding, bad, good
from shared.diagnosis.sight import HTTP_TIMEOUT_SECONDS, Sight
from shared.errors import ObjectStoreRefused, ObjectStoreUnavailable
from shared.objects import ObjectStore

DRILL_DAYS = 8.0  # a run a week, and a day for it to be late
_LISTED = 100
_DAY_SECONDS = 86_400.0


def reachable(sight: Sight) -> Finding:
    """One page of a listing, without the patience that backups have."""
    name, normal = "object-store", "answers a listing"
    url = urlsplit(sight.settings.object_store_url)
    root = Path(unquote(url.path))
    if url.scheme == "file" and not root.is_dir():
        if root.is_relative_to(sight.settings.data_dir):  # made by the first backup
            return good(name, "nothing was ever stored", normal)
        return bad(name, f"{root} is not there", normal, "store_down")
    begun = time.monotonic()
    hurried = {
        "object_store_retries": 0,
        "object_store_timeout_seconds": HTTP_TIMEOUT_SECONDS,
        "object_store_retry_timeout_seconds": HTTP_TIMEOUT_SECONDS,
    }
    try:
        next(ObjectStore(sight.settings.model_copy(update=hurried)).listing("tenants"), None)
    except ObjectStoreRefused as e:
        return bad(name, str(e), normal, "store_refuses")
    except ObjectStoreUnavailable as e:
        return bad(name, str(e), normal, "store_down")
    return good(name, f"answers, in {(time.monotonic() - begun) * 1000:.0f} ms", normal)


def ages(sight: Sight) -> Finding:
    hours = sight.settings.backup_stale_hours
    name, normal = "last-good-backup", f"of every tenant younger than {hours:g} h"
    stale = catalogue.stale(sight.control_plane, hours * 3600, tenant_id=sight.tenant_id, limit=_LISTED)
    if not stale:
        return good(name, "none is older", normal)
    worst = stale[0]
    many = f"{len(stale)} tenants" if len(stale) < _LISTED else f"{_LISTED} tenants or more"
    since = f"{worst['age_seconds'] / 3600:,.1f} h" + (" without any" if worst["backup_id"] is None else "")
    seen = f"{many}, the worst {worst['tenant_id']}: {since}"
    return bad(name, seen, normal, "backups_stale", tenants=[row["tenant_id"] for row in stale])


def corrupt(sight: Sight) -> Finding:
    """Tenants whose newest backup is corrupt or missing: an older good one, or none, is all they have."""
    rows = sight.control_plane.rows("backups_corrupt_newest", tenant_id=sight.tenant_id, limit=_LISTED)
    name, normal = "corrupt-backups", "no tenant's newest backup is corrupt"
    if not rows:
        return good(name, "none", normal)
    tenants = [row["tenant_id"] for row in rows]
    seen = f"{len(tenants)} tenants: {', '.join(tenants[:5])}"
    return bad(name, seen, normal, "backups_corrupt", tenants=tenants)


def drills(sight: Sight) -> list[Finding]:
    """What the last restore tests said, and whether there are any."""
    last: dict[str, dict[str, Any]] = {}
    for row in sight.control_plane.rows("drill_trend", tenant_id=sight.tenant_id, limit=_LISTED):
        if row["outcome"] != "inconclusive":
            last.setdefault(row["tenant_id"], row)
    failed = [tenant_id for tenant_id, row in last.items() if row["outcome"] == "fail"]
    seen, normal = f"{len(last) - len(failed)} of the last {len(last)} tenants passed", "each passes"
    found = [
        bad("restore-tests", f"{seen}; {', '.join(failed[:5])} failed", normal, "drill_failed", tenants=failed)
        if failed
        else good("restore-tests", seen, normal)
    ]
    ages_ = sight.control_plane.row("fleet_ages") or {}
    newest, oldest = ages_.get("drill_last_age_seconds"), ages_.get("drill_age_seconds")
    normal = f"one passed within {DRILL_DAYS:g} days"
    since = newest if newest is not None else oldest  # never: since the oldest tenant with a backup was made
    seen = "there is no backup to test" if since is None else f"{float(since) / _DAY_SECONDS:.1f} days ago"
    if newest is None and since is not None:
        seen = f"none yet; the oldest tenant with a backup is {float(since) / _DAY_SECONDS:.1f} days old"
    late = since is not None and float(since) > DRILL_DAYS * _DAY_SECONDS
    found.append(
        bad("last-restore-test", seen, normal, "drills_late") if late else good("last-restore-test", seen, normal)
    )
    return found
