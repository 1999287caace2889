"""Multipart uploads that were begun and never ended: a killed backup leaves its parts, unseen and paid for.

obstore can neither list nor abort what another process began, so the two requests are signed here (AWS Signature
Version 4, header form). R2 aborts them by itself after seven days unless the bucket's lifecycle rules say otherwise.
The local store's counterpart is the file `NAME#1` that obstore renames into place at the end.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

import httpx

from shared.durable import unlink
from shared.errors import ObjectStoreRefused, ObjectStoreUnavailable
from shared.receipt import Receipt
from shared.settings import Settings

_STAGED = re.compile(r"#\d+\Z")
_EMPTY = hashlib.sha256(b"").hexdigest()


class Upload(Receipt, frozen=True):
    """One upload under way or abandoned. `age` is by the store's own clock."""

    key: str
    upload_id: str
    age: timedelta
    size_bytes: int = 0  # of the local store's alone

    @property
    def name(self) -> str:
        return f"{self.key}#{self.upload_id}"


def clear(settings: Settings, *, dry_run: bool = False) -> list[Upload]:
    """Abort uploads older than `retention_orphan_hours`; those. Raises `ObjectStoreUnavailable`, `ObjectStoreRefused`.

    An upload under way is never that old: a backup's whole run is shorter.
    """
    oldest = timedelta(hours=settings.retention_orphan_hours)
    found = [upload for upload in _begun(settings, "tenants/") if upload.age > oldest]
    if not dry_run:
        abort(settings, found)
    return found


def of_tenant(settings: Settings, tenant_id: str) -> list[Upload]:
    """Its uploads that have not ended, however old. Raises as `clear`."""
    return _begun(settings, f"tenants/{tenant_id}/")


def abort(settings: Settings, found: list[Upload]) -> None:
    """End uploads and remove what they stored. One that has ended meanwhile is fine."""
    if (root := _local_root(settings)) is not None:
        for upload in found:
            unlink(root / upload.name)
        return
    bucket = Bucket(settings)
    for upload in found:
        bucket.request("DELETE", upload.key, {"uploadId": upload.upload_id})


def _local_root(settings: Settings) -> Path | None:
    url = urlsplit(settings.object_store_url)
    return Path(unquote(url.path)) if url.scheme == "file" else None


def _begun(settings: Settings, prefix: str) -> list[Upload]:
    if (root := _local_root(settings)) is None:
        return list(Bucket(settings).uploads(prefix))
    found = []
    for path in (root / prefix).rglob("*.sqlite*#*"):
        if _STAGED.search(path.name):
            key, _, upload_id = str(path.relative_to(root)).rpartition("#")
            stat = path.stat()
            age = datetime.now(UTC) - datetime.fromtimestamp(stat.st_mtime, UTC)
            found.append(Upload(key, upload_id, age, stat.st_size))
    return found


class Bucket:
    """Signed requests to one bucket, by path."""

    def __init__(self, settings: Settings) -> None:
        url = urlsplit(settings.object_store_url)
        endpoint = settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com"
        self._base = f"{endpoint.rstrip('/')}/{url.netloc}"
        self._prefix = f"{url.path.strip('/')}/" if url.path.strip("/") else ""
        self._region = settings.s3_region
        self._key_id, self._secret = settings.s3_credentials("delete")
        self._timeout = httpx.Timeout(
            settings.object_store_timeout_seconds, connect=settings.object_store_connect_timeout_seconds
        )

    def uploads(self, below: str = "tenants/", *, page: int = 1000) -> Iterator[Upload]:
        """Every upload below the prefix that has not ended, `page` a request (stores give no more than 1,000)."""
        query = {"uploads": "", "prefix": f"{self._prefix}{below}", "max-uploads": str(page)}
        while True:
            reply = self.request("GET", "", query)
            now = parsedate_to_datetime(reply.headers["Date"]) if "Date" in reply.headers else datetime.now(UTC)
            answer = _parsed(reply)
            for upload in answer.iterfind("{*}Upload"):
                initiated = datetime.fromisoformat(_text(upload, "Initiated"))
                yield Upload(_text(upload, "Key"), _text(upload, "UploadId"), now - initiated)
            if _text(answer, "IsTruncated") != "true":
                return
            query["key-marker"] = _text(answer, "NextKeyMarker")
            query["upload-id-marker"] = _text(answer, "NextUploadIdMarker")

    def request(self, method: str, key: str, query: dict[str, str]) -> httpx.Response:
        """One request, its answer a 2xx; a missing upload is fine. `key` is the whole key, prefix included."""
        url = self._base + (f"/{quote(key, safe='/-_.~')}" if key else "")
        asked = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        try:
            reply = httpx.request(
                method,
                f"{url}?{asked}",
                headers=self._signed(method, url, asked, datetime.now(UTC)),
                timeout=self._timeout,
                trust_env=False,
            )
        except httpx.HTTPError as e:
            raise ObjectStoreUnavailable(f"{method} {key or 'uploads'}: {type(e).__name__}: {e}") from e
        if reply.is_success or (method == "DELETE" and reply.status_code == 404):
            return reply
        said = f"{method} {key or 'uploads'}: {reply.status_code} {' '.join(reply.text.split())[:200]}"
        raise (ObjectStoreUnavailable if reply.status_code >= 500 else ObjectStoreRefused)(said)

    def _signed(self, method: str, url: str, query: str, at: datetime) -> dict[str, str]:
        stamp, day = at.strftime("%Y%m%dT%H%M%SZ"), at.strftime("%Y%m%d")
        parts = urlsplit(url)
        headers = {"host": parts.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        asked = f"{method}\n{parts.path}\n{query}\n{lines}\n{names}\n{_EMPTY}"
        scope = f"{day}/{self._region}/s3/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(asked.encode()).hexdigest()}"
        key = f"AWS4{self._secret}".encode()
        for part in scope.split("/"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
        credential = f"Credential={self._key_id}/{scope}"
        return headers | {
            "authorization": f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        }


def _parsed(reply: httpx.Response) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(reply.content)
    except ElementTree.ParseError as e:
        raise ObjectStoreUnavailable(f"the list of uploads cannot be read: {e}") from e


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
