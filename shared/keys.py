"""The keys of encrypted backups: one age X25519 identity a tenant, wrapped by the master key, kept in `tenant_keys`.

    ENGRAM_BACKUP_MASTER_KEY   an age identity; never stored
      └ tenant_keys.wrapped    an age file for the master's recipient; inside, an age identity file of the tenant
          └ X.sqlite.zst.age   an age file for the tenant's recipient

Everything opens with the public tool: `age -d -i master.key wrapped.age > tenant.key`, `age -d -i tenant.key X.age`.

Erasing a tenant's rows makes its backups unreadable wherever copies of them lie (crypto-erasure), once PostgreSQL's
own history of the row is gone too: dead tuples until a vacuum, WAL and point-in-time copies until their retention.

Master rotation: put the new key in ENGRAM_BACKUP_MASTER_KEY and the old one in ENGRAM_BACKUP_MASTER_KEYS_OLDER, run
`rewrap`, drop the old one. Tenant rotation: `rotate`; the retired key still opens what it encrypted, and the next run
over all tenants stores this one anew, changed or not.

Nothing here puts a key into a message, and no name or comment of a wrapped file says more than whose it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID

import pyrage

from shared.control_plane import ControlPlane
from shared.errors import KeyUnavailable
from shared.ids import new_id
from shared.pack import Identity
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import check_tenant_id


class TenantKey(Receipt, frozen=True):
    """What encrypting needs: no secret in it."""

    key_id: UUID
    tenant_id: str
    recipient: str


class Rewrapped(Receipt, frozen=True):
    """A master rotation: keys wrapped anew, and those no configured master key opens."""

    rewrapped: int
    current: int
    failed: tuple[UUID, ...]


class Master:
    """The master key of this process, and older ones that may still open something."""

    def __init__(self, settings: Settings) -> None:
        texts = [settings.backup_master_key.get_secret_value()]
        texts += settings.backup_master_keys_older.get_secret_value().replace(",", " ").split()
        if not texts[0]:
            raise KeyUnavailable("ENGRAM_BACKUP_MASTER_KEY is not set: an encrypted backup cannot be made or opened")
        try:
            self._identities = [Identity.from_str(text) for text in texts]
        except pyrage.IdentityError:
            # Without the cause: whatever it says is about the key's text.
            raise KeyUnavailable(
                "ENGRAM_BACKUP_MASTER_KEY or ENGRAM_BACKUP_MASTER_KEYS_OLDER is not an age identity (AGE-SECRET-KEY-1…)"
            ) from None
        self.recipient = str(self._identities[0].to_public())

    def wrap(self, key_id: UUID, tenant_id: str, identity: Identity) -> bytes:
        text = f"# tenant: {tenant_id}\n# key: {key_id}\n{identity}\n"
        return bytes(pyrage.encrypt(text.encode(), [self._identities[0].to_public()]))

    def unwrap(self, key_id: UUID, tenant_id: str, wrapped: bytes, recipient: str) -> Identity:
        """Raises `KeyUnavailable` when no master key opens it, or when it is not this tenant's key."""
        try:
            text = pyrage.decrypt(wrapped, self._identities).decode()
        except (pyrage.DecryptError, UnicodeDecodeError):
            raise KeyUnavailable(
                f"key {key_id} of tenant {tenant_id} is not opened by this process's master key or an older one"
            ) from None
        head, _, secret = text.rstrip("\n").rpartition("\n")
        if head != f"# tenant: {tenant_id}\n# key: {key_id}":
            raise KeyUnavailable(f"key {key_id} of tenant {tenant_id} holds somebody else's key")
        try:
            identity = Identity.from_str(secret)
        except pyrage.IdentityError:
            raise KeyUnavailable(f"key {key_id} of tenant {tenant_id} holds no age identity") from None
        if str(identity.to_public()) != recipient:
            raise KeyUnavailable(f"key {key_id} of tenant {tenant_id} does not open what its recipient is encrypted to")
        return identity


def new_master() -> tuple[str, str]:
    """A new master key and its public key."""
    identity = Identity.generate()
    return str(identity), str(identity.to_public())


