"""Certificates for tests: an authority made here, and what it signs for this machine's names."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate, its key, and the authority to verify it with."""

    certificate: Path
    key: Path
    ca: Path

    def settings(self) -> dict[str, str]:
        return {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}


def pair(directory: Path, *, key: Any = None, days: tuple[float, float] = (-1, 1), name: str = "gateway") -> Pair:
    """A new pair for localhost, 127.0.0.1 and this host's name, valid between two days from now, signed by an authority
    of its own."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), key or ec.generate_private_key(ec.SECP256R1())
    ca = _signed("test authority", authority.public_key(), "test authority", authority, (-1, 1), ca=True)
    leaf = _signed(name, key.public_key(), "test authority", authority, days, ca=False)
    found = Pair(directory / f"{name}.pem", directory / f"{name}.key", directory / f"{name}-ca.pem")
    found.certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    found.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    found.key.write_bytes(pem(key))
    return found


def pem(key: Any, passphrase: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    written: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return written


def _signed(
    name: str, public_key: Any, issuer: str, authority: Any, days: tuple[float, float], *, ca: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    names = [
        x509.DNSName("localhost"),
        x509.DNSName(socket.gethostname()),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if not ca:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
