"""What each credential of the object store can do, on a real S3 whose identities have the fewest rights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shared import uploads
from shared.errors import ObjectStoreRefused, Permanent
from shared.objects import ObjectStore
from shared.settings import Settings
from tests.core_fixtures import settings_in
from tests.s3_fixtures import ROLE_ACTIONS

pytest_plugins = ("tests.s3_fixtures",)
KEY = "tenants/acme/db/20260304T050607.000008Z_v1.sqlite"


def with_roles(
    tmp_path: Path, s3: dict[str, object], *, write: str = "write", read: str = "read", delete: str = "delete"
) -> Settings:
    """Settings whose credentials are of these identities, "" for none."""
    keys: dict[str, object] = {}
    for prefix, role in (("", write), ("read_", read), ("delete_", delete)):
        keys |= {f"s3_{prefix}access_key_id": role and f"{role}-key"}
        keys |= {f"s3_{prefix}secret_access_key": role and f"{role}-secret"}
    return settings_in(tmp_path, "", object_store_url=f"s3://engram/{tmp_path.name}", **{**s3, **keys})


@pytest.fixture
def backup(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "engram.db"
    path.write_bytes(os.urandom(100_000))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("single_put_bytes", [16_777_216, 0], ids=["one request", "in parts"])
def test_three_credentials_do_together_what_one_does(
    tmp_path: Path, s3: dict[str, object], backup: tuple[Path, str], single_put_bytes: int
) -> None:
    """The fewest rights must be enough, or people take more."""
    settings = with_roles(tmp_path, s3).model_copy(update={"object_store_single_put_bytes": single_put_bytes})
    store = ObjectStore(settings)
    path, digest = backup
    assert store.put_file(KEY, path, digest) == store.put_file(KEY, path, digest) == 100_000
    assert store.download(KEY, tmp_path / "back", digest) == 100_000
    assert store.keys("tenants/") == [KEY]
    assert uploads.clear(settings) == []
    store.delete(KEY)
    assert not store.exists(KEY)


def test_who_writes_backups_cannot_delete_one(tmp_path: Path, s3: dict[str, object], backup: tuple[Path, str]) -> None:
    """Whoever takes over a machine that makes backups must not be able to take them along."""
    path, digest = backup
    store = ObjectStore(with_roles(tmp_path, s3, delete=""))  # falls back to the writer's
    store.put_file(KEY, path, digest)
    with pytest.raises(ObjectStoreRefused, match="refuses to delete"):
        store.delete(KEY)
    path.write_bytes(b"something else")
    with pytest.raises(Permanent):
        store.put_file(KEY, path, hashlib.sha256(b"something else").hexdigest())
    assert store.sha256(KEY) == (digest, 100_000)


def test_who_reads_backups_can_neither_write_nor_delete_one(
    tmp_path: Path, s3: dict[str, object], backup: tuple[Path, str]
) -> None:
    """A machine that only tests restores needs no more."""
    path, digest = backup
    ObjectStore(with_roles(tmp_path, s3)).put_file(KEY, path, digest)
    reader = ObjectStore(with_roles(tmp_path, s3, write="read", delete="read"))
    with pytest.raises(ObjectStoreRefused):
        reader.put_file(f"{KEY}.zst", path, digest)
    with pytest.raises(ObjectStoreRefused):
        reader.delete(KEY)
    assert reader.keys("tenants/") == [KEY]
    assert reader.download(KEY, tmp_path / "back", digest) == 100_000


def test_who_deletes_backups_can_neither_write_nor_read_one(
    tmp_path: Path, s3: dict[str, object], backup: tuple[Path, str]
) -> None:
    """The retention looks at names and ages, never into a backup."""
    path, digest = backup
    ObjectStore(with_roles(tmp_path, s3)).put_file(KEY, path, digest)
    deleter = ObjectStore(with_roles(tmp_path, s3, write="delete", read="delete"))
    with pytest.raises(ObjectStoreRefused):
        deleter.put_file(f"{KEY}.zst", path, digest)
    with pytest.raises(ObjectStoreRefused):
        deleter.download(KEY, tmp_path / "back", digest)
    deleter.delete(KEY)
    assert deleter.keys("tenants/") == []


def test_half_a_credential_is_refused() -> None:
    """Falling back to the other key in silence would undo the separation."""
    for given in ("s3_delete_access_key_id", "s3_read_secret_access_key"):
        with pytest.raises(ValueError, match="belong together"):
            Settings(**{given: "x"})  # type: ignore[arg-type]


def test_the_readme_lists_the_rights_that_were_tried() -> None:
    """Rights are copied from there into a console."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    for role, actions in ROLE_ACTIONS.items():
        named = ", ".join(f"`{action}`" for action in actions)
        assert named in readme, role
