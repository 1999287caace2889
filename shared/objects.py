"""The object store: Cloudflare R2, any S3, or a local directory, through obstore.

Three operations, each with one meaning: `put_file` returns only when the object is there whole; `download` returns
only when the bytes on disk have the expected sha256; `sha256` reads and hashes. Objects are created, never
overwritten: an earlier try of ours that arrived is recognised by its content.

"Whole" is proven twice in S3. Every request carries x-amz-checksum-sha256, which the store compares with what it
received (SeaweedFS refuses a flipped byte with BadDigest, a part's as well; without the header it keeps it), and the
object is read back and hashed; `object_store_read_back` can switch the second off. A local store is
`shared.local_objects`.

What is stored goes by `shared.s3_put`, always on the condition that the key is free; what is read, listed and deleted
by obstore (`shared.s3`). Both retry what may pass, bounded by `object_store_retries` and
`object_store_retry_timeout_seconds`, and translate the store's errors.

Writing, reading and deleting may have credentials of their own (`ENGRAM_S3_READ_…`, `ENGRAM_S3_DELETE_…`): a machine
without the last cannot delete a backup, whoever takes it over.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store

from shared import local_objects, pack, s3_put
from shared.bucket import Bucket
from shared.durable import fsync_path
from shared.errors import CorruptBackup, KeyTaken, ObjectLocked, ObjectStoreRefused, ObjectStoreUnavailable, Permanent
from shared.log import get_logger
from shared.s3 import Exists, client, locked, persistently, translated
from shared.settings import Settings
from shared.streams import Progress

if TYPE_CHECKING:
    from obstore import GetOptions  # a type only, not importable at run time

_READ_BYTES = 1 << 20
log = get_logger("objects")


class Listed(NamedTuple):
    """An object as a listing shows it."""

    key: str
    size_bytes: int
    modified_at: datetime


class ObjectStore:
    """One bucket and prefix, or one local directory."""

    def __init__(self, settings: Settings) -> None:
        settings.require("object_store_url")
        self.settings = settings
        self._local_root: Path | None = None
        self._bucket: Bucket | None = None
        self._reader: LocalStore | S3Store
        self._deleter: LocalStore | S3Store
        url = urlsplit(settings.object_store_url)
        if url.scheme == "file":
            self._local_root = Path(unquote(url.path))
            if self._local_root.is_relative_to(settings.data_dir):
                self._local_root.mkdir(parents=True, exist_ok=True, mode=0o700)
            elif not self._local_root.is_dir():  # a mount that is missing must not look like an empty store
                raise ObjectStoreRefused(f"the object store {self._local_root} does not exist")
            self._reader = self._deleter = LocalStore(self._local_root)
        elif url.scheme == "s3":
            bucket = functools.cache(partial(client, settings, url.netloc, url.path.strip("/")))
            self._reader, self._deleter = (bucket(*settings.s3_credentials(role)) for role in ("read", "delete"))
            self._bucket = Bucket(settings, "write")
        else:
            raise Permanent("ENGRAM_OBJECT_STORE_URL must start with file:// or s3://")

    def put_file(self, key: str, path: Path, sha256: str) -> int:
        """Store `path` under a new key; return the stored size in bytes once it is there whole.

        Raises `KeyTaken` when the key holds other bytes, `ObjectStoreUnavailable` after the retries,
        `ObjectStoreRefused`, `CorruptBackup` when what was stored is again and again not what was sent, `NoSpace`.
        """
        if self._local_root is not None:
            return local_objects.put(self._local_root, key, path, sha256)
        try:
            return persistently(
                self.settings, lambda: self._put_and_check(key, path, sha256), (ObjectStoreUnavailable, _Damaged)
            )
        except _Damaged as e:
            raise CorruptBackup(f"{key}: the stored object has another sha256 than the file sent") from e

    def _put_and_check(self, key: str, path: Path, sha256: str) -> int:
        existed = False
        try:
            # A taken key need not cost an upload in parts, nor a store that knows no conditions an object.
            if path.stat().st_size > self.settings.object_store_single_put_bytes and self.exists(key):
                raise Exists
            assert self._bucket is not None
            s3_put.put(self._bucket, self.settings, key, path)
        except Exists:
            existed = True  # ours from a lost reply, or somebody else's: the read below decides
        if not existed and not self.settings.object_store_read_back:
            return path.stat().st_size  # the store compared the checksum sent with it
        try:
            stored, size = self.sha256(key)
            if stored != sha256:
                stored, size = self.sha256(key)  # was it turned on the way back?
        except CorruptBackup as e:  # "it exists" was said, and it does not: an upload of somebody else that failed
            raise ObjectStoreUnavailable(f"{key}: not there after its upload") from e
        if stored == sha256:
            return size
        if existed:
            raise KeyTaken(f"{key} already exists with other content")
        try:
            self.delete(key)  # made by this call, damaged on the way, and nothing points at it
        except (ObjectStoreRefused, ObjectLocked) as e:  # who may not delete leaves it to the retention
            raise CorruptBackup(f"{key}: the stored object has another sha256 than the file sent, and stays") from e
        raise _Damaged

    def download(self, key: str, destination: Path, sha256: str, *, progress: Progress | None = None) -> int:
        """Write the object to `destination` (replaced), fsynced; return its size in bytes.

        Raises `CorruptBackup` when it is missing or its sha256 differs; the file is removed then.
        """
        return pack.receive(self.chunks(key), destination, sha256, name=key, progress=progress).size_bytes

    def sha256(self, key: str) -> tuple[str, int]:
        """Hex sha256 and size in bytes of a stored object. Raises `CorruptBackup` when it is missing."""
        digest, size = hashlib.sha256(), 0
        for chunk in self.chunks(key):
            digest.update(chunk)
            size += len(chunk)
        return digest.hexdigest(), size

    def beginning(self, key: str, length: int) -> bytes:
        """The first `length` bytes, or as many as there are. Raises `CorruptBackup` when it is missing."""
        with translated(key):
            return bytes(obstore.get_range(self._reader, key, start=0, length=length))

    def exists(self, key: str) -> bool:
        try:
            with translated(key):
                obstore.head(self._reader, key)
        except CorruptBackup:
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix, sorted."""
        with translated(prefix):
            return sorted(meta["path"] for page in obstore.list(self._reader, prefix) for meta in page)

    def listing(self, prefix: str) -> Iterator[list[Listed]]:
        """What lies below a prefix, a page at a time, in no order to rely on."""
        with translated(prefix):
            for page in obstore.list(self._reader, prefix, chunk_size=1000):
                yield [Listed(meta["path"], meta["size"], meta["last_modified"]) for meta in page]

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine. Raises `ObjectLocked` when the store keeps this one for now."""
        try:
            with translated(key):
                try:
                    obstore.delete(self._deleter, key)
                except BaseError as e:
                    said = " ".join(str(e).split("Debug source")[0].split())[:300]
                    if locked(e, self._names(key)) or (_denied(e) and self._may_delete()):
                        raise ObjectLocked(f"{key}: {said}") from e
                    if _denied(e):
                        raise ObjectStoreRefused(f"{key}: the object store refuses to delete: {said}") from e
                    raise
        except CorruptBackup:
            return
        if self._local_root is not None:
            fsync_path((self._local_root / key).parent)

    def _names(self, key: str) -> list[str]:
        """What a store's message may repeat, and what says nothing by the words in it."""
        url = urlsplit(self.settings.object_store_url)
        return [key, url.path.strip("/"), url.netloc]

    def _may_delete(self) -> bool:
        """Whether these credentials can delete at all: a 403 alone does not say what is refused."""
        try:
            obstore.delete(self._deleter, "tenants/.no-such-object")
        except FileNotFoundError:
            return True
        except (BaseError, OSError):
            return False
        return True

    def chunks(self, key: str) -> Iterator[Any]:
        """The bytes of an object as they arrive.

        A request has `object_store_timeout_seconds` for all of its answer, whoever is slow: the store, the line, or who
        takes the bytes. What is larger is read on from where that request ended, as long as each brings something.
        Raises `CorruptBackup` when it is missing, `ObjectStoreUnavailable`, `ObjectStoreRefused`.
        """
        if self._local_root is not None:
            yield from local_objects.read(self._local_root, key)
            return
        at, size, tag = 0, 1, None
        while at < size:
            begun_at = at
            try:
                with translated(key):
                    rest: GetOptions = {"range": {"offset": at}, "if_match": tag} if at else {}
                    response = obstore.get(self._reader, key, options=rest)
                    size, tag = response.meta["size"], response.meta["e_tag"]
                    for chunk in response.stream(min_chunk_size=_READ_BYTES):
                        at += len(chunk)
                        yield chunk
                    if at < size:
                        raise ObjectStoreUnavailable(f"{key}: {at} of {size} bytes arrived")
            except ObjectStoreUnavailable:
                if at == begun_at:
                    raise
                log.info("object_read_on", key=key, at_bytes=at, of_bytes=size)


def _denied(e: BaseError) -> bool:
    """A 403, of the request or (deletes go in bulk) of one key in an answer that is a 200."""
    return isinstance(e, (PermissionDeniedError, UnauthenticatedError)) or "AccessDenied" in str(e)


class _Damaged(Exception):
    """What this call stored is not what it sent; it was deleted."""
