"""The gateway's certificate and key: which pair is taken, and what is said of one that cannot work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from gateway.certificate import Certificate
from shared.errors import Permanent
from shared.settings import Settings
from tests.tls_fixtures import Pair, pair, pem

GOOD_KEYS = [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()]


@pytest.mark.parametrize("key", GOOD_KEYS, ids=["P-384", "Ed25519"])
def test_a_pair_that_fits_is_taken(tmp_path: Path, key: Any) -> None:
    """Its names and end are known, for whoever wants to say them."""
    made = pair(tmp_path, key=key)
    found = Certificate.of(Settings(**made.settings()))  # type: ignore[arg-type]
    assert found is not None and found.names == ("localhost", socket.gethostname(), "127.0.0.1")
    assert Certificate.of(Settings()) is None


def _break(made: Pair, what: str) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    match what:
        case "no certificate":
            made.certificate.unlink()
        case "a directory":
            made.certificate.unlink()
            made.certificate.mkdir()
        case "no PEM":
            made.certificate.write_bytes(b"sesame")
        case "the key as certificate":
            made.certificate.write_bytes(made.key.read_bytes())
        case "no key":
            made.key.unlink()
        case "another key":
            made.key.write_bytes(pem(other))
        case "a passphrase":
            made.key.write_bytes(pem(other, b"sesame"))
        case "half a key":
            made.key.write_bytes(made.key.read_bytes()[:80])
        case "the certificate as key":
            made.key.write_bytes(made.certificate.read_bytes())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no certificate", "CERTIFICATE: {certificate}: No such file or directory"),
        ("a directory", "CERTIFICATE: {certificate}: Is a directory"),
        ("no PEM", "CERTIFICATE: {certificate} holds no certificate in PEM"),
        ("the key as certificate", "CERTIFICATE: {certificate} holds no certificate in PEM"),
        ("no key", "KEY: {key}: No such file or directory"),
        ("another key", "KEY: {key} is not the key of the first certificate in {certificate}"),
        ("a passphrase", "KEY: {key} has a passphrase; give it without one, readable by its owner"),
        ("half a key", "KEY: {key} holds no private key in PEM"),
        ("the certificate as key", "KEY: {key} holds no private key in PEM"),
    ],
)
def test_a_pair_that_cannot_work_is_named_in_one_line(tmp_path: Path, what: str, said: str) -> None:
    """Before a worker dies of it; never with a byte of the key."""
    made = pair(tmp_path)
    _break(made, what)
    with pytest.raises(Permanent) as refused:
        Certificate.of(Settings(**made.settings()))  # type: ignore[arg-type]
    assert str(refused.value) == "ENGRAM_TLS_" + said.format(certificate=made.certificate, key=made.key)


def test_a_certificate_out_of_its_time_or_with_a_weak_key_is_refused(tmp_path: Path) -> None:
    """Clients would refuse it one by one, and nobody would know why."""
    for days in ((-2, -1), (1, 2)):
        with pytest.raises(Permanent, match="is valid from"):
            Certificate.of(Settings(**pair(tmp_path, days=days).settings()))  # type: ignore[arg-type]
    for key in (rsa.generate_private_key(65_537, 1_024), ec.generate_private_key(ec.SECP521R1())):
        with pytest.raises(Permanent, match="want RSA"):
            Certificate.of(Settings(**pair(tmp_path, key=key).settings()))  # type: ignore[arg-type]


def test_serve_says_it_in_one_line_and_exits_1(tmp_path: Path) -> None:
    """Not Granian's stack trace, and not a start without TLS."""
    made = pair(tmp_path)
    _break(made, "another key")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ENGRAM_")}
    environment |= {
        "ENGRAM_DATA_DIR": str(tmp_path / "data"),
        "ENGRAM_CONTROL_PLANE_URL": "postgresql://127.0.0.1:1/x",
        "ENGRAM_JWKS_URL": "https://issuer.test/keys",
        "ENGRAM_JWT_ISSUER": "https://issuer.test",
        "ENGRAM_TLS_CERTIFICATE": str(made.certificate),
        "ENGRAM_TLS_KEY": str(made.key),
    }
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "serve"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("engram: ENGRAM_TLS_KEY: ") and "is not the key" in line
