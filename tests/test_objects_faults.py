"""The object store's truth when the store fails: through a proxy that spoils requests on their way to a real S3."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import backup, catalogue
from shared.bucket import Bucket
from shared.errors import (
    CorruptBackup,
    KeyTaken,
    ObjectLocked,
    ObjectStoreRefused,
    ObjectStoreUnavailable,
)
from shared.objects import ObjectStore
from tests.core_fixtures import World, contents_of, encrypted, settings_in, sha256_of
from tests.fault_proxy import Fault, FaultProxy, fault_proxy

pytest_plugins = ("tests.core_fixtures", "tests.s3_fixtures")

KEY = "tenants/acme/db/20260304T050607.000008Z_v1.sqlite"
SMALL, PARTS = 100_000, (10 << 20) + 17  # one request; three parts


@pytest.fixture(scope="module")
def proxy(s3: dict[str, object]) -> Iterator[FaultProxy]:
    with fault_proxy(str(s3["s3_endpoint"])) as made:
        yield made


@pytest.fixture
def through(proxy: FaultProxy, s3: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """Settings of a store behind the proxy."""
    proxy.fail(Fault(), times=0)
    return {
        **s3,
        "s3_endpoint": proxy.url,
        "object_store_url": f"s3://engram/{tmp_path.name}",
        "object_store_timeout_seconds": 2.0,
        "object_store_retries": 1,
        "object_store_retry_timeout_seconds": 3.5,
        "object_store_single_put_bytes": 6 << 20,
        "object_store_part_bytes": 5 << 20,
    }


@pytest.fixture
def store(through: dict[str, object], tmp_path: Path) -> ObjectStore:
    return ObjectStore(settings_in(tmp_path, "", **through))


def make(directory: Path, size: int) -> tuple[Path, str]:
    data = os.urandom(size)
    (directory / "object").write_bytes(data)
    return directory / "object", hashlib.sha256(data).hexdigest()


PASSING = {
    "an error": Fault(status=500),
    "throttled": Fault(status=503, code="SlowDown", headers={"Retry-After": "1"}),
    "too many": Fault(status=429, code="TooManyRequests", headers={"Retry-After": "1"}),
    "a lost request": Fault(lose="request"),
    "a lost reply": Fault(lose="reply"),
    "silence": Fault(lose="silence"),
    "a flipped byte": Fault(flip="request"),
    "somebody else's upload under way": Fault(status=409, code="ConditionalRequestConflict"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_put_that_meets_one_fault_stores_the_object_whole(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    """What passes by itself must not cost a backup, nor leave one that is not what was sent."""
    path, digest = make(tmp_path, SMALL)
    proxy.fail(PASSING[fault], method="PUT", times=1)
    assert store.put_file(KEY, path, digest) == SMALL
    assert store.sha256(KEY) == (digest, SMALL)
    assert store.keys("tenants") == [KEY]


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("fault", ["an error", "a lost reply", "a flipped byte"])
def test_an_upload_in_parts_that_meets_one_fault_stores_the_object_whole(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, method: str, fault: str
) -> None:
    """Parts are the path of the large tenants: begin, part and completion may each fail."""
    path, digest = make(tmp_path, PARTS)
    proxy.fail(PASSING[fault], method=method, times=1)
    assert store.put_file(KEY, path, digest) == PARTS
    assert store.sha256(KEY) == (digest, PARTS)


@pytest.mark.parametrize("fault", [Fault(cut=True), Fault(flip="reply"), Fault(lose="reply"), Fault(status=503)])
def test_a_read_back_that_fails_once_does_not_condemn_the_object(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    """It is the way back that failed."""
    path, digest = make(tmp_path, SMALL)
    proxy.fail(fault, method="GET", times=1)
    assert store.put_file(KEY, path, digest) == SMALL
    assert proxy.count("PUT") == 1


LASTING = {
    "an error": (Fault(status=500), ObjectStoreUnavailable, "500"),
    "throttled": (Fault(status=503, code="SlowDown", headers={"Retry-After": "3600"}), ObjectStoreUnavailable, "Slow"),
    "full": (Fault(status=507, code="InsufficientStorage"), ObjectStoreUnavailable, "507 Insufficient Storage"),
    "a lost request": (Fault(lose="request"), ObjectStoreUnavailable, "disconnected"),
    "over its quota": (Fault(status=403, code="QuotaExceeded"), ObjectStoreRefused, "QuotaExceeded"),
    "no bucket": (Fault(status=404, code="NoSuchBucket"), ObjectStoreRefused, "NoSuchBucket"),
    "a bad digest": (Fault(flip="request"), ObjectStoreUnavailable, "BadDigest"),
}


@pytest.mark.parametrize(
    ("fault", "size"), [*((fault, SMALL) for fault in LASTING), ("an error", PARTS), ("a lost request", PARTS)]
)
def test_a_store_that_goes_on_failing_is_given_up_with_its_cause_and_holds_nothing(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: str, size: int
) -> None:
    """Bounded tries, the store's own words, and nothing that looks like a backup."""
    spoiled, error, says = LASTING[fault]
    path, digest = make(tmp_path, size)
    proxy.fail(spoiled, method="PUT")
    with pytest.raises(error, match=says) as failed:
        store.put_file(KEY, path, digest)
    assert "\n" not in str(failed.value) and "admin-" not in str(failed.value)
    assert proxy.count("PUT") <= (1 + 1) ** 2 * 3  # of the object and of each of its three parts
    proxy.fail(Fault(), times=0)
    assert store.keys("tenants") == []
    assert list(Bucket(store.settings).uploads()) == []


