"""Every path and every object key of a tenant, and who has a directory; nothing else.

    {data_dir}/tenants/{tenant_id}/
        engram.db       -> current/engram.db        the active database (a link that never changes)
        engram.db.bak   -> current/engram.db.bak    the one before the last restore
        current         -> generations/000002       the ONLY thing a restore moves, by one rename(2)
        generations/000001/engram.db                a generation owns its file and its -wal
        generations/000002/engram.db
        generations/000002/engram.db.bak -> ../000001/engram.db
        restore.sqlite                              a snapshot on its way in
        lock                                        flock: shared = in use, exclusive = being swapped
        restore.lock                                flock: one restore at a time on this machine
        maintenance                                 mark: writes answer 503 while it exists
        moving                                      on its way to or from another machine (`shared.move_disk`)
        departed        -> generations/000002       what `current` is called once the tenant has left this machine

Because `engram.db` and `engram.db.bak` both go through `current`, one atomic rename moves the pair: there is
no instant, and no crash, at which they disagree. A generation is a directory, so a left-over `-wal` can never
be replayed into another generation's file (FACTS: renaming databases in place mixed the data 42 times of 47).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shared.errors import UnsafeTenantId

TENANT_ID_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
_TENANT_ID = re.compile(TENANT_ID_PATTERN.removesuffix("$") + r"\Z")
_KEY = re.compile(
    r"tenants/(?P<tenant>[a-z0-9][a-z0-9_-]{0,62})/db/(?P<ts>\d{8}T\d{6}\.\d{6}Z)_v(?P<v>\d{1,9})\.sqlite"
    r"(?:\.zst)?(?:\.age)?\Z",
    re.ASCII,
)
_TS_FORMAT = "%Y%m%dT%H%M%S.%fZ"


def check_tenant_id(tenant_id: str) -> str:
    """Return the id unchanged, or raise `UnsafeTenantId`. Every path below goes through this."""
    if not isinstance(tenant_id, str) or not _TENANT_ID.match(tenant_id):
        raise UnsafeTenantId(f"tenant id {tenant_id!r:.80} does not match {TENANT_ID_PATTERN}")
    return tenant_id


def is_tenant_id(text: str) -> bool:
    return _TENANT_ID.match(text) is not None


def tenants_on_disk(tenants_dir: Path, *, missing_ok: bool = False) -> list[str]:
    """The ids that have a directory there, sorted. Raises `FileNotFoundError` unless `missing_ok`."""
    try:
        with os.scandir(tenants_dir) as entries:
            return sorted(entry.name for entry in entries if is_tenant_id(entry.name))
    except FileNotFoundError:
        if missing_ok:
            return []
        raise


@dataclass(frozen=True, slots=True)
class TenantPaths:
    """The files of one tenant. Making one touches no disk."""

    tenant_id: str
    root: Path

    @classmethod
    def of(cls, tenants_dir: Path, tenant_id: str) -> TenantPaths:
        return cls(tenant_id, tenants_dir / check_tenant_id(tenant_id))

    @property
    def database(self) -> Path:
        return self.root / "engram.db"

    @property
    def backup(self) -> Path:
        return self.root / "engram.db.bak"

    @property
    def current(self) -> Path:
        return self.root / "current"

    @property
    def generations(self) -> Path:
        return self.root / "generations"

    @property
    def restore_file(self) -> Path:
        return self.root / "restore.sqlite"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def restore_lock(self) -> Path:
        return self.root / "restore.lock"

    @property
    def mark(self) -> Path:
        return self.root / "maintenance"

    @property
    def moving(self) -> Path:
        return self.root / "moving"

    @property
    def departed(self) -> Path:
        return self.root / "departed"

    def generation_dir(self, generation: int) -> Path:
        return self.generations / f"{generation:06d}"

    def generation(self) -> int:
        """The active generation's number. Raises `FileNotFoundError` when the tenant has no database here."""
        return int(os.path.basename(os.readlink(self.current)))


def object_key(tenant_id: str, ts: datetime, schema_version: int, suffix: str = "") -> str:
    """`tenants/{tenant_id}/db/{ts}_v{schema_version}.sqlite{suffix}`, ts in UTC with microseconds.

    The suffix says what the object is packed with: `.zst`, `.age` or `.zst.age`; see `shared.pack`.
    """
    stamp = ts.astimezone(UTC).strftime(_TS_FORMAT)
    return f"tenants/{check_tenant_id(tenant_id)}/db/{stamp}_v{schema_version}.sqlite{suffix}"


@dataclass(frozen=True, slots=True)
class KeyParts:
    tenant_id: str
    ts: datetime
    schema_version: int


def parse_object_key(key: str) -> KeyParts | None:
    """The inverse of `object_key`; None for a key that is not one of ours."""
    m = _KEY.match(key)
    if m is None:
        return None
    try:
        ts = datetime.strptime(m["ts"], _TS_FORMAT).replace(tzinfo=UTC)
    except ValueError:  # digits, but no date
        return None
    return KeyParts(m["tenant"], ts, int(m["v"]))
