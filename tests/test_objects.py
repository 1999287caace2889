"""The object store against a local directory and a real S3 (SeaweedFS)."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import local_objects
from shared.errors import CorruptBackup, ObjectStoreRefused, ObjectStoreUnavailable, Permanent
from shared.objects import ObjectStore
from shared.settings import Settings
from tests.core_fixtures import settings_in

KEY = "tenants/acme/db/20260304T050607.000008Z_v1.sqlite"


pytest_plugins = ("tests.s3_fixtures",)


@pytest.fixture(params=["local", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "local":
        return settings_in(tmp_path / "with a space #1 %41", "")
    return settings_in(tmp_path, "", object_store_url=f"s3://engram/{tmp_path.name}", **request.getfixturevalue("s3"))


@pytest.fixture
def store(settings: Settings) -> ObjectStore:
    return ObjectStore(settings)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[bytes], tuple[Path, str]]:
    def made(data: bytes) -> tuple[Path, str]:
        path = tmp_path / hashlib.sha256(data).hexdigest()[:12]
        path.write_bytes(data)
        return path, hashlib.sha256(data).hexdigest()

    return made


Make = Callable[[bytes], tuple[Path, str]]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (2 << 20) + 17])
def test_what_was_put_is_downloaded_byte_for_byte(store: ObjectStore, make: Make, tmp_path: Path, size: int) -> None:
    """The one promise of a backup store."""
    path, digest = make(os.urandom(size))
    assert store.put_file(KEY, path, digest) == size
    seen: list[int] = []
    assert store.download(KEY, tmp_path / "back", digest, progress=seen.append) == size
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert store.sha256(KEY) == (digest, size)
    assert seen == sorted(seen) and (not size or seen[-1] == size)
    assert store.exists(KEY)


def test_an_object_above_one_request_goes_in_parts_and_comes_back_whole(
    store: ObjectStore, make: Make, tmp_path: Path
) -> None:
    """Large tenants take the multipart path; so must their tests."""
    path, digest = make(os.urandom(1 << 20) * 40 + b"tail")
    assert store.put_file(KEY, path, digest) == path.stat().st_size > 32 << 20
    store.download(KEY, tmp_path / "back", digest)
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == digest
    other, other_digest = make(b"y" * (33 << 20))
    with pytest.raises(ObjectStoreRefused):
        store.put_file(KEY, other, other_digest)
    assert store.sha256(KEY)[0] == digest


def test_putting_the_same_bytes_again_is_fine(store: ObjectStore, make: Make) -> None:
    """A retry after a lost reply meets its own object."""
    path, digest = make(b"content")
    assert store.put_file(KEY, path, digest) == store.put_file(KEY, path, digest) == 7


@pytest.mark.parametrize("other", [b"longer content", b"CONTENT"])
def test_a_key_with_other_bytes_is_refused_and_unchanged(store: ObjectStore, make: Make, other: bytes) -> None:
    """A backup is never overwritten, of whatever length the newcomer is."""
    path, digest = make(b"content")
    store.put_file(KEY, path, digest)
    with pytest.raises(ObjectStoreRefused):
        store.put_file(KEY, *make(other))
    assert store.sha256(KEY)[0] == digest


def test_a_missing_object_is_a_corrupt_backup_and_leaves_no_file(store: ObjectStore, tmp_path: Path) -> None:
    """The catalogue promised it; trying again will not bring it back."""
    for call in (lambda: store.download(KEY, tmp_path / "back", "0" * 64), lambda: store.sha256(KEY)):
        with pytest.raises(CorruptBackup):
            call()
    assert not (tmp_path / "back").exists()
    assert not store.exists(KEY)


def test_an_object_with_another_sha256_is_refused_and_removed(store: ObjectStore, make: Make, tmp_path: Path) -> None:
    """Bit rot must not reach a restore, nor stay where one could pick it up."""
    path, digest = make(b"content")
    store.put_file(KEY, path, digest)
    (tmp_path / "back").write_bytes(b"older file")
    with pytest.raises(CorruptBackup, match="sha256"):
        store.download(KEY, tmp_path / "back", "0" * 64)
    assert not (tmp_path / "back").exists()


def test_keys_are_listed_by_prefix_and_deleted_for_good(store: ObjectStore, make: Make) -> None:
    """Retention walks the list and deletes; deleting twice is fine."""
    path, digest = make(b"x")
    for key in ("tenants/b/1", "tenants/a/2", "tenants/a/1", "tenants/ab/1"):
        store.put_file(key, path, digest)
    assert store.keys("tenants/a") == ["tenants/a/1", "tenants/a/2"]
    for _ in range(2):
        store.delete("tenants/a/1")
    assert store.keys("tenants/") == ["tenants/a/2", "tenants/ab/1", "tenants/b/1"]
    assert store.keys("nothing") == []


@pytest.mark.parametrize("key", ["a b", "a+b", "a%20b", "ä/ö", "a#b", "a?b=c", "a&b", "a:b@c", "x" * 200, "~a"])
def test_an_odd_key_names_one_object_and_only_that(store: ObjectStore, make: Make, tmp_path: Path, key: str) -> None:
    """A key that is encoded twice, or not at all, would be found under another name."""
    path, digest = make(key.encode())
    other, other_digest = make(b"neighbour")
    store.put_file("neighbour", other, other_digest)
    store.put_file(f"odd/{key}", path, digest)
    store.download(f"odd/{key}", tmp_path / "back", digest)
    assert (tmp_path / "back").read_bytes() == key.encode()
    assert store.keys("odd") == [f"odd/{key}"]


@pytest.mark.parametrize("key", ["../escape", "a/../../escape", "/../escape"])
def test_a_key_cannot_leave_the_store(store: ObjectStore, make: Make, tmp_path: Path, key: str) -> None:
    """Keys come from the catalogue, a database others can write."""
    with pytest.raises((ObjectStoreRefused, CorruptBackup)):
        store.put_file(key, *make(b"x"))
    assert not list(tmp_path.rglob("escape"))


@pytest.mark.parametrize("wrong", [{"s3_access_key_id": "nobody"}, {"s3_secret_access_key": "wrong"}])
def test_wrong_credentials_are_refused_not_retried(
    s3: dict[str, object], make: Make, tmp_path: Path, wrong: dict[str, str]
) -> None:
    """Permanent: an operator must hear of it, not a retry loop."""
    store = ObjectStore(settings_in(tmp_path, "", object_store_url="s3://engram/x", **(s3 | wrong)))
    for call in (
        lambda: store.put_file(KEY, *make(b"x")),
        lambda: store.download(KEY, tmp_path / "back", "0" * 64),
        lambda: store.delete(KEY),
    ):
        with pytest.raises(ObjectStoreRefused):
            call()


def test_a_missing_bucket_is_a_refusal_not_a_corrupt_backup(s3: dict[str, object], tmp_path: Path) -> None:
    """A typo in the bucket's name must not let a drill condemn good backups."""
    store = ObjectStore(settings_in(tmp_path, "", object_store_url="s3://no-such-bucket/x", **s3))
    with pytest.raises(ObjectStoreRefused):
        store.download(KEY, tmp_path / "back", "0" * 64)


