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


def clear(settings: Settings, *, dry_run: bool = False) -> list[Upload]:
    """Abort uploads older than `retention_orphan_hours`; those. Raises `ObjectStoreUnavailable`, `ObjectStoreRefused`.

    An upload under way is never that old: a backup's whole run is shorter.
    """
    oldest = timedelta(hours=settings.retention_orphan_hours)
    url = urlsplit(settings.object_store_url)
    if url.scheme == "file":
        return _clear_local(Path(unquote(url.path)), oldest, dry_run)
    bucket = Bucket(settings)
    found = [upload for upload in bucket.uploads() if upload.age > oldest]
    if not dry_run:
        for upload in found:
            bucket.request("DELETE", upload.key, {"uploadId": upload.upload_id})
    return found


def _clear_local(root: Path, oldest: timedelta, dry_run: bool) -> list[Upload]:
    found = []
    for path in root.rglob("*.sqlite*#*"):
        if _STAGED.search(path.name):
            changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            found.append((path, Upload(str(path.relative_to(root)), "", datetime.now(UTC) - changed)))
    old = [(path, upload) for path, upload in found if upload.age > oldest]
    for path, _ in [] if dry_run else old:
        unlink(path)
    return [upload for _, upload in old]


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

    def uploads(self, *, page: int = 1000) -> Iterator[Upload]:
        """Every upload below the prefix that has not ended, `page` a request (stores give no more than 1,000)."""
        query = {"uploads": "", "prefix": f"{self._prefix}tenants/", "max-uploads": str(page)}
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
