"""An environment for staging or prod with nothing unsafe in it, as variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

SAFE: Mapping[str, str] = {
    "ENGRAM_CONTROL_PLANE_URL": "postgresql://engram:pw@ep-branch.neon.test/engram?sslmode=verify-full",
    "ENGRAM_OBJECT_STORE_URL": "s3://engram-backups/main",
    "ENGRAM_S3_ENDPOINT": "https://account.r2.test",
    "ENGRAM_S3_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "ENGRAM_S3_SECRET_ACCESS_KEY": "secret",
    "ENGRAM_JWT_ISSUER": "https://issuer.test",
    "ENGRAM_JWKS_URL": "https://issuer.test/jwks.json",
    "PREFECT_API_URL": "http://prefect.internal:4200/api",
    "ENGRAM_TRUSTED_PROXIES": "172.16.0.0/12",
    "ENGRAM_MACHINE_ID": "m1",
    "ENGRAM_PROMETHEUS_URL": "http://prometheus.internal:9090",
}


def bare() -> dict[str, str]:
    """This process's environment without any setting."""
    return {k: v for k, v in os.environ.items() if not k.upper().startswith(("ENGRAM_", "PREFECT_", "PROMETHEUS_"))}
