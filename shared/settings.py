"""One settings model for every process; prefix `ENGRAM_`, the unit is part of the name.

What differs between dev, staging and prod is in their value files, not in code: `shared.environment` says how they are
found and what wins. `shared.safety` says which values staging and prod refuse to start with.

Empty strings mean "not set": `engram up` fills them with its own embedded parts (PostgreSQL, Prefect server,
token issuer, a local object store below the data directory) and hands the result to its children through the
environment, so a child never guesses. In staging and prod there are no embedded parts: `require` names what
is missing.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shared import environment
from shared.errors import Permanent


class Settings(BaseSettings):
    """Values come from the process's environment and the value file; a name that is no setting is an error."""

    model_config = SettingsConfigDict(
        env_prefix=environment.PREFIX,
        extra="ignore",
        populate_by_name=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it would print the secrets beside the value that is wrong
    )

    env: Literal["dev", "staging", "prod"] = "dev"
    data_dir: Path = Path(".engram")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # Control plane. The pooler may be PgBouncer in transaction mode: no prepared statements, no session state.
    control_plane_url: SecretStr = SecretStr("")
    control_plane_connect_timeout_seconds: float = Field(default=10.0, gt=0)
    control_plane_pool_size: int = Field(default=4, ge=1)
    control_plane_statement_timeout_seconds: float = Field(default=30.0, gt=0)
    control_plane_maintenance_timeout_seconds: float = Field(
        default=3600.0, gt=0, description="of a migration's or the retention's statement, where nobody waits"
    )
    postgres_port: int = Field(default=0, ge=0, le=65535, description="embedded PostgreSQL; 0 picks a free one")

    # Objects
    object_store_url: str = ""
    s3_endpoint: str = ""
    s3_region: str = "auto"
    s3_checksum: Literal["sha256", "none"] = Field(
        default="sha256", description="sent with every upload for the store to compare; none: it refuses the header"
    )
    s3_access_key_id: str = ""
    s3_secret_access_key: SecretStr = SecretStr("")
    # Credentials of a single role, so that nobody holds more than they need; empty: the ones above.
    s3_read_access_key_id: str = Field(default="", description="gets and lists: restores, restore tests, verification")
    s3_read_secret_access_key: SecretStr = SecretStr("")
    s3_delete_access_key_id: str = Field(default="", description="lists and deletes: retention, deletion of a tenant")
    s3_delete_secret_access_key: SecretStr = SecretStr("")
    object_store_timeout_seconds: float = Field(
        default=60.0, gt=0, description="of one request; a larger object is read on from where it stopped"
    )
    object_store_connect_timeout_seconds: float = Field(default=5.0, gt=0)
    object_store_retries: int = Field(default=4, ge=0)
    object_store_retry_timeout_seconds: float = Field(default=60.0, gt=0)
    object_store_read_back: bool = Field(
        default=True, description="download what was uploaded to S3; false trusts the store's check of s3_checksum"
    )
    object_store_single_put_bytes: int = Field(
        default=16_777_216, ge=0, le=5_000_000_000, description="one conditional request up to here, parts above"
    )
    object_store_part_bytes: int = Field(default=8_388_608, ge=5_242_880, description="all but the last are equal")

    # How new backups are packed (shared/pack.py) and who can open them (shared/keys.py)
    backup_compression: Literal["none", "zstd"] = "none"
    backup_compression_level: int = Field(default=3, ge=1, le=9, description="of zstd; 9 needs 15 MB more")
    backup_encryption: Literal["none", "age"] = "none"
    backup_master_key: SecretStr = Field(
        default=SecretStr(""), description="an age identity, AGE-SECRET-KEY-1…; wraps the tenants' keys"
    )
    backup_master_keys_older: SecretStr = Field(
        default=SecretStr(""), description="comma-separated; they still open keys, until `engram keys rotate`"
    )

    # How long backups are kept, beside what each plan says (shared/retention.py), and when they are read again
    retention_min_age_hours: float = Field(default=24.0, ge=0, description="no younger backup is deleted")
    retention_corrupt_days: int = Field(default=30, ge=0, description="a corrupt one is kept for whoever looks into it")
    retention_deleted_tenant_days: int = Field(default=30, ge=0, description="then all of its backups go")
    retention_orphan_hours: float = Field(
        default=24.0, gt=0, description="an object without a row, or an upload never finished, is dealt with when older"
    )
    verify_cycle_days: int = Field(default=30, ge=1, description="within which every stored backup is read again")
    verify_run_seconds: float = Field(default=14_400.0, gt=0, description="then the rest is left to the next run")
    verify_parallel: int = Field(default=2, ge=1, le=64)
    backup_stale_hours: float = Field(default=26.0, gt=0, description="a last good backup older than this is listed")

    # Point in time, a second layer beside the backups: shared/litestream.py
    point_in_time: Literal["off", "litestream"] = "off"
    point_in_time_hours: float = Field(default=24.0, gt=0, description="back to which every second can be restored")
    point_in_time_poll_seconds: float = Field(default=1.0, gt=0, description="how soon a new generation is followed")
    litestream_path: str = Field(default="", description="empty: the extra's, beside this Python, else from PATH")
    litestream_restore_seconds: float = Field(default=3600.0, gt=0, description="then the backup is taken instead")

    # Tokens
    jwt_issuer: str = ""
    jwt_audience: str = "engram"
    jwks_url: str = ""
    jwt_tenant_claim: str = "tenant_id"
    jwt_require_at_jwt: bool = Field(
        default=False, description="only tokens that say typ=at+jwt (RFC 9068): no ID token passes for an access token"
    )
    jwt_leeway_seconds: float = Field(default=30.0, ge=0, le=300)
    jwks_ttl_seconds: float = Field(default=300.0, gt=0)
    jwks_cooldown_seconds: float = Field(default=5.0, ge=0)
    jwks_stale_max_seconds: float = Field(default=86_400.0, ge=0)
    jwks_timeout_seconds: float = Field(default=5.0, gt=0)
    jwt_cache_entries: int = Field(default=10_000, ge=0)
    issuer_port: int = Field(default=8081, ge=0, le=65535)

    # Gateway
    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=8080, ge=0, le=65535)
    gateway_workers: int = Field(default=2, ge=1)
    gateway_threads: int = Field(default=4, ge=1, description="threads per worker for SQLite work off the loop")
    gateway_backlog: int = Field(default=1024, ge=128)
    gateway_connections: int = Field(
        default=4_096, ge=1, description="open per worker, idle ones too; at most a quarter of the files it may open"
    )
    gateway_kill_timeout_seconds: int = Field(default=20, ge=1, le=1800)
    tls_certificate: str = Field(default="", description="a PEM file, the leaf first; empty: a proxy ends TLS")
    tls_key: str = Field(default="", description="its private key, a PEM file without a passphrase")
    tls_minimum: Literal["1.2", "1.3"] = "1.2"
    tls_http2: bool = Field(default=True, description="offered by ALPN, beside HTTP/1.1")
    trusted_proxies: str = Field(
        default="", description="networks, comma-separated; only what these say of a client's address is believed"
    )
    client_address_header: str = Field(
        default="x-forwarded-for",
        description="which field those proxies write: x-forwarded-for, forwarded, or one with a single address",
    )
    worker_silence_seconds: float = Field(
        default=10.0, ge=0, description="a worker whose event loop stands still for so long is replaced; 0 is never"
    )
    metrics_cache_seconds: float = Field(default=0.5, ge=0, description="/metrics is not rendered more often")
    body_limit_bytes: int = Field(default=1_048_576, ge=1_024)
    answer_limit_bytes: int = Field(
        default=1_048_576, ge=1_024, description="a list or search has fewer memories than asked for, but one, above"
    )
    # Requests for tenants of other machines (gateway/routing.py). The second and third: a pattern with {machine_id} for
    # all machines, or machine=value for one; comma-separated.
    routing: Literal["off", "fly-replay", "forward"] = Field(
        default="off", description="have Fly's proxy repeat them there, ask that machine's gateway, or refuse them"
    )
    routing_apps: str = Field(default="", description="a machine's Fly app, engram-{machine_id}; for fly-replay")
    routing_urls: str = Field(
        default="",
        description="a machine's gateway, http://engram-{machine_id}.internal:8080; for forward, and for what Fly's"
        " proxy cannot repeat",
    )
    routing_replay_bytes: int = Field(
        default=950_000, ge=0, description="the largest body left to Fly's proxy, which repeats no request over 1 MB"
    )
    routing_timeout_seconds: float = Field(
        default=30.0, gt=0, description="for another machine's gateway to answer; it is reached within 5 s or not"
    )
    tenant_pool_size: int = Field(default=1_024, ge=1, description="open tenant databases per gateway worker")
    sqlite_heap_bytes: int = Field(
        default=268_435_456, ge=16_777_216, description="page caches of a gateway worker recycle above this"
    )
    tenant_refresh_seconds: float = Field(default=2.0, gt=0)
    tenant_lock_wait_seconds: float = Field(default=2.0, ge=0)
    sqlite_busy_timeout_seconds: float = Field(default=5.0, ge=0)
    database_wait_seconds: float = Field(
        default=2.0, gt=0, description="longest wait for a thread and the tenant's turn; then 503, and nothing was done"
    )
    query_timeout_seconds: float = Field(default=5.0, ge=0, description="of a list or a search; 0 is no limit")

    # What a client may send and how slowly
    url_limit_bytes: int = Field(default=8_192, ge=256)
    header_limit_bytes: int = Field(default=32_768, ge=1_024)
    header_timeout_seconds: float = Field(default=30.0, gt=0, description="also how long an idle connection is kept")
    body_timeout_seconds: float = Field(default=30.0, gt=0)
    answer_stall_seconds: float = Field(
        default=60.0, gt=0, description="a client that reads nothing for so long is cut"
    )

    # How much a client may ask for. Some can be overridden while running: `shared.limits`.
    rate_limit_mode: Literal["off", "shadow", "enforce"] = "enforce"
    rate_limit_rps: float = Field(default=0.0, ge=0, description="per tenant and machine; 0 is off")
    rate_limit_burst: int = Field(default=0, ge=0, description="0 is one second's worth")
    rate_limit_read_rps: float = Field(default=0.0, ge=0, description="reads only, within the tenant's; 0 is off")
    rate_limit_write_rps: float = Field(default=0.0, ge=0, description="writes only, within the tenant's; 0 is off")
    rate_limit_search_rps: float = Field(default=0.0, ge=0, description="searches only, within the tenant's; 0 is off")
    unauthenticated_rps: float = Field(default=0.0, ge=0, description="refused tokens per client address; 0 is off")
    unauthenticated_burst: int = Field(default=200, ge=1)
    inflight_requests: int = Field(default=256, ge=1, description="at work per worker; more wait, then are shed")
    inflight_tenant_requests: int = Field(default=64, ge=1, description="at work per worker and tenant")
    inflight_wait_seconds: float = Field(default=0.5, ge=0, description="longest wait for a place")
    quota_mode: Literal["off", "shadow", "enforce"] = Field(default="enforce", description="shadow: warn, never refuse")
    quota_refresh_seconds: float = Field(default=5.0, gt=0)
    quota_stale_seconds: float = Field(default=60.0, gt=0, description="an older snapshot refuses nobody")
    limits_poll_seconds: float = Field(default=0.25, gt=0, description="how soon a worker sees a run-time limit")

    # The incident playbook (shared/playbook) and who may use it
    operator_tenant: str = Field(
        default="operators", min_length=1, description="claim of tokens for /v1/admin; no customer may have this id"
    )
    admin_rps: float = Field(default=2.0, gt=0, description="requests to /v1/admin per machine")
    admin_burst: int = Field(default=30, ge=1)
    automation: bool = Field(default=True, description="false: nothing but reading happens without a person")
    automation_actions_per_hour: int = Field(
        default=6, ge=0, description="reversible actions without a person, all machines together"
    )

    # Browsers, and people who read the API's description
    cors_allowed_origins: str = Field(default="", description="comma-separated, exact")
    cors_localhost: bool = Field(default=False, description="any port of localhost may call from a browser too")
    hsts_seconds: int = Field(default=31_536_000, ge=0, description="staging and prod only; 0 is off")
    docs_pages: bool = Field(default=True, description="/schema and /schema/openapi.json")

    # Usage
    usage_flush_seconds: float = Field(default=1.0, gt=0)
    usage_flush_events: int = Field(default=5_000, ge=1)
    usage_fsync_seconds: float = Field(default=0.5, gt=0, description="what a power loss may cost; see shared/spool.py")
    usage_durability: Literal["async", "sync"] = Field(
        default="async", description="sync: an answer waits until its usage would survive a power loss"
    )
    usage_backlog_events: int = Field(default=10_000, ge=1, description="kept in memory while the disk refuses them")
    usage_spool_limit_bytes: int = Field(
        default=1_073_741_824, ge=1, description="of the spool directory; writes are refused from there on"
    )
    usage_spool_reserve_bytes: int = Field(
        default=67_108_864, ge=0, description="beyond the limit, for the events of what is not refused"
    )
    usage_at_limit: Literal["refuse", "drop"] = Field(
        default="refuse", description="drop: serve on, and lose and count events when the reserve is used up"
    )
    usage_retention_days: int = Field(default=400, ge=1, description="single events; rollups are kept")
    usage_tally_days: int = Field(default=8, ge=1, description="what gateways counted is kept; see shared/tally.py")
    usage_partitions_ahead_days: int = Field(default=7, ge=1, le=366)
    usage_detach_timeout_seconds: float = Field(default=60.0, gt=0, description="waiting for queries on an old day")
    usage_storage_seconds: float = Field(default=900.0, gt=0, description="how often databases are measured")
    usage_dry_run: bool = Field(default=False, description="examine usage, insert nothing: see shared/dry_run.py")
    drain_poll_seconds: float = Field(default=1.0, gt=0)
    drain_linger_seconds: float = Field(default=60.0, ge=0, description="a run ends when nothing came for so long")
    drain_run_seconds: float = Field(default=60.0, gt=0)

    # Backup of all tenants of a machine: shared/fleet.py
    backup_parallel: int = Field(default=4, ge=1, le=64, description="tenants at a time in one run")
    backup_staging_bytes: int = Field(
        default=4_294_967_296, ge=1, description="temporary disk of one run; a larger tenant is refused"
    )
    disk_reserve_bytes: int = Field(
        default=536_870_912,
        ge=0,
        description="of the tenants' volume: no backup, restore test or check takes it",
    )
    backup_force_days: int = Field(
        default=7, ge=0, description="an unchanged tenant is stored anew when its last backup is older"
    )

    # Restore tests: shared/selection.py
    restore_test_share: float = Field(default=0.1, gt=0, le=1, description="of the tenants, drilled by one weekly run")
    restore_test_least: int = Field(default=4, ge=1, description="drills of a run, however few tenants there are")

    # Restore
    lease_seconds: float = Field(default=30.0, gt=0)
    restore_drain_timeout_seconds: float = Field(default=10.0, gt=0)
    restore_generations_kept: int = Field(default=1, ge=1, description="databases from before, engram.db.bak included")
    sweep_seconds: float = Field(default=2.0, gt=0, description="how often the resident drain looks for dead restores")

    # Moving a tenant to another machine: shared/move.py
    move_hold_seconds: float = Field(default=60.0, gt=0, description="longest that writes are refused; then given up")
    move_wait_seconds: float = Field(default=900.0, gt=0, description="for the other machine's part, nothing held")
    move_keep_hours: float = Field(default=24.0, ge=0, description="what the source keeps of a moved tenant")

    # Prometheus, asked by reports and diagnoses; empty: they say so and go on with what they have
    prometheus_url: str = ""
    prometheus_timeout_seconds: float = Field(default=10.0, gt=0)

    # What `engram up --monitoring` and `engram monitor` start (deployments/monitoring.py)
    alertmanager_url: str = ""
    prometheus_host: str = "127.0.0.1"
    prometheus_port: int = Field(default=9090, ge=0, le=65535)
    alertmanager_port: int = Field(default=9093, ge=0, le=65535)
    probe_port: int = Field(default=9115, ge=0, le=65535)
    monitoring_scrape_seconds: float = Field(default=15.0, gt=0)
    monitoring_retention_days: int = Field(default=35, ge=1, description="the error budgets look 30 days back")
    monitoring_minute_seconds: float = Field(
        default=60.0, gt=0, le=60, description="what a minute in the rules becomes in a rehearsal; 60 is as it is"
    )
    monitoring_targets: str = Field(
        default="", description="host:port of each gateway's /metrics, comma-separated, for `engram monitor`"
    )
    monitoring_probe_urls: str = Field(
        default="", description="each gateway as its clients reach it, comma-separated, for `engram monitor`"
    )

    # The bridge from Alertmanager to Prefect (deployments/bridge.py)
    bridge_host: str = "127.0.0.1"
    bridge_port: int = Field(default=8082, ge=0, le=65535)
    bridge_token: SecretStr = Field(default=SecretStr(""), description="Alertmanager's credential; dev makes one")
    bridge_body_limit_bytes: int = Field(default=1_048_576, ge=1_024)
    heartbeat_url: SecretStr = Field(
        default=SecretStr(""), description="of a dead man's switch elsewhere; asked once a minute while alerts get here"
    )

    # Prefect
    prefect_api_url: str = Field(default="", validation_alias=AliasChoices("PREFECT_API_URL", "prefect_api_url"))
    prefect_api_auth_string: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices("PREFECT_API_AUTH_STRING", "prefect_api_auth_string"),
        description="user:password; an own server of `engram up` asks for it too",
    )
    prefect_port: int = Field(default=4200, ge=0, le=65535)
    prefect_work_pool: str = "engram"
    prefect_worker_limit: int = Field(default=4, ge=1, description="runs at a time on a machine, but for urgent ones")
    prefect_urgent_limit: int = Field(default=4, ge=1, description="restores and what repairs, beside them")
    prefect_retention_days: int = Field(
        default=14, ge=1, description="of ended runs, with an own server of `engram up`"
    )
    prefect_pick_up_seconds: float = Field(default=120.0, gt=0, description="for a worker to take up a run")
    machine_id: str = Field(default="local", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")

    # Readiness and stopping of `engram up`
    start_timeout_seconds: float = Field(default=120.0, gt=0)
    stop_timeout_seconds: float = Field(default=30.0, gt=0)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ValueFile(settings_cls)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        for network in words(value):
            ipaddress.ip_network(network)
        return value

    @field_validator("machine_id")
    @classmethod
    def _is_no_queue(cls, value: str) -> str:
        if value in _QUEUES or value.endswith("-urgent"):
            raise ValueError("a work queue has that name (shared/queues.py): choose another")
        return value

    @field_validator("routing_apps", "routing_urls")
    @classmethod
    def _are_by_machine(cls, value: str) -> str:
        by_machine(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        set_by_person = set(self.model_fields_set)
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.object_store_url and self.env == "dev":
            self.object_store_url = (self.data_dir / "objects").as_uri()
        if found := self._contradictions():
            raise Contradictions(found)
        # Assigning marks a field as set; `is_set` must go on telling what the person set.
        self.__pydantic_fields_set__.intersection_update(set_by_person)
        return self

    def _contradictions(self) -> list[tuple[tuple[str, ...], str]]:
        """Settings that do not go together: which to leave out and the others do, and what is wrong."""
        found: list[tuple[tuple[str, ...], str]] = []
        if self.usage_durability == "sync" and self.usage_at_limit == "drop":
            both = "usage_durability=sync loses no event and usage_at_limit=drop does: choose one"
            found.append((("usage_at_limit",), both))
        if self.point_in_time == "litestream" and self.backup_encryption != "none":
            plain = "litestream cannot encrypt its copies: choose point_in_time or backup_encryption"
            found.append((("point_in_time",), plain))
        if self.s3_checksum == "none" and not self.object_store_read_back:
            unread = "without s3_checksum an upload must be read back: set object_store_read_back"
            found.append((("s3_checksum",), unread))
        if self.routing == "fly-replay" and not (self.routing_apps and words(self.trusted_proxies)):
            found.append((("routing",), "routing=fly-replay needs routing_apps, and Fly's proxy in trusted_proxies"))
        if self.routing == "forward" and not self.routing_urls:
            found.append((("routing",), "routing=forward needs routing_urls"))
        pairs = [("tls_certificate", "tls_key")]
        pairs += [(f"s3_{role}_access_key_id", f"s3_{role}_secret_access_key") for role in ("read", "delete")]
        for one, other in pairs:
            if bool(_plain(getattr(self, one))) != bool(_plain(getattr(self, other))):
                found.append(((one, other), f"{one} and {other} belong together: set both or none"))
        return found

    def is_set(self, name: str) -> bool:
        """Whether the environment or the value file set this value, rather than a default filling it."""
        return name in self.model_fields_set

    def require(self, *names: str) -> None:
        """Raise `Permanent` naming every one of `names` that is empty, all at once."""
        missing = [n for n in names if not _plain(getattr(self, n))]
        if missing:
            raise Permanent("not set: " + ", ".join(variable(n) for n in missing))

    def s3_credentials(self, role: Literal["write", "read", "delete"]) -> tuple[str, str]:
        """Key id and secret for what is to be done. Raises `Permanent` when there are none."""
        own = "" if role == "write" or not getattr(self, f"s3_{role}_access_key_id") else f"{role}_"
        names = (f"s3_{own}access_key_id", f"s3_{own}secret_access_key")
        self.require(*names)
        return _plain(getattr(self, names[0])), _plain(getattr(self, names[1]))

    @property
    def spool_dir(self) -> Path:
        return self.data_dir / "spool"

    @property
    def tenants_dir(self) -> Path:
        return self.data_dir / "tenants"

    @property
    def run_dir(self) -> Path:
        """What the processes of this machine share while they run; nothing in it is worth a backup."""
        return self.data_dir / "run"

    @property
    def sandbox_dir(self) -> Path:
        """Where restore tests open copies: apart from `tenants_dir`, so a drill can never touch a tenant."""
        return self.data_dir / "sandbox"

    @property
    def gateway_url(self) -> str:
        """Where a client on this machine reaches the gateway. With TLS its certificate names the public host."""
        host = "127.0.0.1" if self.gateway_host in ("0.0.0.0", "::", "") else self.gateway_host
        scheme = "https" if self.tls_certificate else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.gateway_port}"

    @property
    def prefect_ui_url(self) -> str:
        return self.prefect_api_url.removesuffix("/").removesuffix("/api")


class Contradictions(ValueError):
    """All settings that do not go together: names and what is wrong with them."""

    def __init__(self, found: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(what for _, what in found))
        self.found = found


_QUEUES = frozenset({"default", "urgent", "upkeep"})  # those that all machines share: shared/queues.py
# Read by Prefect's own clients under these names, so they have no prefix.
_PREFECTS_OWN = frozenset({"prefect_api_url", "prefect_api_auth_string"})


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def variable(name: str) -> str:
    """What a setting is called outside."""
    return name.upper() if name in _PREFECTS_OWN else f"{environment.PREFIX}{name.upper()}"


def words(value: str) -> list[str]:
    """The parts of a comma-separated setting."""
    return [part.strip() for part in value.split(",") if part.strip()]


def by_machine(value: str) -> tuple[str, dict[str, str]]:
    """A setting that names something of each machine: the pattern with `{machine_id}` (or ""), and what stands for
    single machines. Raises `ValueError`."""
    pattern, named = "", {}
    for word in words(value):
        machine_id, mark, of_machine = word.partition("=")
        if mark and machine_id and of_machine and "{" not in word:
            named[machine_id] = of_machine
        elif not (mark or pattern) and word.count("{machine_id}") == word.count("{") == 1:
            pattern = word
        else:
            raise ValueError("want one pattern with {machine_id}, or machine=value, or both, comma-separated")
    return pattern, named


class _ValueFile(PydanticBaseSettingsSource):
    """`deployments/environments/{env}.env`, below the process's environment; checks the names in both."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # all at once below

    def __call__(self) -> dict[str, Any]:
        known = frozenset(self.settings_cls.model_fields)
        environment.check_names(os.environ, known)
        env = self.current_state.get("env", "dev")
        if env not in environment.ENVIRONMENTS:
            return {}  # pydantic says so
        return dict(environment.read(environment.value_file(env), known))


def redact_url(url: str) -> str:
    """The URL without its password, for logs and tables."""
    url = re.sub(r"(password=)('[^']*'|[^&\s]*)", r"\1***", url)  # libpq takes it as a parameter too
    return re.sub(r"(://[^:/?#@]*):.*@", r"\1:***@", url)  # up to the last @: a password may hold any character


@functools.cache
def settings() -> Settings:
    """The process's settings, read once from the environment."""
    return Settings()
