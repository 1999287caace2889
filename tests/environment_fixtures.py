"""An environment for staging or prod with nothing unsafe in it, as variables, and the command line within it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import pytest
from pydantic import SecretStr

from deployments import cli
from shared.settings import Settings

# Each part of a Prefect server that keeps something in Redis has a setting of its own for where that is.
REDIS_URLS = ("PREFECT_REDIS_MESSAGING_URL", "PREFECT_SERVER_DOCKET_URL", "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL")
SAFE: Mapping[str, str] = {
    "ENGRAM_CONTROL_PLANE_URL": "postgresql://engram:pw@ep-branch.neon.test/engram?sslmode=verify-full",
    "ENGRAM_OBJECT_STORE_URL": "s3://engram-backups/main",
    "ENGRAM_S3_ENDPOINT": "https://account.r2.test",
    "ENGRAM_S3_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "ENGRAM_S3_SECRET_ACCESS_KEY": "secret",
    "ENGRAM_JWT_ISSUER": "https://issuer.test",
    "ENGRAM_JWKS_URL": "https://issuer.test/jwks.json",
    "PREFECT_API_URL": "http://prefect.internal:4200/api",
    "PREFECT_API_AUTH_STRING": "engram:a-long-password",
    "ENGRAM_TRUSTED_PROXIES": "172.16.0.0/12",
    "ENGRAM_MACHINE_ID": "m1",
    "ENGRAM_PROMETHEUS_URL": "http://prometheus.internal:9090",
}


SECRET = {name for name, field in Settings.model_fields.items() if field.annotation is SecretStr}
KEY_IDS = {name for name in Settings.model_fields if name.endswith("access_key_id")}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a file that takes it in: what this process has set counts for nothing."""
    for name in list(os.environ):
        if name.startswith(("ENGRAM_", "PREFECT_API_")):
            monkeypatch.delenv(name)


def bare() -> dict[str, str]:
    """This process's environment without any setting."""
    return {k: v for k, v in os.environ.items() if not k.upper().startswith(("ENGRAM_", "PREFECT_", "PROMETHEUS_"))}


def settings(env: str, **changes: Any) -> Settings:
    """A safe environment with these changes, by field name."""
    given = {name.removeprefix("ENGRAM_").lower(): value for name, value in SAFE.items()}
    return Settings(**{"env": env, **given, **changes})


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def engram(*arguments: str, **variables: str) -> Done:
    """The command as the console script runs it, in this process: it takes a second to start another."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, bare() | variables, clear=True),
        mock.patch.object(sys, "argv", ["engram", *arguments]),
        mock.patch.object(cli, "ends_with"),  # which is for good
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as left,
    ):
        cli.main()
        sys.exit(0)
    return Done(int(left.value.code or 0), stdout.getvalue(), stderr.getvalue())
