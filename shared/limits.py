"""Limits that change while the gateway runs: one file of this machine, which every worker reads.

    {data_dir}/run/limits.json        written whole (fsync, rename), under `limits.lock` when it is changed
                   limits.copy.json   the same, written after it: what it should say while it is damaged

| name                    | value                                 | what a worker does                              |
|-------------------------|---------------------------------------|-------------------------------------------------|
| `rate_limit_mode`       | "off", "shadow" or "enforce"          | replaces the setting                            |
| `rate_limit`            | {"rps": 50, "burst": 100, …} (`Rate`) | replaces the settings for all tenants           |
| `rate_limit:TENANT`     | the same                              | for one tenant                                  |
| `shed`                  | ["search", "list", "write", "get"]    | refuses these classes of routes with 503        |
| `pool_size`             | 64                                    | keeps at most so many tenant databases open     |
| `inflight`              | 8                                     | has at most so many requests of a tenant at work|
| `inflight:TENANT`       | the same                              | for one tenant                                  |
| `jwks_refresh`          | true                                  | fetches the issuer's keys, once for each change |
| `restart_tenant:TENANT` | true                                  | closes that tenant's database, once each        |
| `restart_workers`       | a process id                          | is replaced by a new one, once; that one last   |

A damaged file leaves every worker with the limits it has, and gives one that starts those of the copy: a limit that
only the older workers obey is none. Who changes limits is told, and decides which is right: nothing is written over
what cannot be read. An absent file is no damage: there are no limits, whatever the copy says. What was written into
the file by hand is in the copy after the next change only.

So nothing is in the copy that was not set before. Where the file cannot be written, on a full disk, nothing has
changed; where only the copy cannot, the change holds and the copy, which now says something else, is removed. A
process killed in between leaves it one change behind.

Every entry has a reason and an end: what was changed at three in the morning is gone by itself. Workers look at
the file every `limits_poll_seconds`, off the request path, and see an entry's end without anybody's help. One that
ends before each of them has looked would hold in some of them only, so there are none so short.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.durable import unlink, write_file
from shared.errors import Permanent, UnsafeTenantId
from shared.log import get_logger
from shared.settings import Settings
from shared.tenant import check_tenant_id

MAX_TTL_SECONDS = 7 * 86_400.0
LEAST_POLLS = 4  # that an entry lasts: a worker on a busy machine looks late
Mode = Literal["off", "shadow", "enforce"]
RouteClass = Literal["search", "list", "write", "get"]
Rps = Annotated[float, Meta(ge=0, le=1e6)]
_UNSEEN = (0, 0, 0)
log = get_logger("limits")


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rps` 0 is no limit, `burst` 0 one second's worth. A class without a rate keeps the one of the settings."""

    rps: Rps
    burst: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    read_rps: Rps | None = None
    write_rps: Rps | None = None
    search_rps: Rps | None = None


class Entry(msgspec.Struct, frozen=True):
    """`id` is new with every change, times are seconds since 1970."""

    value: Any
    reason: str
    set_at: float
    expires_at: float
    id: str


class _File(msgspec.Struct, frozen=True):
    entries: dict[str, Entry]


class Limits(msgspec.Struct, frozen=True):
    """What holds now. None and empty: the settings hold."""

    rate_limit_mode: Mode | None = None
    rate_limit: Rate | None = None
    tenant_rates: dict[str, Rate] = msgspec.field(default_factory=dict)
    shed: frozenset[str] = frozenset()
    pool_size: int | None = None
    inflight: int | None = None
    tenant_inflight: dict[str, int] = msgspec.field(default_factory=dict)
    jwks_refresh: str = ""  # of what is done once: the entry's id
    restart_tenants: dict[str, str] = msgspec.field(default_factory=dict)
    restart_workers: str = ""
    restart_last_pid: int = 0


Inflight = Annotated[int, Meta(ge=1, le=100_000)]
PoolSize = Annotated[int, Meta(ge=1, le=100_000)]
_TYPES: dict[str, Any] = {
    "rate_limit_mode": Mode,
    "rate_limit": Rate,
    "shed": list[RouteClass],
    "pool_size": PoolSize,
    "inflight": Inflight,
    "jwks_refresh": Literal[True],
    "restart_workers": Annotated[int, Meta(ge=1)],
}
_TENANT_TYPES: dict[str, Any] = {"rate_limit": Rate, "inflight": Inflight, "restart_tenant": Literal[True]}
_TENANT_FIELDS = {"rate_limit": "tenant_rates", "inflight": "tenant_inflight", "restart_tenant": "restart_tenants"}
ONCE = frozenset({"jwks_refresh", "restart_tenant", "restart_workers"})


