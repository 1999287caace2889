"""Every error of the core answers one question: is it worth trying again?

`Transient`: the same call may succeed later with nothing changed by hand (a connection, a lease held by
somebody else, a full queue). `Permanent`: it will not (a corrupt snapshot, an unknown tenant, a refused
configuration). Shells map the two and nothing else: the gateway to 503 / 4xx, the flows to "retry" / "Failed",
the command line to its exit code.

Messages name the thing and the cause, never a secret, a token or memory content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class EngramError(Exception):
    """Base of everything the core raises on purpose."""

    exit_code = 1


class Transient(EngramError):
    """May succeed when tried again unchanged."""


class Permanent(EngramError):
    """Will not succeed until somebody changes something."""


class Refused(Permanent):
    """Refused for safety; nothing was changed."""

    exit_code = 3


class UnsafeTenantId(Permanent):
    """The tenant id does not match `shared.tenant.TENANT_ID_PATTERN`; nothing was opened."""


class UnknownTenant(Permanent):
    """The control plane knows no such tenant."""


class TenantNotActive(Permanent):
    """The tenant exists but is suspended or not yet created."""


class InMaintenance(Transient):
    """A restore holds the tenant; writes (and during the swap reads) wait."""


class TenantDatabaseUnavailable(Transient):
    """The tenant's database cannot be opened or read here and now."""


class CorruptDatabase(Permanent):
    """A check of a database or snapshot failed; the message says which."""


class SchemaTooNew(Permanent):
    """The database was written by a newer build than this one."""


class BadSearchQuery(Permanent):
    """The FTS5 query has a syntax error; the message is SQLite's."""


class UnknownMemory(Permanent):
    """No memory with that id in this tenant's database."""


class UnknownBackup(Permanent):
    """The catalogue has no such usable backup."""


class CorruptBackup(Permanent):
    """The stored object is not what the catalogue says (missing, cut, other sha256, other tenant)."""


class ObjectStoreUnavailable(Transient):
    """The object store did not answer, or answered with a server error, within its retries."""


class KeyUnavailable(Permanent):
    """The key of an encrypted backup cannot be had: no master key, the wrong one, or an erased tenant key.

    Says nothing about the object: a backup is not corrupt because its reader has lost the key.
    """


class ObjectStoreRefused(Permanent):
    """The object store refused: credentials, permissions or an object that must not be overwritten."""


class KeyTaken(ObjectStoreRefused):
    """An object with other bytes lies under the key; it was left as it is."""


class ObjectLocked(Permanent):
    """The object store keeps an object until some day (object lock, legal hold); it was not deleted."""


class NoSpace(Transient):
    """A disk of this machine is full."""


class LitestreamUnavailable(Transient):
    """Litestream runs and does not do what it is asked."""


class LeaseHeld(Transient):
    """Another holder has the tenant's maintenance lease."""


class LeaseLost(Permanent):
    """This run's lease expired or went to somebody else; it must not go on."""


class DrainTimeout(Transient):
    """A process kept the tenant's database in use for longer than the drain time-out."""


class ControlPlaneUnavailable(Transient):
    """PostgreSQL did not answer."""


class SpoolUnavailable(Transient):
    """The usage spool cannot take an event; billable requests must be refused."""


@contextmanager
def exit_code() -> Iterator[None]:
    """At a process's edge: an error of ours ends it with one line on stderr and the error's exit code."""
    try:
        yield
    except EngramError as e:
        leave(str(e), e.exit_code)


def leave(message: str, code: int) -> NoReturn:
    """End this process: one line on stderr, whatever the message holds."""
    sys.stderr.write(f"engram: {' '.join(message.split())}\n")
    sys.exit(code)
