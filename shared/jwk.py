"""JSON Web Keys: which of an issuer's published keys can and may verify a signature.

A key brings its algorithm (kty, crv → alg); a token's header can only agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

MAX_BYTES = 262_144
MAX_KEYS = 100
MIN_RSA_BITS = 2_048
_ALGORITHMS = {("RSA", None): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}


@dataclass(frozen=True, slots=True)
class VerificationKey:
    algorithm: str
    key: Any

    def verifies(self, signed: bytes, signature: bytes) -> bool:
        ok: bool = jwt.get_algorithm_by_name(self.algorithm).verify(signed, self.key, signature)
        return ok


def published(body: bytes) -> list[dict[str, Any]]:
    """The keys of a key set as an issuer sends it. Raises `ValueError`."""
    document = msgspec.json.decode(body)
    found = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(found, list) or len(found) > MAX_KEYS:
        raise ValueError("not a JSON Web Key Set")
    return [jwk for jwk in found if isinstance(jwk, dict)]


def usable_keys(published: list[dict[str, Any]]) -> dict[str | None, VerificationKey]:
    """The keys we can and may use; of two with one id the first, so a later one cannot displace it."""
    keys: dict[str | None, VerificationKey] = {}
    for jwk in published:
        kid = jwk.get("kid")
        if (kid is None or isinstance(kid, str)) and kid not in keys and (key := verification_key(jwk)):
            keys[kid] = key
    return keys


def verification_key(jwk: dict[str, Any]) -> VerificationKey | None:
    """None for a key that is not for us: symmetric, private, weak, of another curve, or not for signatures."""
    kty = jwk.get("kty")
    crv = None if kty == "RSA" else jwk.get("crv")
    try:
        algorithm = _ALGORITHMS.get((kty, crv))  # type: ignore[arg-type]
    except TypeError:  # an unhashable value where a string belongs
        return None
    if algorithm is None or "d" in jwk or jwk.get("alg", algorithm) != algorithm:
        return None
    operations = jwk.get("key_ops", ["verify"])
    if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    try:
        key = jwt.get_algorithm_by_name(algorithm).from_jwk(jwk)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, UnsupportedAlgorithm):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return None
    return VerificationKey(algorithm, key)
