"""What staging and prod must not run with: each rule by itself, and what is good enough."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import Refused
from shared.safety import NOT_A_GATEWAYS, OF_BACKUPS, RULES, refuse_unsafe, unsafe
from shared.settings import Settings, variable
from tests.environment_fixtures import KEY_IDS, SECRET, nothing_set, settings  # noqa: F401


@pytest.mark.parametrize("env", ["staging", "prod"])
def test_an_environment_with_everything_set_right_is_safe(env: str) -> None:
    """Otherwise nobody could start, and the check would be switched off."""
    assert unsafe(settings(env)) == []
    assert unsafe(settings(env, trusted_proxies="", tls_certificate="c.pem", tls_key="k.pem")) == []
    refuse_unsafe(settings(env))


def test_dev_is_never_unsafe() -> None:
    """Embedded parts, plain HTTP and tokens of one's own are what it is for."""
    assert unsafe(Settings()) == []
    assert unsafe(settings("dev", usage_dry_run=True, rate_limit_mode="off", cors_allowed_origins="*")) == []


UNSAFE: list[tuple[str, Any, str]] = [
    ("control_plane_url", "", "staging prod"),
    ("control_plane_url", "postgresql://u:p@ep.neon.test/d", "staging prod"),
    ("control_plane_url", "postgresql://u:p@ep.neon.test/d?sslmode=prefer", "staging prod"),
    ("control_plane_url", "postgresql://u:p@ep.neon.test/d?sslmode=require", "staging prod"),
    ("control_plane_url", "postgresql://u:p@127.0.0.1,ep.neon.test/d", "staging prod"),
    ("control_plane_url", "postgresql://u:p@127.0.0.1/d?hostaddr=192.0.2.1", "staging prod"),
    ("control_plane_url", "service=elsewhere", "staging prod"),
    ("control_plane_url", "nonsense", "staging prod"),
    ("control_plane_url", "postgresql:///engram", "staging prod"),
    ("control_plane_url", "dbname=engram", "staging prod"),
    ("control_plane_url", "postgresql://u:p@127.0.0.1,/d", "staging prod"),
    ("object_store_url", "", "staging prod"),
    ("object_store_url", "file:///data/objects", "staging prod"),
    ("object_store_url", "s3://", "staging prod"),
    ("s3_endpoint", "http://account.r2.test", "staging prod"),
    ("s3_access_key_id", "", "staging prod"),
    ("s3_secret_access_key", "", "staging prod"),
    ("jwt_issuer", "", "staging prod"),
    ("jwt_issuer", "http://issuer.test", "staging prod"),
    ("jwt_issuer", "https://localhost:8081", "staging prod"),
    ("jwt_issuer", "issuer", "staging prod"),
    ("jwks_url", "", "staging prod"),
    ("jwks_url", "http://issuer.test/jwks.json", "staging prod"),
    ("jwks_url", "http://127.0.0.1:8081/jwks.json", "staging prod"),
    ("jwks_url", "https://[", "staging prod"),
    ("jwks_url", "https://localhost:8081/jwks.json", "staging prod"),
    ("jwks_url", "https://issuer.localhost/jwks.json", "staging prod"),
    ("jwks_url", "https://[::1]/jwks.json", "staging prod"),
    ("jwks_stale_max_seconds", 1e12, "staging prod"),
    ("jwt_leeway_seconds", 121, "prod"),
    ("prefect_api_url", "", "staging prod"),
    ("prefect_api_url", "http://prefect.test/api", "staging prod"),
    ("prefect_api_auth_string", "", "staging prod"),
    ("prefect_api_auth_string", "x", "staging prod"),
    ("prefect_api_auth_string", "engram:engram", "staging prod"),
    ("prefect_api_auth_string", "a-long-user-name:x", "staging prod"),
    ("trusted_proxies", "0.0.0.0/0", "staging prod"),
    ("trusted_proxies", "10.0.0.0/8, ::/0", "staging prod"),
    ("trusted_proxies", "10.0.0.0/8, 104.0.0.0/8", "staging prod"),
    ("trusted_proxies", "2400::/12", "staging prod"),
    ("routing_urls", "http://{machine_id}.example:8080", "staging prod"),
    ("routing_urls", "http://engram-{machine_id}.internal:8080,data-7=http://data-7.example", "staging prod"),
    ("routing_urls", "engram-{machine_id}", "staging prod"),
    ("cors_allowed_origins", "*", "staging prod"),
    ("cors_allowed_origins", "null", "staging prod"),
    ("cors_allowed_origins", "http://app.example", "staging prod"),
    ("cors_allowed_origins", "https://app.example, https://*.example", "staging prod"),
    ("cors_allowed_origins", "https://localhost:3000", "staging prod"),
    ("cors_allowed_origins", "https://dev.localhost:3000", "staging prod"),
    ("cors_allowed_origins", "https://0.0.0.0", "staging prod"),
    ("cors_allowed_origins", "https://app.example, https://10.0.0.5", "staging prod"),
    ("cors_allowed_origins", "https://127.0.0.1:3000", "staging prod"),
    ("cors_localhost", True, "prod"),
    ("hsts_seconds", 86_400, "prod"),
    ("docs_pages", True, "prod"),
    ("rate_limit_mode", "off", "staging prod"),
    ("rate_limit_mode", "shadow", "prod"),
    ("rate_limit_rps", 0, "staging prod"),
    ("unauthenticated_rps", 0, "staging prod"),
    ("quota_mode", "off", "staging prod"),
    ("quota_mode", "shadow", "prod"),
    ("usage_dry_run", True, "prod"),
    ("usage_at_limit", "drop", "prod"),
    ("usage_retention_days", 1, "prod"),
    ("retention_min_age_hours", 0, "staging prod"),
    ("data_dir", "/tmp/x", "staging prod"),
    ("data_dir", "/dev/shm", "staging prod"),
    ("monitoring_minute_seconds", 1, "staging prod"),
    ("lease_seconds", 1, "staging prod"),
    ("machine_id", "local", "staging prod"),
    ("prometheus_url", "", "prod"),
    ("prometheus_url", "nonsense", "staging prod"),
    ("prometheus_url", "http://prometheus.example", "staging prod"),
    ("heartbeat_url", "http://switch.example/key", "staging prod"),
    ("heartbeat_url", "switch", "staging prod"),
    ("log_level", "debug", "prod"),
]


