"""The dev token issuer: a signing key, a key set to publish, tokens. Dev only; `mint` refuses anywhere else.

    {data_dir}/issuer/signing.pem     the ES256 private key, 0600
    {data_dir}/issuer/jwks.json       every published public key, the signing one first

Signing happens in the caller's process with the key file; `deployments.issuer_server` serves `jwks.json` and
never reads a private key. A key's `kid` is its RFC 7638 thumbprint, so it is the same wherever it is computed.
A key is published before anything is signed with it, and stays published: a token lives on until it expires.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared import durable
from shared.errors import Permanent, Refused
from shared.settings import Settings
from shared.tenant import check_tenant_id

ALGORITHM = "ES256"
SCOPES = ("memories:read", "memories:write", "search", "admin")
DEFAULT_SCOPES = ("memories:read", "memories:write", "search")
_COORDINATE_BYTES = 32


def issuer_dir(data_dir: Path) -> Path:
    return data_dir / "issuer"


def mint(
    settings: Settings, tenant_id: str, scopes: Sequence[str] = DEFAULT_SCOPES, ttl_seconds: int = 3_600
) -> tuple[str, datetime]:
    """A signed token for one tenant, and when it expires. Raises `Refused` outside dev."""
    if settings.env != "dev":
        raise Refused(f"the dev issuer signs nothing in {settings.env}: ask the real issuer for a token")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise Permanent(f"unknown scope {', '.join(unknown)}: choose from {', '.join(SCOPES)}")
    key = ensure_key(settings.data_dir)
    issued_at = int(time.time())
    expires_at = issued_at + ttl_seconds
    claims = {
        "iss": issuer_url(settings),
        "aud": settings.jwt_audience,
        "sub": f"dev:{check_tenant_id(tenant_id)}",
        settings.jwt_tenant_claim: tenant_id,
        "scope": " ".join(scopes),
        "iat": issued_at,
        "nbf": issued_at,
        "exp": expires_at,
        "jti": uuid.uuid4().hex,
    }
    token = jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": public_jwk(key)["kid"]})
    return token, datetime.fromtimestamp(expires_at, UTC)


def issuer_url(settings: Settings) -> str:
    """What `iss` says: the setting, else where `engram up` serves the key set by default."""
    return settings.jwt_issuer or f"http://127.0.0.1:{settings.issuer_port}"


def ensure_key(data_dir: Path) -> ec.EllipticCurvePrivateKey:
    """The signing key, made and published on first use. Safe for several processes at once."""
    directory = issuer_dir(data_dir)
    with _exclusive(directory):
        if not (directory / "signing.pem").exists():
            _publish(directory, _new_key())
        key = _read_key(directory)
        if public_jwk(key) not in _published(directory):  # a crash between the two files, or a lost one
            _write_key_set(directory, [public_jwk(key), *_published(directory)])
        return key


def public_jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The public half as a JWK, with its thumbprint as `kid`."""
    point = key.public_key().public_numbers()
    required = {"crv": "P-256", "kty": "EC", "x": _base64url(point.x), "y": _base64url(point.y)}
    digest = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode()).digest()
    return required | {"kid": _base64url(int.from_bytes(digest)), "use": "sig", "alg": ALGORITHM}


def _publish(directory: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """The key set first: nothing is ever signed with a key that is not yet published."""
    _write_key_set(directory, [public_jwk(key), *_published(directory)])
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    durable.write_file(directory / "signing.pem", pem)


def _write_key_set(directory: Path, keys: list[dict[str, Any]]) -> None:
    durable.write_file(directory / "jwks.json", json.dumps({"keys": keys}).encode(), mode=0o644)


def _published(directory: Path) -> list[dict[str, Any]]:
    try:
        keys: list[dict[str, Any]] = json.loads((directory / "jwks.json").read_bytes())["keys"]
    except FileNotFoundError:
        return []
    return keys


def _read_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((directory / "signing.pem").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Permanent(f"{directory / 'signing.pem'} is not an EC key")
    return key


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _base64url(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(_COORDINATE_BYTES)).rstrip(b"=").decode()


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
