"""Whom a test process trusts far away: nobody it will meet."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import certifi
import pytest

_END = "-----END CERTIFICATE-----\n"


def trust_one(config: pytest.Config) -> None:
    """Every httpx client reads all of certifi's authorities as it is made, over plain HTTP too: 14 ms of CPU, more than
    most of what tests do with one. They reach no host of the internet: one authority is as good as 140."""
    directory = Path(tempfile.mkdtemp(prefix="engram-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    first, end, _ = Path(certifi.where()).read_text().partition(_END)
    bundle = directory / "authority.pem"
    bundle.write_text(first + end)
    certifi.where = lambda: str(bundle)