@pytest.mark.parametrize(("name", "value", "environments"), UNSAFE)
def test_an_unsafe_value_is_found_alone_and_where_it_harms(name: str, value: Any, environments: str) -> None:
    """Each by itself: no rule hides behind another, and none speaks of a value that is as it should be."""
    for env in ("staging", "prod"):
        found = unsafe(settings(env, **{name: value}))
        named = [f.name for f in found]
        assert named == ([variable(name)] if env in environments else []), env
        assert all(f.why and f.want for f in found)


def test_two_that_only_harm_together_are_found_together() -> None:
    """No TLS and no proxy that ends it; encryption without its key; alerts that nobody would miss; a forwarded request
    that outlives a stop."""
    assert [f.name for f in unsafe(settings("prod", trusted_proxies=""))] == ["ENGRAM_TLS_CERTIFICATE"]
    assert [f.name for f in unsafe(settings("prod", backup_encryption="age"))] == ["ENGRAM_BACKUP_MASTER_KEY"]
    assert [f.name for f in unsafe(settings("prod", bridge_token="t"))] == ["ENGRAM_HEARTBEAT_URL"]
    assert unsafe(settings("staging", bridge_token="t")) == []
    assert unsafe(settings("prod", bridge_token="t", heartbeat_url="https://switch.example/key")) == []
    forwards = {"routing": "forward", "routing_urls": "http://engram-{machine_id}.internal:8080"}
    assert unsafe(settings("prod", **forwards)) == unsafe(settings("prod", routing_timeout_seconds=19)) == []
    found = unsafe(settings("prod", **forwards, routing_timeout_seconds=19))
    assert [f.name for f in found] == ["ENGRAM_ROUTING_TIMEOUT_SECONDS"]
    assert unsafe(settings("prod", **forwards, routing_timeout_seconds=19, gateway_kill_timeout_seconds=32)) == []
    found = unsafe(settings("prod", **forwards, routing_timeout_seconds=5, gateway_kill_timeout_seconds=10))
    assert [f.name for f in found] == ["ENGRAM_ROUTING_TIMEOUT_SECONDS"]


