"""The dev issuer: what it signs, what it publishes, where it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import jwt
import pytest

from deployments import issuer, issuer_server
from shared.errors import Permanent, Refused, UnsafeTenantId
from shared.settings import Settings


@pytest.fixture
def dev(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, jwt_issuer="http://issuer.test", jwt_tenant_claim="org")


@pytest.fixture
def base_url(dev: Settings) -> Iterator[str]:
    issuer.ensure_key(dev.data_dir)
    server = issuer_server.make_server(issuer.issuer_dir(dev.data_dir), 0, dev.jwt_issuer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def verify(token: str, base_url: str) -> dict[str, object]:
    """As a resource server does it: by the published key set alone."""
    key = jwt.PyJWKClient(base_url + issuer_server.JWKS_PATH).get_signing_key_from_jwt(token)
    claims: dict[str, object] = jwt.decode(
        token, key, algorithms=["ES256"], audience="engram", issuer="http://issuer.test"
    )
    return claims


def test_a_token_verifies_against_the_published_key_set_and_carries_every_claim(dev: Settings, base_url: str) -> None:
    """The gateway knows nothing of the issuer but its key set."""
    token, expires_at = issuer.mint(dev, "acme", ["search", "admin"], 60)
    claims = verify(token, base_url)
    assert claims["org"] == "acme"
    assert claims["sub"] == "dev:acme"
    assert claims["scope"] == "search admin"
    assert claims["exp"] == int(expires_at.timestamp()) == int(str(claims["iat"])) + 60
    assert {"iss", "aud", "nbf", "jti"} <= claims.keys()


@pytest.mark.parametrize("env", ["staging", "prod"])
def test_outside_dev_it_refuses_and_makes_no_key(tmp_path: Path, env: str) -> None:
    """A signing key on a production disk would be a skeleton key."""
    settings = Settings(env=env, data_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(Refused):
        issuer.mint(settings, "acme")
    assert not issuer.issuer_dir(tmp_path).exists()


def test_the_private_key_is_readable_by_its_owner_alone_and_never_published(dev: Settings, base_url: str) -> None:
    """`d` in a JWK is the private half."""
    assert os.stat(issuer.issuer_dir(dev.data_dir) / "signing.pem").st_mode & 0o777 == 0o600
    with urllib.request.urlopen(base_url + issuer_server.JWKS_PATH) as answer:
        keys = json.load(answer)["keys"]
        assert "max-age" in answer.headers["Cache-Control"]
    assert [set(key) for key in keys] == [{"kty", "crv", "x", "y", "kid", "use", "alg"}]


def test_kid_is_the_rfc_7638_thumbprint(dev: Settings) -> None:
    """So the same key has the same kid wherever it is computed."""
    jwk = issuer.public_jwk(issuer.ensure_key(dev.data_dir))
    canonical = f'{{"crv":"P-256","kty":"EC","x":"{jwk["x"]}","y":"{jwk["y"]}"}}'
    digest = hashlib.sha256(canonical.encode()).digest()
    assert jwk["kid"] == base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_discovery_names_the_issuer_and_the_key_set(base_url: str) -> None:
    with urllib.request.urlopen(base_url + issuer_server.DISCOVERY_PATH) as answer:
        document = json.load(answer)
    assert document["issuer"] == "http://issuer.test"
    assert document["jwks_uri"] == base_url + issuer_server.JWKS_PATH


def test_other_paths_are_not_found_and_the_signing_key_is_not_one_of_them(base_url: str) -> None:
    """The directory is not a web root."""
    for path in ("/", "/signing.pem", "/.well-known/../signing.pem"):
        with pytest.raises(HTTPError) as e:
            urllib.request.urlopen(base_url + path)
        assert e.value.code == 404


def test_a_key_set_lost_beside_its_key_is_published_again(dev: Settings) -> None:
    """A crash between the two files must not strand the signing key."""
    key = issuer.ensure_key(dev.data_dir)
    (issuer.issuer_dir(dev.data_dir) / "jwks.json").unlink()
    issuer.ensure_key(dev.data_dir)
    published = json.loads((issuer.issuer_dir(dev.data_dir) / "jwks.json").read_text())["keys"]
    assert published == [issuer.public_jwk(key)]


def test_unknown_scopes_and_unsafe_tenants_are_refused(dev: Settings) -> None:
    """A typo in a scope would otherwise show as a puzzling 403."""
    with pytest.raises(Permanent, match="memory:read"):
        issuer.mint(dev, "acme", ["memory:read"])
    with pytest.raises(UnsafeTenantId):
        issuer.mint(dev, "../acme")
