"""Whether this machine's gateway answers, for a container's health check: `python -m deployments.healthcheck`.

Only that: a machine whose database is away is not better after a restart. What it may serve is `/ready`.
"""

from __future__ import annotations

import sys

from deployments.orchestration import http_ok
from deployments.running import gateway_address
from shared.settings import Settings


def main() -> int:
    settings = Settings()
    url = gateway_address(settings.gateway_host, settings.gateway_port, tls=bool(settings.tls_certificate))
    return 0 if http_ok(f"{url}/health", own=True) else 1


if __name__ == "__main__":
    sys.exit(main())
