"""Settings: names, defaults, what is missing, what must not be printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from shared.errors import Permanent
from shared.settings import Settings, redact_url
from tests.environment_fixtures import nothing_set  # noqa: F401

UNITS = {
    "_seconds": float,
    "_days": int,
    "_bytes": int,
    "_events": int,
    "_entries": int,
    "_port": int,
    "_rps": float,
    "_hours": float,
}
COUNTS = {  # a bare number whose noun is the unit
    "control_plane_pool_size",
    "object_store_retries",
    "gateway_workers",
    "gateway_threads",
    "gateway_backlog",
    "gateway_connections",
    "tenant_pool_size",
    "rate_limit_burst",
    "unauthenticated_burst",
    "inflight_requests",
    "inflight_tenant_requests",
    "prefect_worker_limit",
    "prefect_urgent_limit",
    "restore_generations_kept",
    "backup_compression_level",
    "backup_parallel",
    "verify_parallel",
    "restore_test_share",  # of the tenants, 0 to 1
    "restore_test_least",
    "automation_actions_per_hour",
    "admin_burst",
}


def test_every_number_says_its_unit_in_its_name() -> None:
    """`timeout=30` has been read as minutes before."""
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float) and name not in COUNTS:
            assert name.endswith(tuple(UNITS)), name
            if not name.endswith("_seconds"):
                assert field.annotation is next(kind for unit, kind in UNITS.items() if name.endswith(unit)), name
    assert set(Settings.model_fields) >= COUNTS


def test_every_published_setting_exists() -> None:
    """The contract lists them; operators set them by these names."""
    published = [
        "env",
        "data_dir",
        "control_plane_url",
        "object_store_url",
        "s3_endpoint",
        "s3_region",
        "s3_access_key_id",
        "s3_secret_access_key",
        "jwt_issuer",
        "jwt_audience",
        "jwks_url",
        "jwt_tenant_claim",
        "jwt_leeway_seconds",
        "gateway_host",
        "gateway_port",
        "gateway_workers",
        "prefect_api_url",
        "prefect_port",
        "lease_seconds",
        "usage_flush_seconds",
        "usage_flush_events",
        "rate_limit_rps",
        "rate_limit_burst",
        "body_limit_bytes",
    ]
    assert set(published) <= set(Settings.model_fields)


def test_require_names_everything_that_is_missing_at_once() -> None:
    """An operator should fix an environment in one go."""
    with pytest.raises(Permanent) as caught:
        Settings(jwt_issuer="https://i").require("control_plane_url", "jwt_issuer", "jwks_url", "prefect_api_url")
    assert str(caught.value) == "not set: ENGRAM_CONTROL_PLANE_URL, ENGRAM_JWKS_URL, PREFECT_API_URL"
    Settings(jwks_url="x", control_plane_url="y").require("jwks_url", "control_plane_url")


def test_the_environment_is_read_and_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ENGRAM_GATEWAY_PORT=` in a deploy file means the default, not a crash."""
    monkeypatch.setenv("ENGRAM_GATEWAY_PORT", "")
    monkeypatch.setenv("ENGRAM_LEASE_SECONDS", "1.5")
    monkeypatch.setenv("PREFECT_API_URL", "http://p/api")
    made = Settings()
    assert (made.gateway_port, made.lease_seconds, made.prefect_ui_url) == (8080, 1.5, "http://p")
    assert made.is_set("lease_seconds")
    assert not made.is_set("gateway_port")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENGRAM_ENV", "production"),
        ("ENGRAM_LEASE_SECONDS", "0"),
        ("ENGRAM_GATEWAY_PORT", "65536"),
        ("ENGRAM_MACHINE_ID", "urgent"),
        ("ENGRAM_MACHINE_ID", "data-1-urgent"),
        ("ENGRAM_MACHINE_ID", "data 1"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Better no process than one that runs with a lease of zero seconds."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings()


def test_directories_follow_the_environment() -> None:
    """dev keeps everything below the current directory, production below /data; never a guessed store there."""
    dev, prod = Settings(), Settings(env="prod")
    assert dev.data_dir == Path(".engram").absolute()
    assert dev.object_store_url == (dev.data_dir / "objects").as_uri()
    assert (prod.data_dir, prod.object_store_url) == (Path("/data"), "")
    assert dev.sandbox_dir not in dev.tenants_dir.parents
    assert not dev.sandbox_dir.is_relative_to(dev.tenants_dir)


def test_secrets_are_not_in_the_printed_settings() -> None:
    """`config show` and a traceback print settings."""
    made = Settings(control_plane_url="postgresql://u:hunter2@h/d", s3_secret_access_key="hunter2")
    assert "hunter2" not in repr(made) + str(made.model_dump()) + made.model_dump_json()
    for name, field in Settings.model_fields.items():
        sounds_secret = name.endswith(("_secret", "_secret_access_key", "_key", "_keys_older", "_token", "_password"))
        if sounds_secret and name != "tls_key":  # which is a path
            assert field.annotation is SecretStr, name


secrets = st.text(alphabet=st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=8).map(
    lambda s: f"<<{s}>>"
)


@given(secrets.filter(lambda s: "***" not in s))
def test_no_part_of_a_password_survives_redaction(password: str) -> None:
    """Passwords come unescaped out of secret stores, with @, # and / in them."""
    url = redact_url(f"postgresql://user:{password}@db.host:5432/engram?sslmode=require")
    assert url == "postgresql://user:***@db.host:5432/engram?sslmode=require"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://h:5432/d", "postgresql://h:5432/d"),
        ("postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
        ("postgresql://:pw@h/d", "postgresql://:***@h/d"),
        ("postgresql://h/d?user=u&password=pw&x=1", "postgresql://h/d?user=u&password=***&x=1"),
        ("host=h password=pw dbname=d", "host=h password=*** dbname=d"),
        ("host=h password='p w' dbname=d", "host=h password=*** dbname=d"),
        ("", ""),
    ],
)
def test_every_form_libpq_accepts_is_redacted(url: str, shown: str) -> None:
    """The control plane's URL reaches psycopg as it is, so each form may hold a password."""
    assert redact_url(url) == shown
