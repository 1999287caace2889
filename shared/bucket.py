"""Signed requests to an S3 bucket (AWS Signature Version 4, header form), for what obstore cannot say: the condition of
an upload's completion, a Retry-After, and the uploads that another process began.

An answer becomes an error as in `shared.s3`: refused credentials and a missing bucket are permanent, a taken key is
`Exists`, all else may pass. Messages carry the store's status, code and text.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import httpx

from shared.errors import ObjectStoreRefused, ObjectStoreUnavailable
from shared.receipt import Receipt
from shared.s3 import Exists, Throttled
from shared.settings import Settings

_EMPTY = hashlib.sha256(b"").hexdigest()
_SLICE_BYTES = 1 << 18
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,120})")
_REFUSED = (401, 403, 404)


class Upload(Receipt, frozen=True):
    """One upload under way or abandoned. `age` is by the store's own clock."""

    key: str
    upload_id: str
    age: timedelta
    size_bytes: int = 0  # of the local store's alone

    @property
    def name(self) -> str:
        return f"{self.key}#{self.upload_id}"


class Bucket:
    """One bucket, by path. Threads may share it."""

    def __init__(self, settings: Settings, role: Literal["write", "delete"] = "delete") -> None:
        url = urlsplit(settings.object_store_url)
        endpoint = settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com"
        self._base = f"{endpoint.rstrip('/')}/{url.netloc}"
        self.prefix = f"{url.path.strip('/')}/" if url.path.strip("/") else ""
        self._region = settings.s3_region
        self._key_id, self._secret = settings.s3_credentials(role)
        timeout = httpx.Timeout(
            settings.object_store_timeout_seconds, connect=settings.object_store_connect_timeout_seconds
        )
        self._client = httpx.Client(timeout=timeout, trust_env=False)

    def uploads(self, below: str = "tenants/", *, page: int = 1000) -> Iterator[Upload]:
        """Every upload below the prefix that has not ended, `page` a request (stores give no more than 1,000)."""
        query = {"uploads": "", "prefix": f"{self.prefix}{below}", "max-uploads": str(page)}
        while True:
            reply = self.request("GET", "", query)
            now = parsedate_to_datetime(reply.headers["Date"]) if "Date" in reply.headers else datetime.now(UTC)
            answer = parsed(reply)
            for upload in answer.iterfind("{*}Upload"):
                initiated = datetime.fromisoformat(text(upload, "Initiated"))
                yield Upload(text(upload, "Key"), text(upload, "UploadId"), now - initiated)
            if text(answer, "IsTruncated") != "true":
                return
            query["key-marker"] = text(answer, "NextKeyMarker")
            query["upload-id-marker"] = text(answer, "NextUploadIdMarker")

    def request(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        sha256: str = "",
    ) -> httpx.Response:
        """One request, its answer a 2xx; a missing upload is fine to delete. `key` is the whole key, prefix included;
        `sha256` is the body's in hex, where it is known.

        Raises `Exists`, `Throttled`, `ObjectStoreUnavailable`, `ObjectStoreRefused`.
        """
        url = self._base + (f"/{quote(key, safe='/-_.~')}" if key else "")
        asked = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        hashed = sha256 or (hashlib.sha256(body).hexdigest() if body else _EMPTY)
        signed = self._signed(method, url, asked, hashed, headers or {}, datetime.now(UTC))
        what = f"{method} {key or 'uploads'}"
        try:
            reply = self._client.request(
                method,
                f"{url}?{asked}" if asked else url,
                headers=signed | ({"content-length": str(len(body))} if body else {}),
                content=_sliced(body) if body else None,
            )
        except httpx.HTTPError as e:
            raise ObjectStoreUnavailable(f"{what}: {type(e).__name__}: {e}") from e
        if reply.is_success or (method == "DELETE" and reply.status_code == 404):
            return reply
        raise _error(what, reply)

    def _signed(
        self, method: str, url: str, query: str, hashed: str, more: Mapping[str, str], at: datetime
    ) -> dict[str, str]:
        stamp, day = at.strftime("%Y%m%dT%H%M%SZ"), at.strftime("%Y%m%d")
        parts = urlsplit(url)
        amz = {"host": parts.netloc, "x-amz-content-sha256": hashed, "x-amz-date": stamp}
        headers = dict(sorted((amz | dict(more)).items()))
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        asked = f"{method}\n{parts.path}\n{query}\n{lines}\n{names}\n{hashed}"
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


def _sliced(body: bytes) -> Iterator[bytes]:
    """In pieces: httpx copies what is left of a piece each time the socket took some of it."""
    for at in range(0, len(body), _SLICE_BYTES):
        yield body[at : at + _SLICE_BYTES]


def _error(what: str, reply: httpx.Response) -> Exception:
    status = f"{reply.status_code} {reply.reason_phrase}".strip()
    found = [m[1] for m in (_CODE.search(reply.text), _MESSAGE.search(reply.text)) if m is not None]
    said = ": ".join([what, status, *found])
    if reply.status_code == 412:
        return Exists(said)
    if reply.status_code in (429, 503):
        return Throttled(said, retry_after_seconds=_retry_after(reply))
    return (ObjectStoreRefused if reply.status_code in _REFUSED else ObjectStoreUnavailable)(said)


def _retry_after(reply: httpx.Response) -> float | None:
    """What the store asks to wait: seconds, or a date."""
    asked = reply.headers.get("Retry-After", "")
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def parsed(reply: httpx.Response) -> ElementTree.Element:
    """Raises `ObjectStoreUnavailable` for an answer that is no XML."""
    try:
        return ElementTree.fromstring(reply.content)
    except ElementTree.ParseError as e:
        raise ObjectStoreUnavailable(f"the store's answer cannot be read: {e}") from e


def text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