def test_every_rule_was_seen_to_object() -> None:
    """A rule without a case may never have worked."""
    judged = {name for name, _, _ in UNSAFE} | {"tls_certificate", "backup_master_key", "routing_timeout_seconds"}
    assert {rule.name for rule in RULES} == judged
    for rule in RULES:
        assert rule.name in Settings.model_fields


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("control_plane_url", "postgresql://u:p@h.test/d?sslmode=require&channel_binding=require"),
        ("control_plane_url", "postgresql://u:p@127.0.0.1:6432/d"),  # a pooler beside us
        ("control_plane_url", "host=/run/postgresql dbname=d"),
        ("control_plane_url", "postgresql://u:p@a.test,b.test/d?sslmode=verify-ca"),
        ("s3_endpoint", ""),
        ("s3_endpoint", "http://127.0.0.1:8333"),
        ("prefect_api_url", "http://10.0.0.7:4200/api"),
        ("prefect_api_url", "https://prefect.test/api"),
        ("trusted_proxies", "fdaa::/16, 172.16.0.0/12, 192.0.2.7/32"),
        ("trusted_proxies", "104.16.0.0/13, 2400:cb00::/32"),
        ("data_dir", "/tmpfiles"),
        ("cors_allowed_origins", "https://app.example, https://app.example:8443/"),
        ("cors_allowed_origins", ""),
        ("routing_urls", "http://engram-{machine_id}.internal:8080,data-7=https://data-7.example"),
        ("hsts_seconds", 15_552_000),
        ("log_level", "warning"),
    ],
)
def test_what_is_good_enough_is_let_through(name: str, value: Any) -> None:
    """A private network, a pooler on the same machine, exact origins."""
    assert unsafe(settings("prod", **{name: value})) == []


def test_a_refusal_names_everything_at_once_with_why_and_what_instead() -> None:
    """One start, one list, one edit."""
    with pytest.raises(Refused) as refused:
        refuse_unsafe(settings("prod", jwks_url="http://x.test", usage_dry_run=True, machine_id="local"))
    assert refused.value.exit_code == 3
    assert str(refused.value) == (
        "prod is not safe to start, 3 to mend: "
        "ENGRAM_JWKS_URL is http://x.test (who is on the way, or on this machine, could add keys of their own), "
        "want the issuer's https://…; "
        "ENGRAM_USAGE_DRY_RUN is true (nothing would be billed), want false; "
        "ENGRAM_MACHINE_ID is local (two machines of that name would each back up the other's tenants), "
        "want a name no other machine has"
    )


def test_a_gateway_needs_no_key_of_the_backups() -> None:
    """Least privilege: `engram serve` starts where the others would not, and the bridge without the keys alone."""
    held = {"s3_access_key_id": "", "s3_secret_access_key": "", "prefect_api_auth_string": ""}
    lacking = settings("prod", **held, backup_encryption="age")
    assert {f.name for f in unsafe(lacking)} == {variable(name) for name in (*held, "backup_master_key")}
    assert {name for name in SECRET | KEY_IDS if name != "control_plane_url"} == NOT_A_GATEWAYS
    refuse_unsafe(lacking, NOT_A_GATEWAYS)
    assert [f.name for f in unsafe(lacking, OF_BACKUPS)] == ["PREFECT_API_AUTH_STRING"]
