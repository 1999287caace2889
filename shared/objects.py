"""The object store: Cloudflare R2, any S3, or a local directory, through obstore.

Three operations, each with one meaning: `put_file` returns only when the object is there whole (read back and
hashed); `download` returns only when the bytes on disk have the expected sha256; `sha256` reads and hashes.
Objects are created, never overwritten: an earlier try of ours that arrived is recognised by its content.

obstore retries 5xx and connection errors of reads itself; a conditional put is not retried there on a time-out
(the reply may be lost, the object may exist), so that loop is here. obstore's errors become transient or
permanent: 404 is the builtin FileNotFoundError; refused credentials are permanent; all else may pass.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from shared import pack
from shared.durable import fsync_path
from shared.errors import CorruptBackup, KeyTaken, ObjectLocked, ObjectStoreRefused, ObjectStoreUnavailable, Permanent
from shared.pack import Progress
from shared.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Config  # a type only, not importable at run time

_SINGLE_PUT_BYTES = 32 << 20  # a conditional put is one request; above this, parts (R2 wants them equal: they are)
_PART_BYTES = 8 << 20
_READ_BYTES = 1 << 20


# How stores say that an object must not be deleted yet: R2 names a bucket lock, AWS an object lock, others WORM.
_LOCKED = re.compile(r"object ?lock|locked|WORM|retention|legal hold", re.IGNORECASE)


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
        self._retries = settings.object_store_retries
        self._local_root: Path | None = None
        url = urlsplit(settings.object_store_url)
        if url.scheme == "file":
            self._local_root = Path(unquote(url.path))
            if self._local_root.is_relative_to(settings.data_dir):
                self._local_root.mkdir(parents=True, exist_ok=True, mode=0o700)
            elif not self._local_root.is_dir():  # a mount that is missing must not look like an empty store
                raise ObjectStoreRefused(f"the object store {self._local_root} does not exist")
            self._store: LocalStore | S3Store = LocalStore(self._local_root)
        elif url.scheme == "s3":
            self._store = _s3(settings, url.netloc, url.path.strip("/"))
        else:
            raise Permanent("ENGRAM_OBJECT_STORE_URL must start with file:// or s3://")

    def put_file(self, key: str, path: Path, sha256: str) -> int:
        """Store `path` under a new key; return the stored size in bytes once it was read back whole.

        Raises `ObjectStoreRefused` when the key holds other bytes, `ObjectStoreUnavailable` after the retries,
        `CorruptBackup` when what was stored is not what was sent.
        """
        existed = False
        for attempt in range(self._retries + 1):
            try:
                with _translated(key):
                    self._put_once(key, path)
                break
            except _Exists:
                existed = True
                break  # ours from a lost reply, or somebody else's: the read below decides
            except ObjectStoreUnavailable:
                if attempt == self._retries:
                    raise
                time.sleep(min(5.0, 0.2 * 2**attempt))
        stored, size = self.sha256(key)
        if stored != sha256:
            if existed:
                raise KeyTaken(f"{key} already exists with other content")
            raise CorruptBackup(f"{key}: the stored object has another sha256 than the file sent")
        self._fsync_local(key)
        return size

    def _put_once(self, key: str, path: Path) -> None:
        if path.stat().st_size <= _SINGLE_PUT_BYTES:
            obstore.put(self._store, key, path, mode="create", use_multipart=False)
            return
        # Parts cannot be conditional in obstore: look first. The key carries microseconds, one writer a tenant.
        if self.exists(key):
            raise _Exists
        obstore.put(self._store, key, path, use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=4)

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

    def exists(self, key: str) -> bool:
        try:
            with _translated(key):
                obstore.head(self._store, key)
        except CorruptBackup:
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix, sorted."""
        with _translated(prefix):
            return sorted(meta["path"] for page in obstore.list(self._store, prefix) for meta in page)

    def listing(self, prefix: str) -> Iterator[list[Listed]]:
        """What lies below a prefix, a page at a time, in no order to rely on."""
        with _translated(prefix):
            for page in obstore.list(self._store, prefix, chunk_size=1000):
                yield [Listed(meta["path"], meta["size"], meta["last_modified"]) for meta in page]

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is fine. Raises `ObjectLocked` when the store keeps this one for now."""
        try:
            with _translated(key):
                try:
                    obstore.delete(self._store, key)
                except BaseError as e:
                    said = " ".join(str(e).split("Debug source")[0].split())[:300]
                    if _LOCKED.search(said) or (_denied(e) and self._may_delete()):
                        raise ObjectLocked(f"{key}: {said}") from e
                    if _denied(e):
                        raise ObjectStoreRefused(f"{key}: the object store refuses to delete: {said}") from e
                    raise
        except CorruptBackup:
            return
        if self._local_root is not None:
            fsync_path((self._local_root / key).parent)

    def _may_delete(self) -> bool:
        """Whether these credentials can delete at all: a 403 alone does not say what is refused."""
        try:
            obstore.delete(self._store, "tenants/.no-such-object")
        except FileNotFoundError:
            return True
        except (BaseError, OSError):
            return False
        return True

    def chunks(self, key: str) -> Iterator[Any]:
        """The bytes of an object as they arrive. Raises `CorruptBackup` when it is missing."""
        with _translated(key):
            response = obstore.get(self._store, key)
            expected = response.meta["size"]
            seen = 0
            for chunk in response.stream(min_chunk_size=_READ_BYTES):
                seen += len(chunk)
                yield chunk
            if seen != expected:
                raise ObjectStoreUnavailable(f"{key}: {seen} of {expected} bytes arrived")

    def _fsync_local(self, key: str) -> None:
        """obstore's local store renames into place without fsync; a backup must survive power loss."""
        if self._local_root is None:
            return
        path = self._local_root / key
        fsync_path(path)
        for directory in path.parents:
            fsync_path(directory)
            if directory == self._local_root:
                return


