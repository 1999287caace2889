"""Tenant ids, paths and object keys."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UnsafeTenantId
from shared.tenant import TENANT_ID_PATTERN, TenantPaths, check_tenant_id, object_key, parse_object_key

tenant_ids = st.from_regex(TENANT_ID_PATTERN.removesuffix("$") + r"\Z", fullmatch=True)
NAMES = ("root", "database", "backup", "current", "generations", "restore_file", "lock", "restore_lock", "mark")


@given(st.one_of(st.text(max_size=70), tenant_ids, tenant_ids.map(lambda t: t + "\n")))
def test_an_id_is_accepted_exactly_when_the_published_pattern_matches_all_of_it(text: str) -> None:
    """`$` alone lets a trailing newline through; the whole string counts."""
    good = re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", text) is not None
    if good:
        assert check_tenant_id(text) == text
    else:
        with pytest.raises(UnsafeTenantId):
            check_tenant_id(text)


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "../x", "a/b", "a\x00", "A", "-a", "_a", "a" * 64, "a\n", "ä", "a b", "%2e", None, 7, b"a"]
)
def test_hostile_ids_are_refused_without_touching_a_path(bad: object) -> None:
    """A tenant id comes from a token; whatever is in it must not become a path."""
    with pytest.raises(UnsafeTenantId):
        TenantPaths.of(Path("/srv"), bad)  # type: ignore[arg-type]


@given(tenant_ids, st.integers(0, 10**9))
def test_every_path_of_a_tenant_lies_in_its_own_directory(tenant_id: str, number: int) -> None:
    """Nothing is ever opened outside the tenant's directory."""
    root = Path("/srv/tenants")
    paths = TenantPaths.of(root, tenant_id)
    for path in [*(getattr(paths, name) for name in NAMES), paths.generation_dir(number)]:
        inside = os.path.normpath(path)
        assert inside == f"/srv/tenants/{tenant_id}" or inside.startswith(f"/srv/tenants/{tenant_id}/")


@given(tenant_ids, tenant_ids)
def test_two_tenants_share_no_path(one: str, other: str) -> None:
    """Separate tenants must never meet in a file."""
    a, b = TenantPaths.of(Path("/t"), one), TenantPaths.of(Path("/t"), other)
    shared = {getattr(a, n) for n in NAMES} & {getattr(b, n) for n in NAMES}
    assert bool(shared) == (one == other)


@given(
    tenant_ids,
    st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(9990, 1, 1)),
    st.integers(-720, 840),
    st.integers(1, 10**6),
)
def test_an_object_key_gives_back_tenant_instant_and_version(
    tenant_id: str, at: datetime, offset_minutes: int, version: int
) -> None:
    """The catalogue can be rebuilt from the names in the bucket, whatever zone the writer was in."""
    at = at.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))
    parts = parse_object_key(object_key(tenant_id, at, version))
    assert parts is not None
    assert (parts.tenant_id, parts.ts, parts.schema_version) == (tenant_id, at.astimezone(UTC), version)


def test_object_keys_have_the_published_shape() -> None:
    """Outside readers parse it: `tenants/{id}/db/YYYYMMDDTHHMMSS.ffffffZ_v{n}.sqlite`."""
    at = datetime(2026, 3, 4, 5, 6, 7, 8, tzinfo=UTC)
    assert object_key("acme", at, 1) == "tenants/acme/db/20260304T050607.000008Z_v1.sqlite"


@given(tenant_ids, st.lists(st.datetimes(min_value=datetime(1980, 1, 1), timezones=st.just(UTC)), min_size=2))
def test_keys_of_one_tenant_sort_by_time(tenant_id: str, instants: list[datetime]) -> None:
    """A listing of the bucket is a history."""
    keys = [object_key(tenant_id, at, 1) for at in instants]
    assert sorted(keys) == [object_key(tenant_id, at, 1) for at in sorted(instants)]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "tenants/acme/db/20260304T050607.000008Z_v1.sqlite\n",
        "tenants/acme/db/20260304T050607.000008Z_v1.sqlite.gz",
        "tenants/acme/db/20260304T050607.000008Z_v1.sqlite.age.zst",
        "tenants/../db/20260304T050607.000008Z_v1.sqlite",
        "x/tenants/acme/db/20260304T050607.000008Z_v1.sqlite",
        "tenants/acme/db/20260304T050607.000008_v1.sqlite",
        "tenants/Acme/db/20260304T050607.000008Z_v1.sqlite",
    ],
)
def test_a_key_that_is_not_ours_is_none(key: str) -> None:
    """A foreign object in the bucket is not a backup."""
    assert parse_object_key(key) is None


def test_digits_that_are_no_date_are_not_a_key() -> None:
    """A name that only looks like ours must not raise in a sweep over the bucket."""
    assert parse_object_key("tenants/acme/db/20261399T050607.000008Z_v1.sqlite") is None


def test_the_generation_of_a_tenant_without_database_is_file_not_found(tmp_path: Path) -> None:
    """Callers tell "no database here" from every other failure by this."""
    with pytest.raises(FileNotFoundError):
        TenantPaths.of(tmp_path, "acme").generation()