def test_without_the_stores_checksum_the_read_back_finds_the_damage_and_clears_it(
    through: dict[str, object], proxy: FaultProxy, tmp_path: Path
) -> None:
    """A store that takes any body must not be believed; what it kept must not take the key."""
    store = ObjectStore(settings_in(tmp_path, "", **through, s3_checksum="none"))
    path, digest = make(tmp_path, SMALL)
    proxy.fail(Fault(flip="request"), method="PUT")
    with pytest.raises(CorruptBackup):
        store.put_file(KEY, path, digest)
    assert store.keys("tenants") == []
    proxy.fail(Fault(flip="request"), method="PUT", times=1)
    assert store.put_file(KEY, path, digest) == SMALL
    assert store.sha256(KEY)[0] == digest


def test_the_stores_checksum_can_replace_the_read_back(
    through: dict[str, object], proxy: FaultProxy, tmp_path: Path
) -> None:
    """Half the traffic, for a store that was seen to refuse a flipped byte; alone neither may be switched off."""
    store = ObjectStore(settings_in(tmp_path, "", **through, object_store_read_back=False))
    path, digest = make(tmp_path, SMALL)
    proxy.fail(Fault(flip="request"), method="PUT", times=1)
    assert store.put_file(KEY, path, digest) == SMALL
    assert proxy.count("GET") == 0
    assert store.sha256(KEY)[0] == digest
    with pytest.raises(ValueError, match="read back"):
        settings_in(tmp_path, "", **through, object_store_read_back=False, s3_checksum="none")


@pytest.mark.parametrize("fault", [None, "a lost reply", "an error"])
@pytest.mark.parametrize("size", [SMALL, PARTS])
def test_who_comes_second_never_overwrites(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, s3: dict[str, object], size: int, fault: str | None
) -> None:
    """Between the look for the key and the last request somebody else stores an object there."""
    direct = ObjectStore(store.settings.model_copy(update={"s3_endpoint": s3["s3_endpoint"]}))
    theirs, their_digest = make(tmp_path, SMALL)
    theirs = theirs.rename(tmp_path / "theirs")
    path, digest = make(tmp_path, size)
    last = ("PUT", "") if size == SMALL else ("POST", "uploadId=")
    faults = iter([PASSING[fault]] if fault else [])

    def choose(method: str, asked: str) -> Fault | None:
        if method != last[0] or last[1] not in asked:
            return None
        direct.put_file(KEY, theirs, their_digest)
        return next(faults, None)

    proxy._choose = choose
    with pytest.raises(KeyTaken):
        store.put_file(KEY, path, digest)
    assert store.sha256(KEY) == (their_digest, SMALL)
    assert list(Bucket(store.settings).uploads()) == []