@pytest.mark.parametrize("answers", [True, False], ids=["silent", "nobody listens"])
def test_a_store_that_is_down_is_unavailable_within_its_time_outs(make: Make, tmp_path: Path, answers: bool) -> None:
    """Without bounds obstore retries for minutes, and a restore hangs."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    if not answers:
        server.close()
    store = ObjectStore(
        settings_in(
            tmp_path,
            "",
            object_store_url="s3://engram/x",
            s3_endpoint=f"http://127.0.0.1:{port}",
            s3_access_key_id="k",
            s3_secret_access_key="s",
            object_store_timeout_seconds=0.3,
            object_store_connect_timeout_seconds=0.3,
            object_store_retry_timeout_seconds=1,
        )
    )
    started = time.monotonic()
    for call in (lambda: store.put_file(KEY, *make(b"x")), lambda: store.sha256(KEY)):
        with pytest.raises(ObjectStoreUnavailable):
            call()
    server.close()
    assert time.monotonic() - started < 60  # minutes without the settings; not a measure of speed


@pytest.mark.parametrize("url", ["", "ftp://x/y", "/plain/path", "s3:///prefix-only"])
def test_a_url_that_names_no_store_is_refused_at_once(tmp_path: Path, url: str) -> None:
    """Before any tenant's data is read."""
    with pytest.raises(Permanent):
        ObjectStore(
            Settings(
                env="prod", data_dir=tmp_path, object_store_url=url, s3_access_key_id="k", s3_secret_access_key="s"
            )
        )


def test_a_local_store_whose_directory_is_gone_is_unavailable_not_corrupt(make: Make, tmp_path: Path) -> None:
    """A drill must not condemn every backup because a disk is not mounted."""
    root = tmp_path / "store"
    root.mkdir()
    store = ObjectStore(settings_in(tmp_path, "", object_store_url=root.as_uri()))
    path, digest = make(b"content")
    store.put_file(KEY, path, digest)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(ObjectStoreUnavailable):
        store.sha256(KEY)


def test_a_half_written_object_of_a_dead_process_is_never_listed_and_cleared_in_time(
    make: Make, tmp_path: Path
) -> None:
    """A local store's put is a name given at the end; what a SIGKILL left under another name must not pile up."""
    store = ObjectStore(settings_in(tmp_path, ""))
    path, digest = make(b"content")
    store.put_file(KEY, path, digest)
    left = tmp_path / "objects" / f"{KEY}#123"
    left.write_bytes(b"half")
    other = KEY.replace("05", "06")
    store.put_file(other, path, digest)
    assert left.exists() and store.keys("tenants") == [KEY, other]
    os.utime(left, (1, 1))
    store.put_file(KEY.replace("05", "07"), path, digest)
    assert not left.exists()


@pytest.mark.parametrize("linked", [True, False])
def test_a_local_object_gets_its_name_when_its_bytes_and_the_way_to_it_are_on_the_disk(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """A power loss must leave neither half an object under its name, nor a row whose object's directory is gone; and a
    directory that was synced before an object got its name in it need not be synced for the next one."""
    store, (path, digest) = ObjectStore(settings_in(tmp_path, "")), make(b"content")
    root, synced, fsync, link = tmp_path / "objects", list[str](), os.fsync, os.link

    def noted(fd: int) -> None:
        fsync(fd)
        where = Path(os.readlink(f"/proc/self/fd/{fd}"))
        synced.append("file" if where.is_file() else str(where.relative_to(root)))

    def named(source: Path, target: Path) -> None:
        if not linked and source == path:
            raise OSError(errno.EXDEV, "another filesystem")
        link(source, target)
        synced.append("named")

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "link", named)
    store.put_file(KEY, path, digest)
    way = [str(parent) for parent in Path(KEY).parents]  # its directory first
    before = synced[: synced.index("named")]
    assert set(before) == {"file", *way[1:]} and synced[len(before) :] == ["named", way[0]]
    synced.clear()
    store.put_file(KEY.replace("05", "06"), path, digest)
    assert list(dict.fromkeys(synced)) == ["file", "named", way[0]]


def test_a_directory_that_a_dead_process_made_is_synced_before_an_object_is_in_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is there says nothing of the disk: only an object in it does, and half of one is none."""
    store, (path, digest) = ObjectStore(settings_in(tmp_path, "")), make(b"content")
    directory = (tmp_path / "objects" / KEY).parent
    directory.mkdir(parents=True)
    (directory / "left.sqlite#1").write_bytes(b"half")
    synced: list[Path] = []
    monkeypatch.setattr(local_objects, "fsync_path", synced.append)
    store.put_file(KEY, path, digest)
    assert set(directory.parents[: len(Path(KEY).parents) - 1]) <= set(synced)