def _denied(e: BaseError) -> bool:
    """A 403, of the request or (deletes go in bulk) of one key in an answer that is a 200."""
    return isinstance(e, (PermissionDeniedError, UnauthenticatedError)) or "AccessDenied" in str(e)


class _Exists(Exception):
    """The key is taken."""


def _s3(settings: Settings, bucket: str, prefix: str) -> S3Store:
    settings.require("s3_access_key_id", "s3_secret_access_key")
    if not bucket:
        raise Permanent("ENGRAM_OBJECT_STORE_URL names no bucket")
    config: S3Config = {
        "access_key_id": settings.s3_access_key_id,
        "secret_access_key": settings.s3_secret_access_key.get_secret_value(),
        "region": settings.s3_region,
    }
    if settings.s3_endpoint:
        config["endpoint"] = settings.s3_endpoint
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options={
            "allow_http": settings.s3_endpoint.startswith("http://"),
            "timeout": timedelta(seconds=settings.object_store_timeout_seconds),
            "connect_timeout": timedelta(seconds=settings.object_store_connect_timeout_seconds),
        },
        retry_config={
            "max_retries": settings.object_store_retries,
            "retry_timeout": timedelta(seconds=settings.object_store_retry_timeout_seconds),
            "backoff": {
                "init_backoff": timedelta(milliseconds=200),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    )


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        if "NoSuchBucket" in str(e):
            raise ObjectStoreRefused(f"{key}: the bucket does not exist") from e
        raise CorruptBackup(f"{key}: no such object") from e
    except AlreadyExistsError as e:
        raise _Exists from e
    except (PermissionDeniedError, UnauthenticatedError) as e:
        raise ObjectStoreRefused(f"{key}: the object store refused the credentials") from e
    except (InvalidPathError, ValueError) as e:  # a ValueError is obstore's for ".." and the like
        raise ObjectStoreRefused(f"{key}: not a valid key") from e
    except (BaseError, OSError) as e:
        raise ObjectStoreUnavailable(f"{key}: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
