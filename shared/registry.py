"""Tenants: the control plane's rows and this machine's directories, made in an order a crash cannot break.

Creation: row in state `creating` → first generation on disk, fsynced → state `active`. The gateway serves only
`active` tenants, so it never meets a half-made one; running `create` again completes an interrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from shared.control_plane import ControlPlane
from shared.engine import database
from shared.engine.schema import SCHEMA_VERSION
from shared.errors import Permanent, Refused, TenantNotActive, UnknownTenant
from shared.settings import Settings
from shared.tenant import TenantPaths, check_tenant_id

State = Literal["creating", "active", "suspended", "deleting", "deleted"]


class Elsewhere(NamedTuple):
    """Where an active tenant lies, when that is not this machine."""

    machine_id: str


Standing = State | Elsewhere


@dataclass(frozen=True, slots=True)
class Tenant:
    tenant_id: str
    plan_id: str
    state: State
    schema_version: int
    generation: int
    machine_id: str
    created_at: datetime


def create(control_plane: ControlPlane, settings: Settings, tenant_id: str, *, plan_id: str = "standard") -> Tenant:
    """Make a tenant and its empty database on this machine. Raises `Permanent` when it already exists."""
    check_tenant_id(tenant_id)
    if tenant_id == settings.operator_tenant:
        raise Refused(f"{tenant_id} is the operators' id (ENGRAM_OPERATOR_TENANT); no customer may have it")
    control_plane.execute(
        "tenant_insert",
        tenant_id=tenant_id,
        plan_id=plan_id,
        schema_version=SCHEMA_VERSION,
        machine_id=settings.machine_id,
    )
    tenant = get(control_plane, tenant_id)
    if tenant.state == "deleted":
        if not control_plane.execute(
            "tenant_reuse",
            tenant_id=tenant_id,
            plan_id=plan_id,
            machine_id=settings.machine_id,
            schema_version=SCHEMA_VERSION,
        ):
            raise Permanent(f"tenant {tenant_id} was deleted and backups of it are kept: its id is not free yet")
        tenant = get(control_plane, tenant_id)
    if tenant.state != "creating":
        raise Permanent(f"tenant {tenant_id} already exists ({tenant.state})")
    if tenant.machine_id != settings.machine_id:
        raise Permanent(f"tenant {tenant_id} is being created on machine {tenant.machine_id}")
    database.create(TenantPaths.of(settings.tenants_dir, tenant_id))
    _set_state(control_plane, tenant_id, "active", ("creating",))
    return get(control_plane, tenant_id)


def get(control_plane: ControlPlane, tenant_id: str) -> Tenant:
    """Raises `UnknownTenant`."""
    row = control_plane.row("tenant_get", tenant_id=check_tenant_id(tenant_id))
    if row is None:
        raise UnknownTenant(f"no tenant {tenant_id}")
    return Tenant(**row)


def get_active(control_plane: ControlPlane, tenant_id: str) -> Tenant:
    """Raises `UnknownTenant` or `TenantNotActive` (suspended tenants keep being backed up and restored)."""
    tenant = get(control_plane, tenant_id)
    if tenant.state == "creating":
        raise TenantNotActive(f"tenant {tenant_id} is not created yet")
    if tenant.state in ("deleting", "deleted"):
        raise TenantNotActive(f"tenant {tenant_id} is {tenant.state}")
    return tenant


def list_all(control_plane: ControlPlane) -> list[Tenant]:
    return [Tenant(**row) for row in control_plane.rows("tenant_list")]


def suspend(control_plane: ControlPlane, tenant_id: str) -> Tenant:
    """Requests answer 403 within the gateway's refresh interval; the data stays."""
    return _change(control_plane, tenant_id, "suspended", ("active", "suspended"))


def resume(control_plane: ControlPlane, tenant_id: str) -> Tenant:
    return _change(control_plane, tenant_id, "active", ("active", "suspended"))


def _change(control_plane: ControlPlane, tenant_id: str, state: State, from_states: tuple[State, ...]) -> Tenant:
    tenant = get(control_plane, tenant_id)
    if not _set_state(control_plane, tenant_id, state, from_states):
        raise Permanent(f"tenant {tenant_id} is {tenant.state}, it cannot become {state}")
    return get(control_plane, tenant_id)


def _set_state(control_plane: ControlPlane, tenant_id: str, state: State, from_states: tuple[State, ...]) -> bool:
    rows = control_plane.rows("tenant_set_state", tenant_id=tenant_id, state=state, from_states=list(from_states))
    return bool(rows)


Standings = tuple[list[dict[str, Any]], str]  # rows, and from where on the next read goes on
FULL_READ_EVERY = 30  # refreshes by the timer: a minute


class KnownTenants:
    """The last read of how every tenant stands, for processes that must not ask PostgreSQL in a request: its state, or
    of an active one of another machine which that is. So whoever looks for "active" asks for both with one comparison.

    `refresh` asks for what has changed since the one before, and each `FULL_READ_EVERY`th time for everything, which
    also shows what was removed: 100,000 rows are a third of a second of Python. Those on demand do not count, else
    whoever asks for tenants that are not there would choose when. When the control plane does not answer the last map
    stands.
    """

    def __init__(self, read: Callable[[str | None], Standings]) -> None:
        self._read = read
        self._since: str | None = None
        self._until_full_read = 0
        self.standings: dict[str, Standing] = {}
        self.loaded = False

    @classmethod
    def of(cls, control_plane: ControlPlane, machine_id: str) -> KnownTenants:
        """As seen from that machine."""

        def read(since: str | None) -> Standings:
            rows = control_plane.rows("tenant_standings", machine_id=machine_id, since=since)
            return [row for row in rows if row["tenant_id"] is not None], rows[0]["since"]

        return cls(read)

    def refresh(self, *, on_demand: bool = False) -> None:
        """Raises `ControlPlaneUnavailable`; the map is unchanged then."""
        everything = self._since is None or (self._until_full_read <= 0 and not on_demand)
        rows, since = self._read(None if everything else self._since)
        machines: dict[str, Elsewhere] = {}  # one for all tenants of a machine
        standings: dict[str, Standing] = {
            row["tenant_id"]: row["state"]
            if (machine := row["elsewhere"]) is None or row["state"] != "active"
            else machines.get(machine) or machines.setdefault(machine, Elsewhere(machine))
            for row in rows
        }
        if everything:
            self.standings, self._until_full_read = standings, FULL_READ_EVERY
        else:
            self.standings.update(standings)
        self._until_full_read -= not on_demand
        self._since, self.loaded = since, True
