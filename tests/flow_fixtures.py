"""One Prefect server for the tests that run flows in their own process: it takes ten seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_API_SSL_CERT_FILE, temporary_settings

from deployments.orchestration import NO_AUTHORITIES


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """With the setting that our own clients have too."""
    from prefect.testing.utilities import prefect_test_harness  # imports the whole server

    with (
        temporary_settings({PREFECT_API_SSL_CERT_FILE: str(NO_AUTHORITIES)}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield
