"""An object's way to S3, which never overwrites: one conditional request, or parts whose completion is conditional.

obstore knows no condition for an upload in parts, so both are sent here. R2, AWS and SeaweedFS look at If-None-Match
when an upload is completed; AWS refuses it with its beginning and its parts. A store that ignores it is left with the
look for the key before the upload. Parts are of equal size but for the last, as R2 wants.

Each request carries x-amz-checksum-sha256 (unless `s3_checksum` is none) and is tried again by itself, so that one part
that fails does not cost the others. A completion whose reply was lost is asked for again: "exists" or "no such upload"
is the answer then, and both are `Exists`: whose object it is, its bytes tell.
"""

from __future__ import annotations

import base64
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from shared.bucket import Bucket, parsed, text
from shared.errors import EngramError, ObjectStoreRefused, ObjectStoreUnavailable
from shared.log import get_logger
from shared.s3 import Exists, persistently
from shared.settings import Settings

_PARALLEL = 2  # parts under way; each is in memory
_MOST_PARTS = 10_000  # what S3 allows
_CONDITION = {"if-none-match": "*"}
log = get_logger("s3")


class _Part(NamedTuple):
    number: int
    etag: str
    checksum: str


def put(bucket: Bucket, settings: Settings, key: str, path: Path) -> None:
    """Store `path` under a new key. Raises `Exists`, `ObjectStoreUnavailable`, `ObjectStoreRefused`."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ObjectStoreRefused(f"{key}: not a valid key")
    whole_key, size = bucket.prefix + key, path.stat().st_size
    if size <= settings.object_store_single_put_bytes:
        data = path.read_bytes()
        digest = hashlib.sha256(data)
        headers = _CONDITION | _checksum(settings, digest.digest())
        bucket.request("PUT", whole_key, {}, data, headers, sha256=digest.hexdigest())
    else:
        _put_parts(bucket, settings, whole_key, path, size)


def _put_parts(bucket: Bucket, settings: Settings, key: str, path: Path, size: int) -> None:
    part_bytes = max(settings.object_store_part_bytes, -(-size // _MOST_PARTS))
    wanted = {"x-amz-checksum-algorithm": "SHA256"} if settings.s3_checksum == "sha256" else {}
    begun = persistently(settings, lambda: bucket.request("POST", key, {"uploads": ""}, headers=wanted))
    upload_id = text(parsed(begun), "UploadId")

    def send(number: int) -> _Part:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), part_bytes, (number - 1) * part_bytes)
        digest = hashlib.sha256(data)
        query, headers = {"partNumber": str(number), "uploadId": upload_id}, _checksum(settings, digest.digest())
        sent = persistently(
            settings, lambda: bucket.request("PUT", key, query, data, headers, sha256=digest.hexdigest())
        )
        return _Part(number, sent.headers.get("ETag", ""), headers.get("x-amz-checksum-sha256", ""))

    try:
        with ThreadPoolExecutor(_PARALLEL, "part") as pool:
            parts = list(pool.map(send, range(1, -(-size // part_bytes) + 1)))
        persistently(settings, lambda: _complete(bucket, key, upload_id, parts))
    except BaseException:
        _abort(bucket, key, upload_id)
        raise


def _complete(bucket: Bucket, key: str, upload_id: str, parts: list[_Part]) -> None:
    listed = "".join(
        f"<Part><PartNumber>{part.number}</PartNumber><ETag>{part.etag}</ETag>"
        + (f"<ChecksumSHA256>{part.checksum}</ChecksumSHA256>" if part.checksum else "")
        + "</Part>"
        for part in parts
    )
    body = f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
    try:
        answer = parsed(bucket.request("POST", key, {"uploadId": upload_id}, body, _CONDITION))
    except ObjectStoreRefused as e:
        if "NoSuchUpload" in str(e):
            raise Exists(str(e)) from e
        raise
    if answer.tag.endswith("Error"):  # S3 may begin its answer with a 200 and fail after
        raise ObjectStoreUnavailable(f"{key}: {text(answer, 'Code')}: {text(answer, 'Message')[:120]}")


def _abort(bucket: Bucket, key: str, upload_id: str) -> None:
    """Free the parts; what fails here is left to `shared.uploads`."""
    try:
        bucket.request("DELETE", key, {"uploadId": upload_id})
    except EngramError as e:
        log.warning("upload_not_aborted", key=key, cause=str(e))


def _checksum(settings: Settings, digest: bytes) -> dict[str, str]:
    if settings.s3_checksum == "none":
        return {}
    return {"x-amz-checksum-sha256": base64.b64encode(digest).decode()}
