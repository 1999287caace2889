"""Multipart uploads that were begun and never ended: a killed backup leaves its parts, unseen and paid for.

R2 aborts them by itself after seven days unless the bucket's lifecycle rules say otherwise. The local store's
counterpart is the file `NAME#1` that is given its name at the end.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shared.bucket import Bucket, Upload
from shared.durable import unlink
from shared.settings import Settings

_STAGED = re.compile(r"#\d+\Z")


def clear(settings: Settings, *, dry_run: bool = False) -> list[Upload]:
    """Abort uploads older than `retention_orphan_hours`; those. Raises `ObjectStoreUnavailable`, `ObjectStoreRefused`.

    An upload under way is never that old: a backup's whole run is shorter.
    """
    oldest = timedelta(hours=settings.retention_orphan_hours)
    found = [upload for upload in _begun(settings, "tenants/") if upload.age > oldest]
    if not dry_run:
        abort(settings, found)
    return found


def of_tenant(settings: Settings, tenant_id: str) -> list[Upload]:
    """Its uploads that have not ended, however old. Raises as `clear`."""
    return _begun(settings, f"tenants/{tenant_id}/")


def abort(settings: Settings, found: list[Upload]) -> None:
    """End uploads and remove what they stored. One that has ended meanwhile is fine."""
    if (root := _local_root(settings)) is not None:
        for upload in found:
            unlink(root / upload.name)
        return
    bucket = Bucket(settings)
    for upload in found:
        bucket.request("DELETE", upload.key, {"uploadId": upload.upload_id})


def _local_root(settings: Settings) -> Path | None:
    url = urlsplit(settings.object_store_url)
    return Path(unquote(url.path)) if url.scheme == "file" else None


def _begun(settings: Settings, prefix: str) -> list[Upload]:
    if (root := _local_root(settings)) is None:
        return list(Bucket(settings).uploads(prefix))
    found = []
    for path in (root / prefix).rglob("*.sqlite*#*"):
        if _STAGED.search(path.name):
            key, _, upload_id = str(path.relative_to(root)).rpartition("#")
            stat = path.stat()
            age = datetime.now(UTC) - datetime.fromtimestamp(stat.st_mtime, UTC)
            found.append(Upload(key, upload_id, age, stat.st_size))
    return found