@pytest.mark.parametrize("size", [SMALL, PARTS])
def test_a_throttled_upload_waits_as_long_as_it_is_asked_to(
    through: dict[str, object], proxy: FaultProxy, tmp_path: Path, size: int
) -> None:
    """Asking again before is what the store throttles; the time it names may be beyond what anybody waits."""
    store = ObjectStore(settings_in(tmp_path, "", **through | {"object_store_retry_timeout_seconds": 30}))
    path, digest = make(tmp_path, size)
    proxy.fail(Fault(status=503, code="SlowDown", headers={"Retry-After": "3"}), method="PUT", times=1)
    started = time.monotonic()
    assert store.put_file(KEY, path, digest) == size
    assert time.monotonic() - started >= 3
    other = KEY.replace("05", "06")
    proxy.fail(Fault(status=429, code="TooManyRequests", headers={"Retry-After": "3600"}), method="PUT")
    with pytest.raises(ObjectStoreUnavailable, match="TooManyRequests"):
        store.put_file(other, path, digest)
    assert proxy.count("PUT") <= 3  # each part once


def test_a_lost_reply_never_hides_somebody_elses_object(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    """ "It exists" after a time-out may be ours; only its bytes tell."""
    theirs, their_digest = make(tmp_path, SMALL)
    store.put_file(KEY, theirs, their_digest)
    path, digest = make(tmp_path, SMALL)
    proxy.fail(Fault(lose="request"), method="PUT", times=1)
    with pytest.raises(KeyTaken):
        store.put_file(KEY, path, digest)
    assert store.sha256(KEY)[0] == their_digest


@pytest.mark.parametrize("fault", [Fault(cut=True), Fault(status=500), Fault(lose="silence")])
def test_a_download_that_meets_one_fault_arrives_whole(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    """A restore at night must not depend on one connection."""
    path, digest = make(tmp_path, PARTS)
    store.put_file(KEY, path, digest)
    proxy.fail(fault, method="GET", times=1)
    assert store.download(KEY, tmp_path / "back", digest) == PARTS
    assert sha256_of(tmp_path / "back") == digest


@pytest.mark.parametrize("slow", ["the store", "the reader", "the line"])
def test_an_object_that_takes_longer_than_one_request_may_is_read_to_its_end(
    store: ObjectStore, proxy: FaultProxy, tmp_path: Path, slow: str
) -> None:
    """A time-out bounds silence, not size: else nothing large is ever read back or restored over a slow line."""
    path, digest = make(tmp_path, PARTS)
    store.put_file(KEY, path, digest)
    faults = {"the store": Fault(rate=PARTS // 6), "the line": Fault(cut=True), "the reader": Fault()}
    proxy.fail(faults[slow], method="GET", times=4)  # 6 s at that rate, three times what a request may take
    seen = hashlib.sha256()
    for n, chunk in enumerate(store.chunks(KEY)):
        seen.update(chunk)
        time.sleep(2.5 if slow == "the reader" and n == 1 else 0)
    assert seen.hexdigest() == digest


def test_a_read_that_brings_nothing_more_is_given_up(store: ObjectStore, proxy: FaultProxy, tmp_path: Path) -> None:
    """It is read on only while each request brings something."""
    path, digest = make(tmp_path, PARTS)
    store.put_file(KEY, path, digest)
    faults = iter([Fault(cut=True)])
    proxy.fail(Fault(), times=0)
    proxy._choose = lambda method, _: next(faults, Fault(status=500)) if method == "GET" else None
    seen = 0
    with pytest.raises(ObjectStoreUnavailable, match="500"):
        for chunk in store.chunks(KEY):
            seen += len(chunk)
    assert 0 < seen < PARTS
    assert proxy.count("GET") <= 1 + (1 + 1) * 2  # of obstore, and once more from where it stopped


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=500), ObjectStoreUnavailable),
        (
            Fault(status=403, code="AccessDenied", message="no DeleteObject on my-retention-bucket/*"),
            ObjectStoreRefused,
        ),
        (Fault(status=403, code="AccessDenied", message="protected by object lock"), ObjectLocked),
    ],
)
def test_only_the_stores_own_words_make_an_object_locked(
    through: dict[str, object], proxy: FaultProxy, tmp_path: Path, fault: Fault, error: type[Exception]
) -> None:
    """A bucket may be named after its retention: an outage or missing rights would pass for a lock, and unnoticed."""
    there = through | {"object_store_url": f"s3://my-retention-bucket/{tmp_path.name}"}
    store = ObjectStore(settings_in(tmp_path, "", **there))
    path, digest = make(tmp_path, SMALL)
    store.put_file(KEY, path, digest)
    proxy.fail(fault, method="POST", containing="delete")
    with pytest.raises(error):
        store.delete(KEY)


