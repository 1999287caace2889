"""What there is of a tenant beside its directory and its objects: copies that a run of this machine has in its work
directory (`TENANT.sqlite…`, or below `*/TENANT/`, whatever made it), and uploads that were begun and have not ended.
For its deletion.
"""

from __future__ import annotations

import time
from pathlib import Path

from shared import uploads
from shared.settings import Settings
from shared.workdir import clear_dead

_PURPOSES = ("backup", "move", "safety", "verify")  # of `data_dir/tmp`; a restore test has the sandbox


def copies(settings: Settings, tenant_id: str) -> dict[str, int]:
    """Sizes in bytes by path below the data directory."""
    found: dict[str, int] = {}
    for parent in (settings.data_dir / "tmp", settings.sandbox_dir):
        for pattern in (f"*/{tenant_id}.sqlite*", f"*/*/{tenant_id}/**/*"):
            for path in parent.glob(pattern):
                found |= _size(path, settings.data_dir)
    return found


def _size(path: Path, root: Path) -> dict[str, int]:
    try:
        return {str(path.relative_to(root)): path.lstat().st_size} if path.is_symlink() or not path.is_dir() else {}
    except FileNotFoundError:  # its run has just ended
        return {}


def wait(settings: Settings, tenant_id: str, seconds: float) -> None:
    """Clear what dead runs left, and wait for the living to end with the tenant; who is left then, `copies` tells."""
    for purpose in _PURPOSES:
        clear_dead(settings.data_dir / "tmp", purpose)
    clear_dead(settings.sandbox_dir, "drill")
    deadline = time.monotonic() + seconds
    while copies(settings, tenant_id) and time.monotonic() < deadline:
        time.sleep(0.05)


def begun(settings: Settings, tenant_id: str) -> dict[str, int]:
    """Uploads of the tenant that have not ended, by `KEY#UPLOAD`; the size in bytes only of what a local store has."""
    return {upload.name: upload.size_bytes for upload in uploads.of_tenant(settings, tenant_id)}


def abort(settings: Settings, tenant_id: str) -> None:
    """End them. Whoever should still be at one gets an error."""
    uploads.abort(settings, uploads.of_tenant(settings, tenant_id))