def list_of(control_plane: ControlPlane, tenant_id: str) -> list[dict[str, Any]]:
    """A tenant's keys, newest first, without what is secret in them, and how many usable backups each opens."""
    return [dict(row) for row in control_plane.rows("tenant_keys_list", tenant_id=check_tenant_id(tenant_id))]


def current(control_plane: ControlPlane, settings: Settings, tenant_id: str) -> TenantKey:
    """The key for a new backup, made when there is none. Proven to be openable with the master key of this process:
    what is encrypted to it must be readable. Raises `KeyUnavailable`.
    """
    master = Master(settings)
    row = control_plane.row("tenant_key_current", tenant_id=check_tenant_id(tenant_id))
    if row is None:
        key_id, identity = new_id(), Identity.generate()
        row = control_plane.row(
            "tenant_key_insert",
            key_id=key_id,
            tenant_id=tenant_id,
            recipient=str(identity.to_public()),
            wrapped=master.wrap(key_id, tenant_id, identity),
            master=master.recipient,
        ) or control_plane.row("tenant_key_current", tenant_id=tenant_id)  # somebody else's was first
    if row is None:
        raise KeyUnavailable(f"tenant {tenant_id} has no key and gets none: it is deleted")
    master.unwrap(row["key_id"], tenant_id, row["wrapped"], row["recipient"])
    return TenantKey(row["key_id"], tenant_id, row["recipient"])


def identity_of(control_plane: ControlPlane, settings: Settings, tenant_id: str, key_id: UUID) -> Identity:
    """The secret that opens a tenant's backup. Raises `KeyUnavailable`."""
    row = control_plane.row("tenant_key_get", key_id=key_id)
    if row is None or row["tenant_id"] != tenant_id:
        raise KeyUnavailable(f"key {key_id} of tenant {tenant_id} was erased: what it encrypted cannot be read again")
    return Master(settings).unwrap(key_id, tenant_id, row["wrapped"], row["recipient"])


def rotate(control_plane: ControlPlane, settings: Settings, tenant_id: str) -> TenantKey:
    """A new key for the tenant's next backups; those there are stay readable with theirs."""
    Master(settings)  # before anything is retired
    control_plane.execute("tenant_key_retire", tenant_id=check_tenant_id(tenant_id))
    return current(control_plane, settings, tenant_id)


def rewrap(control_plane: ControlPlane, settings: Settings) -> Rewrapped:
    """Wrap every tenant key with the current master key. May be stopped and run again.

    A key that no configured master key opens is left as it is and reported: the others must not wait for it.
    """
    master, rewrapped, failed = Master(settings), 0, []
    after: UUID | None = None
    while rows := control_plane.rows("tenant_keys_of_other_masters", master=master.recipient, after=after):
        for row in rows:
            after = row["key_id"]
            try:
                identity = master.unwrap(row["key_id"], row["tenant_id"], row["wrapped"], row["recipient"])
            except KeyUnavailable:
                failed.append(row["key_id"])
                continue
            rewrapped += control_plane.execute(
                "tenant_key_rewrap",
                key_id=row["key_id"],
                wrapped=master.wrap(row["key_id"], row["tenant_id"], identity),
                master=master.recipient,
                was=row["master"],
            )
    counted = control_plane.row("tenant_keys_count", master=master.recipient)
    return Rewrapped(rewrapped, int(counted["count"]) if counted else 0, tuple(failed))


def erase_left(control_plane: ControlPlane) -> dict[str, int]:
    """Delete the keys of deleted tenants whose last kept backup is gone; how many of each."""
    rows = control_plane.rows("tenant_keys_erase_left")
    return dict(Counter(row["tenant_id"] for row in rows))


def erase(control_plane: ControlPlane, tenant_id: str) -> tuple[UUID, ...]:
    """Delete every key of a tenant: its encrypted backups cannot be read by anybody from here on.

    Returns the ids of the keys erased; no row of `tenant_keys` names the tenant afterwards. Plain backups are not
    touched by this: they have to be deleted.
    """
    rows = control_plane.rows("tenant_keys_erase", tenant_id=check_tenant_id(tenant_id))
    return tuple(row["key_id"] for row in rows)