# The whole of a backup: nothing half-registered


@pytest.fixture
def s3_world(world: World, through: dict[str, object]) -> World:
    return world.change(**through)


@pytest.mark.parametrize("packing", ["none", "age"])
def test_a_backup_the_store_refused_has_no_row_and_the_next_one_is_good(
    s3_world: World, proxy: FaultProxy, packing: str
) -> None:
    """The catalogue's newest stays the last good one."""
    if packing == "age":
        s3_world.change(**encrypted())
    s3_world.write("one")
    good = s3_world.back_up()
    proxy.fail(Fault(status=507, code="InsufficientStorage"), method="PUT")
    with pytest.raises(ObjectStoreUnavailable, match="507"):
        s3_world.back_up()
    assert catalogue.list_of(s3_world.control_plane, s3_world.tenant_id) == [good]
    proxy.fail(Fault(lose="reply"), method="PUT", times=1)
    again = s3_world.back_up()
    assert s3_world.objects.keys("tenants") == [good.key, again.key]
    assert catalogue.newest(s3_world.control_plane, s3_world.tenant_id) == again


def test_an_encrypted_object_whose_reply_was_lost_is_ours_though_its_bytes_differ(
    s3_world: World, proxy: FaultProxy
) -> None:
    """Encrypting twice gives two objects of one snapshot: the second try must recognise the first."""
    s3_world.change(**encrypted())
    s3_world.write("one")
    taken = backup.take(s3_world.settings, s3_world.tenant_id, s3_world.settings.data_dir)
    proxy.fail(Fault(lose="reply"), method="PUT")  # every reply, so that the first call fails with its object there
    proxy_reads = Fault(status=500)
    choose = proxy._choose
    proxy._choose = lambda method, path: proxy_reads if method == "GET" else choose(method, path)
    with pytest.raises(ObjectStoreUnavailable):
        backup.store(s3_world.objects, taken, s3_world.control_plane)
    proxy.fail(Fault(), times=0)
    stored = backup.store(s3_world.objects, taken, s3_world.control_plane)
    made = backup.register(s3_world.control_plane, stored)
    assert s3_world.objects.sha256(made.key) == (made.stored_sha256, made.stored_bytes)
    backup.fetch(s3_world.objects, made, s3_world.settings.data_dir / "back", s3_world.control_plane)
    assert contents_of(s3_world.settings.data_dir / "back") == ["one"]
