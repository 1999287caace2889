"""Dependencies with a known vulnerability fail the checks: pip-audit asks https://osv.dev for every pinned version.

Where that service cannot be reached nothing is audited, and the skipped test says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deployments.__main__ import CONSTRAINTS
from tests.http_fixtures import Handler, Server

UNREACHABLE = ("NameResolutionError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError")
_VULNERABLE = "pyjwt"


def audit(*more: str) -> subprocess.CompletedProcess[str]:
    """Of every version in the constraints file. `--strict`: what cannot be asked about is a failure."""
    flags = ("--strict", "--no-deps", "--disable-pip", "--progress-spinner=off", "--vulnerability-service=osv")
    command = [sys.executable, "-m", "pip_audit", *flags, *more, f"--requirement={CONSTRAINTS}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


class _Service(Handler):
    """Answers as api.osv.dev does: nothing is known, but of one package."""

    asked: list[str]

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        self.asked.append(name)
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9999.0"}]}]
        affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": ranges}]
        found = {"vulns": [{"id": "PYSEC-0000-1", "summary": "made up", "affected": affected}]}
        body = json.dumps(found if name == _VULNERABLE else {}).encode()
        self.reply(200, body, [("Content-Type", "application/json")])


@pytest.fixture
def service() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the packages it was asked about."""
    asked: list[str] = []
    with Server(type("Service", (_Service,), {"asked": asked})) as server:
        yield f"{server.url}/v1/query", asked


def test_a_known_vulnerability_of_one_pinned_version_fails_the_audit(service: tuple[str, list[str]]) -> None:
    """So that the next test's silence means something: every version is asked about, and one answer is enough."""
    url, asked = service
    found = audit(f"--osv-url={url}")
    assert found.returncode == 1, found.stderr[-2000:]
    assert _VULNERABLE in found.stdout and "PYSEC-0000-1" in found.stdout
    assert len(asked) > 100 and {"prefect", "litestar", "granian", "psycopg"} <= set(asked)


def test_no_pinned_version_has_a_known_vulnerability() -> None:
    """What the image, the stack and the tests are built of."""
    found = audit()
    if found.returncode != 0 and any(name in found.stderr for name in UNREACHABLE):
        pytest.skip(f"nothing was audited: {found.stderr.strip().splitlines()[-1][:200]}")
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
