"""Whether this machine's gateway answers, for a container's health check: `python -m deployments.healthcheck`.

Only that: a machine whose database is away is not better after a restart. What it may serve is `/ready`.
"""

from __future__ import annotations

import sys

from deployments.orchestration import http_ok
from shared.settings import Settings


def main() -> int:
    return 0 if http_ok(f"{Settings().gateway_url}/health", own=True) else 1


if __name__ == "__main__":
    sys.exit(main())