def path_of(settings: Settings) -> Path:
    return settings.run_dir / "limits.json"


def copy_of(settings: Settings) -> Path:
    return settings.run_dir / "limits.copy.json"


class BadLimit(Permanent):
    """No such limit, or a value, time or reason that makes no sense; nothing was written."""

    exit_code = 2


def least_ttl_seconds(settings: Settings) -> float:
    """How long an entry must last for every worker to see it."""
    return LEAST_POLLS * settings.limits_poll_seconds


def entry(settings: Settings, name: str, value: object, *, ttl_seconds: float, reason: str) -> Entry:
    """A checked entry that begins now. Raises `BadLimit`."""
    _checked(name, value)
    least_seconds = least_ttl_seconds(settings)
    if not least_seconds <= ttl_seconds <= MAX_TTL_SECONDS:
        raise BadLimit(
            f"ttl_seconds must be at least {least_seconds:g}, or not every worker would see it, and at most"
            f" {MAX_TTL_SECONDS:.0f}"
        )
    if not reason.strip():
        raise BadLimit("a limit needs a reason")
    now = time.time()
    return Entry(value, reason.strip(), now, now + ttl_seconds, secrets.token_hex(8))


def put(settings: Settings, name: str, new: Entry) -> None:
    """Have every worker of this machine obey the entry until it expires."""
    with _changing(settings) as entries:
        entries[name] = new
    ttl_seconds = round(new.expires_at - new.set_at, 3)
    log.info("limit_set", limit=name, value=new.value, ttl_seconds=ttl_seconds, reason=new.reason)


def set_limit(settings: Settings, name: str, value: object, *, ttl_seconds: float, reason: str) -> Entry:
    """Both in one. Raises `BadLimit`, or `Permanent` when the file is damaged."""
    new = entry(settings, name, value, ttl_seconds=ttl_seconds, reason=reason)
    put(settings, name, new)
    return new


def clear(settings: Settings, name: str) -> bool:
    """Remove a limit before it expires; False when it was not set."""
    with _changing(settings) as entries:
        cleared = entries.pop(name, None) is not None
    if cleared:
        log.info("limit_cleared", limit=name)
    return cleared


def active(settings: Settings) -> dict[str, Entry]:
    """The limits that hold now, by name. Raises `Permanent` when the file is damaged."""
    try:
        return _unexpired(_read(path_of(settings)), time.time())
    except Permanent as e:
        raise Permanent(f"{e}; {_way_out(settings)}") from e


def standing(settings: Settings) -> tuple[dict[str, Entry], str]:
    """What workers obey, also when the file is damaged: then what the copy says, and what is wrong. Raises `Permanent`
    when there is no copy that can be read either."""
    try:
        return active(settings), ""
    except Permanent as e:
        if not copy_of(settings).exists():
            raise
        try:
            return _unexpired(_read(copy_of(settings)), time.time()), str(e)
        except Permanent:
            raise e from None  # it says so of both


def _way_out(settings: Settings) -> str:
    """What to do about a damaged file."""
    remove = f"remove {path_of(settings).name} to start without limits"
    if not copy_of(settings).exists():
        return f"{remove}, there is no copy"
    try:
        _read(copy_of(settings))
    except Permanent as e:
        return f"nor can its copy: {e}; {remove}"
    return f"{remove}, or put {copy_of(settings).name} in its place to keep what was set"


def version_of(entries: dict[str, Entry]) -> str:
    """Which entries these are, in 16 characters."""
    ids = " ".join(sorted(e.id for e in entries.values()))
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


