"""The certificate the gateway shows, checked before a worker needs it.

A worker that cannot use it dies inside Granian with a stack trace of its own, again and again; and OpenSSL, asked to
open a key with a passphrase, asks the terminal. So the two files are read here first, and everything that keeps TLS
from working is one line that names the file. A renewed pair is taken up by workers that start later.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from shared.errors import Permanent
from shared.settings import Settings

_RSA_BITS = 2_048
_CURVES = (ec.SECP256R1, ec.SECP384R1)  # of the TLS library below Granian


class Certificate(NamedTuple):
    """A pair that fits."""

    certificate: Path
    key: Path
    names: tuple[str, ...]
    expires_at: datetime

    @classmethod
    def of(cls, settings: Settings) -> Certificate | None:
        """None when somebody else ends TLS. Raises `Permanent`, of which the message never holds a line of the key."""
        if not settings.tls_certificate:
            return None
        path, key_path = Path(settings.tls_certificate), Path(settings.tls_key)
        try:
            leaf = x509.load_pem_x509_certificates(_read(path, "ENGRAM_TLS_CERTIFICATE"))[0]
        except ValueError:
            raise Permanent(f"ENGRAM_TLS_CERTIFICATE: {path} holds no certificate in PEM") from None
        key = _key(key_path)
        if leaf.public_key() != key.public_key():
            raise Permanent(f"ENGRAM_TLS_KEY: {key_path} is not the key of the first certificate in {path}")
        now = datetime.now(UTC)
        if now < leaf.not_valid_before_utc or now >= leaf.not_valid_after_utc:
            begins, ends = leaf.not_valid_before_utc, leaf.not_valid_after_utc
            raise Permanent(
                f"ENGRAM_TLS_CERTIFICATE: {path} is valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M}"
            )
        return cls(path, key_path, _names(leaf), leaf.not_valid_after_utc)


def _read(path: Path, variable: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise Permanent(f"{variable}: {path}: {e.strerror}") from e


def _key(path: Path) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
    data = _read(path, "ENGRAM_TLS_KEY")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise Permanent(
            f"ENGRAM_TLS_KEY: {path} has a passphrase; give it without one, readable by its owner"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise Permanent(f"ENGRAM_TLS_KEY: {path} holds no private key in PEM") from None
    usable = (
        (isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _RSA_BITS)
        or (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES))
        or isinstance(key, ed25519.Ed25519PrivateKey)
    )
    if not usable:
        raise Permanent(f"ENGRAM_TLS_KEY: {path}: want RSA of {_RSA_BITS} bits or more, P-256, P-384 or Ed25519")
    return key  # type: ignore[return-value]


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return (*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress)))
    except x509.ExtensionNotFound:
        return tuple(str(name.value) for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
