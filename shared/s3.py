"""The S3 behind the object store: the client that reads, lists and deletes, what its errors mean, and how often what
failed is asked for again.

obstore retries 5xx, 429 and connection errors itself, from 0.2 s doubling to 5 s, a throttled request like any other:
it shows no headers, so only what is stored (`shared.s3_put`) obeys a Retry-After. Its errors become transient or
permanent: 404 is the builtin FileNotFoundError; refused credentials are permanent; all else may pass. Messages carry
the store's status, code and text.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from shared.errors import CorruptBackup, ObjectStoreRefused, ObjectStoreUnavailable, Permanent
from shared.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Config  # a type only, not importable at run time

T = TypeVar("T")
Passing = tuple[type[Exception], ...]
_THROTTLED = re.compile(r"\b(429|503)\b|SlowDown|TooManyRequests|RequestLimitExceeded")
_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,120})")
# How stores say that an object must not be deleted yet: R2 names a bucket lock, AWS an object lock, others WORM.
# Deletes go in bulk: the refusal of one key is in an answer that is a 200.
_OF_ONE_KEY = re.compile(r"DeleteObjects request failed for key .*?: (.*) \(code: ([A-Za-z0-9.]{1,60})\)", re.DOTALL)
_LOCK_CODE = re.compile(r"ObjectLock|Retention|LegalHold|WORM", re.IGNORECASE)
_LOCK_MESSAGE = re.compile(r"\b(object ?lock(ed)?|locked|WORM|retention|legal hold)\b", re.IGNORECASE)
_FAULTS = ("InternalError", "ServiceUnavailable", "SlowDown")  # what a 5xx is in a bulk answer


class Exists(Exception):
    """The key is taken."""


class Throttled(ObjectStoreUnavailable):
    """The store asks for fewer requests, and perhaps says for how long."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def persistently(settings: Settings, call: Callable[[], T], passing: Passing = (ObjectStoreUnavailable,)) -> T:
    """Repeat `call` while it raises what may pass, as often and as long as the settings say.

    Waits from 0.2 s doubling to 5 s, throttled from 1 s doubling to 20 s, and never less than a Retry-After; one that
    would end after `object_store_retry_timeout_seconds` is not waited for.
    """
    deadline = time.monotonic() + settings.object_store_retry_timeout_seconds
    for attempt in itertools.count():
        try:
            return call()
        except passing as e:
            first, most, asked = (1.0, 20.0, e.retry_after_seconds) if isinstance(e, Throttled) else (0.2, 5.0, None)
            pause = max(min(most, first * 2**attempt) * random.uniform(0.8, 1.2), asked or 0.0)
            if attempt >= settings.object_store_retries or time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def client(settings: Settings, bucket: str, prefix: str, key_id: str, secret: str) -> S3Store:
    if not bucket:
        raise Permanent("ENGRAM_OBJECT_STORE_URL names no bucket")
    config: S3Config = {
        "access_key_id": key_id,
        "secret_access_key": secret,
        "region": settings.s3_region,
    }
    if settings.s3_checksum == "sha256":
        config["checksum_algorithm"] = "SHA256"
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
def translated(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        if "NoSuchBucket" in str(e):
            raise ObjectStoreRefused(f"{key}: the bucket does not exist") from e
        raise CorruptBackup(f"{key}: no such object") from e
    except AlreadyExistsError as e:
        raise Exists from e
    except (PermissionDeniedError, UnauthenticatedError) as e:
        raise ObjectStoreRefused(f"{key}: the object store refused the credentials{said(e)}") from e
    except (InvalidPathError, ValueError) as e:  # a ValueError is obstore's for ".." and the like
        raise ObjectStoreRefused(f"{key}: not a valid key") from e
    except (BaseError, OSError) as e:
        cause = said(e) or f": {' '.join(str(e).partition('Debug source')[0].split())[:200]}"
        kind = Throttled if _THROTTLED.search(cause) else ObjectStoreUnavailable
        raise kind(f"{key}: {type(e).__name__}{cause}") from e


def locked(e: Exception, names: Iterable[str]) -> bool:
    """Whether the store itself, by the code or the message of its refusal, says that an object is kept for now. A fault
    is none, whatever it is worded like, nor is a word in one of `names`, which the message may repeat."""
    text = str(e).partition("Debug source")[0]
    if (one := _OF_ONE_KEY.search(text)) is not None:
        message, code = one.groups()
    else:
        status, found, told = _STATUS.search(text), _CODE.search(text), _MESSAGE.search(text)
        if status is None or not status[1].startswith("4"):
            return False
        code, message = found[1] if found else "", told[1] if told else ""
    for name in filter(None, names):
        message = message.replace(name, "")
    return code not in _FAULTS and bool(_LOCK_CODE.search(code) or _LOCK_MESSAGE.search(message))


def said(e: Exception) -> str:
    """Status, code and text of the store's answer, when it gave one: `: 507 Insufficient Storage: QuotaExceeded: …`."""
    found = (_STATUS.search(str(e)), _CODE.search(str(e)), _MESSAGE.search(str(e)))
    return "".join(f": {m[1].strip()}" for m in found if m is not None)
