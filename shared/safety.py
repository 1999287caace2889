"""Which values staging and prod must not run with: one table, read by `engram config check` and by every process.

A pure function over settings: nothing is connected to, no file is opened. dev is never unsafe. A rule looks at one
setting (some beside others) and says why the value harms and what is wanted instead; all are judged, so that an
environment is mended in one go.

Secrets are told apart by being there or not, and Prefect's credential by its length; `shown` is the only way a value
leaves here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from shared.errors import Refused
from shared.settings import Settings, by_machine, redact_url, variable, words

HSTS_LEAST_SECONDS = 15_552_000  # half a year, below which preload lists and audits call it none
LEEWAY_MOST_SECONDS = 120.0
LEASE_LEAST_SECONDS = 10.0
STALE_KEYS_MOST_SECONDS = 604_800.0  # a week: an issuer is mended by then
USAGE_LEAST_DAYS = 62  # a month, and the next one to dispute its bill in
BACKUP_AGE_LEAST_HOURS = 1.0
PASSWORD_LEAST_CHARACTERS = 12
# The least prefix of a proxy's network that is public: those of the largest, Cloudflare and CloudFront, are longer.
_PROXIES_LEAST_PREFIX = {4: 12, 6: 28}
# What is empty after a restart of the machine, or may be emptied while it runs.
_PASSING = tuple(map(Path, ("/tmp", "/dev/shm", "/run", "/var/run")))
_STAGING_AND_PROD = frozenset({"staging", "prod"})
_PROD = frozenset({"prod"})
_HIDDEN = "***"
# What only those hold who make, open or delete backups.
OF_BACKUPS = frozenset(
    {
        *(f"s3_{role}{part}" for role in ("", "read_", "delete_") for part in ("access_key_id", "secret_access_key")),
        *("backup_master_key", "backup_master_keys_older"),
    }
)
# What a gateway is not given: who breaks into one must find nothing to open backups or to start runs with.
NOT_A_GATEWAYS = OF_BACKUPS | {"prefect_api_auth_string", "bridge_token", "heartbeat_url"}
# What those use that only watch and tell: the bridge, `engram monitor`. They need not be given the rest.
_WATCHERS = frozenset(
    {
        *("env", "data_dir", "log_level", "prefect_api_url", "prefect_api_auth_string"),
        *("bridge_token", "heartbeat_url", "monitoring_minute_seconds"),
    }
)
NOT_WATCHERS = Settings.model_fields.keys() - _WATCHERS


class Finding(NamedTuple):
    """One value that is unsafe here. `value` is fit to be printed."""

    name: str
    value: str
    why: str
    want: str


class Rule(NamedTuple):
    name: str
    environments: frozenset[str]
    is_unsafe: Callable[[Settings], bool]
    why: str
    want: str


def unsafe(settings: Settings, without: Collection[str] = ()) -> list[Finding]:
    """Every unsafe value of this environment, but for the settings in `without`; empty in dev."""
    return [
        Finding(variable(rule.name), shown(settings, rule.name), rule.why, rule.want)
        for rule in RULES
        if settings.env in rule.environments and rule.name not in without and rule.is_unsafe(settings)
    ]


def refuse_unsafe(settings: Settings, without: Collection[str] = ()) -> None:
    """Raises `Refused` naming every unsafe value."""
    if found := unsafe(settings, without):
        listed = "; ".join(f"{f.name} is {f.value or 'not set'} ({f.why}), want {f.want}" for f in found)
        raise Refused(f"{settings.env} is not safe to start, {len(found)} to mend: {listed}")


def shown(settings: Settings, name: str) -> str:
    """A setting as it may be printed: no secret, no password, no query of a URL."""
    value = getattr(settings, name)
    if isinstance(value, SecretStr):
        return _shown_database(value.get_secret_value()) if name == "control_plane_url" else _HIDDEN if value else ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if name.endswith("access_key_id"):
        return text[:4] + "…" if text else ""
    if "://" in text:
        address, mark, _ = redact_url(text).partition("?")
        return address + (mark and f"?{_HIDDEN}")
    return text


def _shown_database(url: str) -> str:
    """Where it leads and how, from what libpq makes of it; `***` when that is nothing."""
    if not url:
        return ""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error:
        return _HIDDEN
    named = [f"{key}={parts[key]}" for key in ("host", "port", "dbname", "user", "sslmode") if parts.get(key)]
    return " ".join(named) or _HIDDEN


def _empty(name: str) -> Callable[[Settings], bool]:
    return lambda settings: not shown(settings, name)


def _is(name: str, *values: Any) -> Callable[[Settings], bool]:
    return lambda settings: getattr(settings, name) in values


def _is_here(host: str) -> bool:
    """This machine: what is said to it no network sees."""
    named = host == "localhost" or host.endswith(".localhost") or host.startswith(("/", "@"))
    return named or _is_address(host, "is_loopback") or _is_address(host, "is_unspecified")


def _is_inside(host: str) -> bool:
    """This machine or a private network."""
    return _is_here(host) or host.endswith((".internal", ".flycast")) or _is_address(host, "is_private")


def _is_address(host: str, kind: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host.strip("[]")), kind))
    except ValueError:
        return False


def _open_database(settings: Settings) -> bool:
    """Over a network without proof of who is there."""
    url = settings.control_plane_url.get_secret_value()
    if not url:
        return False
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error:
        return True
    hosts = str(parts.get("hostaddr") or parts.get("host") or "").split(",")
    if "service" in parts or not all(hosts):
        return True  # where to is left to a file, or to PGHOST
    if all(_is_here(host) for host in hosts):
        return False
    mode, binding = parts.get("sslmode"), parts.get("channel_binding")
    return mode not in ("verify-full", "verify-ca") and not (mode == "require" and binding == "require")


def _not_https(name: str, allowed: Callable[[str], bool] = lambda _: False) -> Callable[[Settings], bool]:
    """A URL that is set and would be fetched in plain text, or is none."""

    def judge(settings: Settings) -> bool:
        value = getattr(settings, name)
        return bool(value) and _is_open(value, allowed)

    return judge


def _is_open(address: str, allowed: Callable[[str], bool]) -> bool:
    try:
        url = urlsplit(address)
        host = url.hostname or ""
    except ValueError:
        return True
    return not host or not (url.scheme == "https" or (url.scheme == "http" and allowed(host)))


def _is_of_dev(name: str) -> Callable[[Settings], bool]:
    """Of an issuer that anybody on this machine could be."""

    def judge(settings: Settings) -> bool:
        value = getattr(settings, name)
        return bool(value) and (_is_open(value, lambda _: False) or _is_here(urlsplit(value).hostname or ""))

    return judge


def _wide_proxies(settings: Settings) -> bool:
    """More of the public internet than any proxy has addresses."""
    networks = [ipaddress.ip_network(network) for network in words(settings.trusted_proxies)]
    return any(not n.is_private and n.prefixlen < _PROXIES_LEAST_PREFIX[n.version] for n in networks)


def _short_password(settings: Settings) -> bool:
    credential = settings.prefect_api_auth_string.get_secret_value()
    return bool(credential) and len(credential.partition(":")[2]) < PASSWORD_LEAST_CHARACTERS


def _open_routing(settings: Settings) -> bool:
    pattern, named = by_machine(settings.routing_urls)
    addresses = [*named.values(), *([pattern.replace("{machine_id}", "m")] if pattern else [])]
    return any(_is_open(address, _is_inside) for address in addresses)


def _outlives_a_stop(settings: Settings) -> bool:
    """A quarter of the time goes to the request's body (`gateway.patience`), 5 s to reach the other machine
    (`gateway.forward`)."""
    left_seconds = 3 / 4 * settings.gateway_kill_timeout_seconds - 5
    return settings.routing != "off" and settings.routing_timeout_seconds > left_seconds


def _loose_origins(settings: Settings) -> bool:
    """One that is not an https address in full, or that each browser finds somewhere else: in its own network."""
    origin = re.compile(r"https://([a-z0-9-]+(\.[a-z0-9-]+)*)(:\d{1,5})?/?\Z")
    found = [origin.match(word) for word in words(settings.cors_allowed_origins)]
    return not all(match and not _is_here(match[1]) and not _is_address(match[1], "is_private") for match in found)


RULES = (
    Rule("control_plane_url", _STAGING_AND_PROD, _empty("control_plane_url"),
         "there is no embedded PostgreSQL here", "this environment's own Neon branch"),
    Rule("control_plane_url", _STAGING_AND_PROD, _open_database,
         "who is on the way can read and change it", "sslmode=verify-full, or require with channel_binding=require"),
    Rule("object_store_url", _STAGING_AND_PROD, lambda s: not re.match(r"s3://[^/]", s.object_store_url),
         "backups would lie on the disk they are to outlive", "s3://bucket/prefix"),
    Rule("s3_endpoint", _STAGING_AND_PROD, _not_https("s3_endpoint", _is_here),
         "backups would travel in plain text", "https://…"),
    Rule("s3_access_key_id", _STAGING_AND_PROD, _empty("s3_access_key_id"),
         "no backup could be stored", "the bucket's key"),
    Rule("s3_secret_access_key", _STAGING_AND_PROD, _empty("s3_secret_access_key"),
         "no backup could be stored", "the bucket's secret"),
    Rule("backup_master_key", _STAGING_AND_PROD, lambda s: s.backup_encryption == "age" and not s.backup_master_key,
         "no encrypted backup could be made or opened", "the key `engram keys new` printed"),
    Rule("jwt_issuer", _STAGING_AND_PROD, _empty("jwt_issuer"), "tokens could not be judged", "the issuer's https URL"),
    Rule("jwt_issuer", _STAGING_AND_PROD, _is_of_dev("jwt_issuer"),
         "it is a development issuer's", "the issuer's https URL"),
    Rule("jwks_url", _STAGING_AND_PROD, _empty("jwks_url"), "tokens could not be judged", "https://…"),
    Rule("jwks_url", _STAGING_AND_PROD, _is_of_dev("jwks_url"),
         "who is on the way, or on this machine, could add keys of their own", "the issuer's https://…"),
    Rule("jwks_stale_max_seconds", _STAGING_AND_PROD, lambda s: s.jwks_stale_max_seconds > STALE_KEYS_MOST_SECONDS,
         "keys that were taken back would be believed while nobody answers", f"at most {STALE_KEYS_MOST_SECONDS:g}"),
    Rule("jwt_leeway_seconds", _PROD, lambda s: s.jwt_leeway_seconds > LEEWAY_MOST_SECONDS,
         "tokens would live on after their end", f"at most {LEEWAY_MOST_SECONDS:g}"),
    Rule("prefect_api_url", _STAGING_AND_PROD, _empty("prefect_api_url"),
         "there is no embedded Prefect server here", "the API of this environment's Prefect server"),
    Rule("prefect_api_url", _STAGING_AND_PROD, _not_https("prefect_api_url", _is_inside),
         "who is on the way could start restores", "https://…, or an address of a private network"),
    Rule("prefect_api_auth_string", _STAGING_AND_PROD, _empty("prefect_api_auth_string"),
         "a Prefect server that asks nobody lets everybody near it start restores",
         "user:password, as in the server's PREFECT_SERVER_API_AUTH_STRING"),
    Rule("prefect_api_auth_string", _STAGING_AND_PROD, _short_password, "whoever guesses it can start restores",
         f"user:password with {PASSWORD_LEAST_CHARACTERS} characters or more after the colon"),
    Rule("tls_certificate", _STAGING_AND_PROD, lambda s: not s.tls_certificate and not words(s.trusted_proxies),
         "tokens and memories would travel in plain text",
         "a certificate and ENGRAM_TLS_KEY, or in ENGRAM_TRUSTED_PROXIES the proxies that end TLS"),
    Rule("trusted_proxies", _STAGING_AND_PROD, _wide_proxies,
         "anybody could claim any address", "the networks of your own proxies"),
    Rule("routing_urls", _STAGING_AND_PROD, _open_routing,
         "tokens and memories would travel in plain text", "https://…, or addresses of a private network"),
    Rule("routing_timeout_seconds", _STAGING_AND_PROD, _outlives_a_stop,
         "a stopping gateway would be killed while it waits for another machine's, and the request cut",
         "at most ¾ of ENGRAM_GATEWAY_KILL_TIMEOUT_SECONDS less 5"),
    Rule("cors_allowed_origins", _STAGING_AND_PROD, _loose_origins,
         "other people's pages could call in a user's browser", "https origins, each in full"),
    Rule("cors_localhost", _PROD, _is("cors_localhost", True),
         "whatever runs on a user's own machine could call in their browser", "false"),
    Rule("hsts_seconds", _PROD, lambda s: s.hsts_seconds < HSTS_LEAST_SECONDS,
         "browsers would forget to insist on TLS", f"at least {HSTS_LEAST_SECONDS}"),
    Rule("docs_pages", _PROD, _is("docs_pages", True), "the API describes itself to everybody", "false"),
    Rule("rate_limit_mode", _PROD, lambda s: s.rate_limit_mode != "enforce", "nobody would be slowed down", "enforce"),
    Rule("rate_limit_mode", frozenset({"staging"}), _is("rate_limit_mode", "off"),
         "nobody would see whom prod will refuse", "shadow or enforce"),
    Rule("rate_limit_rps", _STAGING_AND_PROD, _is("rate_limit_rps", 0),
         "a tenant without a limit of its own would have none", "more than 0"),
    Rule("unauthenticated_rps", _STAGING_AND_PROD, _is("unauthenticated_rps", 0),
         "tokens could be guessed at any rate", "more than 0"),
    Rule("quota_mode", _PROD, lambda s: s.quota_mode != "enforce", "plans would not hold", "enforce"),
    Rule("quota_mode", frozenset({"staging"}), _is("quota_mode", "off"),
         "nobody would see whom prod will refuse", "shadow or enforce"),
    Rule("usage_dry_run", _PROD, _is("usage_dry_run", True), "nothing would be billed", "false"),
    Rule("usage_at_limit", _PROD, _is("usage_at_limit", "drop"), "usage would be lost on a full disk", "refuse"),
    Rule("usage_retention_days", _PROD, lambda s: s.usage_retention_days < USAGE_LEAST_DAYS,
         "a bill could not be explained any more", f"at least {USAGE_LEAST_DAYS}"),
    Rule("retention_min_age_hours", _STAGING_AND_PROD, lambda s: s.retention_min_age_hours < BACKUP_AGE_LEAST_HOURS,
         "a backup could be deleted as soon as it was made", f"at least {BACKUP_AGE_LEAST_HOURS:g}"),
    Rule("data_dir", _STAGING_AND_PROD, lambda s: any(s.data_dir.is_relative_to(place) for place in _PASSING),
         "tenants would be gone after a restart of the machine", "a directory on a disk that stays"),
    Rule("monitoring_minute_seconds", _STAGING_AND_PROD, lambda s: s.monitoring_minute_seconds < 60,
         "alerts would speak of other times than they say", "60"),
    Rule("lease_seconds", _STAGING_AND_PROD, lambda s: s.lease_seconds < LEASE_LEAST_SECONDS,
         "a restore would lose its lease to a pause", f"at least {LEASE_LEAST_SECONDS:g}"),
    Rule("machine_id", _STAGING_AND_PROD, _is("machine_id", "local", ""),
         "two machines of that name would each back up the other's tenants", "a name no other machine has"),
    Rule("prometheus_url", _PROD, _empty("prometheus_url"),
         "nobody could be told that an alert fires", "the Prometheus that watches this environment"),
    Rule("prometheus_url", _STAGING_AND_PROD, _not_https("prometheus_url", _is_inside),
         "who is on the way could tell diagnoses anything", "https://…, or an address of a private network"),
    # Where alerts come in; the other machines are not told of it.
    Rule("heartbeat_url", _PROD, lambda s: bool(s.bridge_token) and not s.heartbeat_url,
         "nobody would be told when what sends the alerts is dead", "the address of a dead man's switch elsewhere"),
    Rule("heartbeat_url", _STAGING_AND_PROD, lambda s: bool(url := s.heartbeat_url.get_secret_value())
         and _is_open(url, _is_here), "who is on the way could keep the switch quiet", "https://…"),
    Rule("log_level", _PROD, _is("log_level", "debug"), "libraries log what they send", "info, warning or error"),
)  # fmt: skip