class Watch:
    """A worker's view of the file. `poll` is for a thread, `now` and `version` (`version_of`) for anybody."""

    def __init__(self, settings: Settings) -> None:
        self._path, self._copy = path_of(settings), copy_of(settings)
        self._seen: tuple[int, int, int] | None = _UNSEEN  # what it looked like when it was read
        self._knows = False  # has read the file, or the copy in its stead
        self._failed = ""
        self._content: dict[str, Entry] = {}  # of the file
        self._entries: dict[str, Entry] = {}  # of them, what held at the last poll
        self._listeners: list[Callable[[Limits], None]] = []
        self.now = Limits()
        self.version = version_of({})

    def listen(self, listener: Callable[[Limits], None]) -> None:
        """`listener` is called in the polling thread with every change; and now, when something is set."""
        self._listeners.append(listener)
        if self.now != Limits():
            listener(self.now)

    def poll(self) -> None:
        """Read the file if it changed, and see which of its entries hold at this time: all of them are kept, so that a
        clock that jumps ahead and back ends none. A file that cannot be read changes nothing, is logged once, and is
        read again by the next poll: it need not be the file, a process may be out of descriptors."""
        seen = _signature(self._path)
        if seen != self._seen:
            self._read(seen)
        entries = _unexpired(self._content, time.time())
        if entries == self._entries:
            return
        self._entries = entries
        found = _limits(entries)
        if found != self.now:
            self.now = found
            log.info("limits_changed", limits=sorted(entries))
            for listener in self._listeners:
                listener(found)
        self.version = version_of(entries)  # last: who reads it may rely on the listeners having been told

    def _read(self, seen: tuple[int, int, int] | None) -> None:
        try:
            self._content, self._seen, self._failed = _read(self._path), seen, ""
            self._knows = True
        except Permanent as e:
            if not self._knows:
                with suppress(Permanent):
                    self._content, self._knows = _read(self._copy), True
            if str(e) != self._failed:
                log.error("limits_unread", cause=str(e), kept=sorted(self._content))
            self._failed = str(e)


def check_name(name: str) -> Any:
    """The type of this limit's values. Raises `BadLimit` when there is none."""
    kind, of_tenant, tenant_id = name.partition(":")
    types = _TENANT_TYPES if of_tenant else _TYPES
    if kind not in types:
        known = ", ".join([*sorted(_TYPES), *(f"{each}:TENANT" for each in sorted(_TENANT_TYPES))])
        raise BadLimit(f"no limit is called {name!r:.80}; there are {known}")
    if of_tenant:
        try:
            check_tenant_id(tenant_id)
        except UnsafeTenantId as e:
            raise BadLimit(str(e)) from e
    return types[kind]


def _checked(name: str, value: object) -> Any:
    try:
        return msgspec.convert(value, check_name(name))
    except msgspec.ValidationError as e:
        raise BadLimit(f"{name} cannot be {value!r:.200}: {e}") from e


def _limits(entries: dict[str, Entry]) -> Limits:
    values: dict[str, Any] = {field: {} for field in _TENANT_FIELDS.values()}
    for name, entry in entries.items():
        kind, _, tenant_id = name.partition(":")
        try:
            value = _checked(name, entry.value)
        except Permanent as e:  # written by a newer build, or by hand: the others still hold
            log.error("limit_not_understood", limit=name, cause=str(e))
            continue
        if kind == "restart_workers":
            values["restart_last_pid"] = value
        if kind in ONCE:
            value = entry.id
        if tenant_id:
            values[_TENANT_FIELDS[kind]][tenant_id] = value
        else:
            values[name] = frozenset(value) if name == "shed" else value
    return Limits(**values)


def _unexpired(entries: dict[str, Entry], wall: float) -> dict[str, Entry]:
    return {name: entry for name, entry in entries.items() if wall < entry.expires_at}


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path) -> dict[str, Entry]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).entries
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise Permanent(f"{path} cannot be read ({e})") from e


@contextmanager
def _changing(settings: Settings) -> Iterator[dict[str, Entry]]:
    """The entries that have not expired, to be changed; written when the block ends."""
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(settings.run_dir / "limits.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = active(settings)
        yield entries
        data = msgspec.json.format(msgspec.json.encode(_File(entries)))
        write_file(path_of(settings), data)
        try:
            write_file(copy_of(settings), data)
        except OSError as e:  # the change holds all the same
            log.error("limits_copy_not_written", cause=str(e), removed=_removed(copy_of(settings)))
    finally:
        os.close(lock)


def _removed(path: Path) -> bool:
    try:
        unlink(path)
    except OSError:
        return False
    return True
