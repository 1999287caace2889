"""Litestream's copies in the object store: one for each generation of a tenant, and what instants they can bring back.

    tenants/{tenant_id}/point-in-time/{generation}-{token}/   a copy; a number that is given again, because a machine
                                                              was lost with its disk, comes with another token
        0000/{min}-{max}.ltx   S3     single transaction files, the only ones looked at here
        ltx/0/{min}-{max}.ltx  local  the same in a directory

A generation's file is only ever copied below its own prefix, so no copy is of two databases. A transaction file is one
look of Litestream at the WAL (about a second of writes). Its header (LTX1) carries the time, taken when its content had
been read: the state after the last file whose time is not after T holds nothing committed after T. What was
acknowledged between that file's time, `Point.at`, and T is not in it: at most the second until the next look.
"""

from __future__ import annotations

import re
import secrets
import struct
from bisect import bisect_right
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from random import Random

from shared.durable import write_file
from shared.errors import CorruptBackup
from shared.objects import Listed, ObjectStore
from shared.receipt import Receipt
from shared.tenant import TenantPaths, check_tenant_id

_KEY = re.compile(
    r"(?P<prefix>tenants/(?P<tenant>[a-z0-9][a-z0-9_-]{0,62})/point-in-time/(?P<generation>\d{6,})-(?P<token>[0-9a-f]{12}))/"
    r"(?P<rest>.+)\Z"
)
_TRANSACTION = re.compile(r"(?:0000|ltx/0)/(?P<min>[0-9a-f]{16})-(?P<max>[0-9a-f]{16})\.ltx\Z")
_HEADER = struct.Struct(">4sIIIQQq")  # magic, flags, page size, pages, first and last transaction, ms since 1970
_TOKEN_FILE = "point-in-time"


class Copy(Receipt, frozen=True):
    """A generation's copy and its transaction files, {transaction: key} in order."""

    tenant_id: str
    prefix: str
    generation: int
    transactions: dict[int, str]


class Point(Receipt, frozen=True):
    """A state that a copy can bring back: what was committed when Litestream looked, at `at`."""

    tenant_id: str
    prefix: str
    generation: int
    txid: int
    at: datetime
    size_bytes: int

    def __str__(self) -> str:
        return f"Litestream's copy of generation {self.generation}, transaction {self.txid}"


def prefix_of(paths: TenantPaths, generation: int) -> str:
    """Where the copy of a generation of this machine lies; the first call settles it for as long as the file exists."""
    file = paths.generation_dir(generation) / _TOKEN_FILE
    try:
        token = file.read_text()
    except FileNotFoundError:
        token = secrets.token_hex(6)
        write_file(file, token.encode())
    return f"{_below(paths.tenant_id)}{generation:06d}-{token}"


def is_key(key: str) -> bool:
    return _KEY.match(key) is not None


def find(objects: ObjectStore, tenant_id: str) -> list[Copy]:
    """The tenant's copies, the newest generation first. Raises what a listing raises."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    generations: dict[str, int] = {}
    for page in objects.listing(_below(tenant_id)):
        for listed in page:
            if (m := _KEY.match(listed.key)) is None:
                continue
            generations[m["prefix"]] = int(m["generation"])
            if (of := _TRANSACTION.match(m["rest"])) is not None:
                found[m["prefix"]][int(of["max"], 16)] = listed.key
    copies = [
        Copy(tenant_id, prefix, generations[prefix], dict(sorted(transactions.items())))
        for prefix, transactions in found.items()
    ]
    return sorted(copies, key=lambda c: c.generation, reverse=True)


def point_at(objects: ObjectStore, tenant_id: str, at: datetime | None = None) -> Point | None:
    """The newest state not after `at` (None: of all) of the generation that was copied then; None when there is none.

    Raises `CorruptBackup` when a transaction file cannot be read, and what a listing raises.
    """
    for copy in find(objects, tenant_id):
        numbers = list(copy.transactions)
        if at is None:
            return _point(objects, copy, numbers[-1])
        after = bisect_right(numbers, at, key=lambda n: _point(objects, copy, n).at)
        if after:
            return _point(objects, copy, numbers[after - 1])
        if numbers[0] > 1:  # its beginning is beyond the window, so an older generation is no answer
            return None
    return None


def any_point(objects: ObjectStore, tenant_id: str, random: Random) -> Point | None:
    """A state of the tenant's newest copy: half of the time the last one, else any. Raises as `point_at`."""
    for copy in find(objects, tenant_id)[:1]:
        numbers = list(copy.transactions)
        return _point(objects, copy, numbers[-1] if random.random() < 0.5 else random.choice(numbers))
    return None


def expired(objects: ObjectStore, tenant_id: str, *, active: int, window: timedelta) -> list[Listed]:
    """The objects of copies of generations before `active` that nothing was added to within twice the window."""
    found: dict[str, list[Listed]] = defaultdict(list)
    for page in objects.listing(_below(tenant_id)):
        for listed in page:
            if (m := _KEY.match(listed.key)) is not None and int(m["generation"]) < active:
                found[m["prefix"]].append(listed)
    before = datetime.now(UTC) - 2 * window
    return [listed for of in found.values() if max(one.modified_at for one in of) < before for listed in of]


def erase(objects: ObjectStore, tenant_id: str) -> int:
    """Delete every copy of a tenant that nothing copies any more; how many objects. Raises `ObjectLocked` too."""
    keys = objects.keys(_below(tenant_id))
    for key in keys:
        objects.delete(key)
    return len(keys)


def _below(tenant_id: str) -> str:
    return f"tenants/{check_tenant_id(tenant_id)}/point-in-time/"


def _point(objects: ObjectStore, copy: Copy, txid: int) -> Point:
    key = copy.transactions[txid]
    head = objects.beginning(key, _HEADER.size)
    if len(head) < _HEADER.size or head[:4] != b"LTX1":
        raise CorruptBackup(f"{key}: not a transaction file of Litestream")
    _, _, page_bytes, pages, _, last, ms = _HEADER.unpack(head)
    if last != txid:
        raise CorruptBackup(f"{key}: it says it is transaction {last}")
    at = datetime.fromtimestamp((ms + 1) / 1000, UTC)  # it was cut to milliseconds
    return Point(copy.tenant_id, copy.prefix, copy.generation, txid, at, page_bytes * pages)
