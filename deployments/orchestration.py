"""Prefect as this stack runs it: the environment of its server, worker and clients, the pool, the deployments.

`prefect.yaml` is the one source of deployments. Its `pull: []` and module entrypoints make a process worker
import the flow from the installed project: nothing is cloned or copied.

`python -m deployments.orchestration POOL` makes the work pool, applies `prefect.yaml` and the automation that starts
diagnoses, then exits: a process of its own, so that the supervisor never carries Prefect's 100 MB.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import runpy
import ssl
import sys
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.settings import Settings

# Flow runs send heartbeats this often; an automation that watches them needs a window of at least three.
_HEARTBEAT_SECONDS = 30
# How soon a worker sees a run that was just asked for. Idle, server and worker together take 3% of a core.
_WORKER_QUERY_SECONDS = 2
_HTTP_TIMEOUT_SECONDS = 5.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback


def client_environment(settings: Settings) -> dict[str, str]:
    """For every process that talks to the Prefect API: worker, flow runs, drain, command line."""
    home = settings.data_dir / "prefect"
    return {
        "PREFECT_API_URL": settings.prefect_api_url,
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": str(_WORKER_QUERY_SECONDS),
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_LOGGING_COLORS": "false",
        "DO_NOT_TRACK": "1",
    }


def server_environment(settings: Settings, database_url: str) -> dict[str, str]:
    """For the server alone. An empty `database_url` is Prefect's own SQLite file below PREFECT_HOME."""
    environment = client_environment(settings) | {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": settings.prefect_api_url,
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # at / the same UI as behind every link of ours, not the other one
        # Without this, runs are kept for ever (~55 KB each).
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
    }
    if database_url:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url.replace(
            "postgresql://", "postgresql+asyncpg://", 1
        )
    return environment


def server_argv(port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]


def worker_argv(settings: Settings) -> list[str]:
    return [
        *(sys.executable, "-m", "prefect", "worker", "start", "--type", "process"),
        *("--pool", settings.prefect_work_pool, "--name", worker_name(settings)),
        *("--work-queue", settings.machine_id, "--work-queue", "default"),
        *("--limit", str(settings.prefect_worker_limit), "--install-policy", "never"),
    ]


def deploy_argv(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "deployments.orchestration", settings.prefect_work_pool]


def worker_name(settings: Settings) -> str:
    return f"engram-{settings.machine_id}"


def ensure_queue(settings: Settings) -> bool:
    """Make this machine's work queue, where the runs of its tenants go; whether it is there."""
    queues = f"{settings.prefect_api_url.rstrip('/')}/work_pools/{settings.prefect_work_pool}/queues"
    wanted = {"name": settings.machine_id, "description": f"Runs that need the volume of machine {settings.machine_id}"}
    return _post(queues, wanted) is not None or http_ok(f"{queues}/{quote(settings.machine_id, safe='')}")


def worker_online(settings: Settings, since: float) -> bool:
    """Whether this machine's worker has sent a heartbeat since `since` (its predecessor's may be younger)."""
    url = f"{settings.prefect_api_url.rstrip('/')}/work_pools/{settings.prefect_work_pool}/workers/filter"
    for worker in _post(url) or []:
        if worker["name"] == worker_name(settings) and worker["status"] == "ONLINE":
            return bool(datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= since)
    return False


def http_ok(url: str, *, own: bool = False) -> bool:
    """Whether a GET answers 2xx now. `own` is a part on this machine, whose certificate names the public host."""
    opener = _direct
    if own and url.startswith("https:"):
        unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
        )
    try:
        with opener.open(url, timeout=_HTTP_TIMEOUT_SECONDS) as answer:
            return bool(200 <= answer.status < 300)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def prefect_file() -> Path:
    """`prefect.yaml` at the root of a checkout, or the copy packaged with an installed project."""
    here = Path(__file__).resolve().parent
    in_checkout = here.parent / "prefect.yaml"
    return in_checkout if in_checkout.exists() else here / "prefect.yaml"


def _post(url: str, body: Mapping[str, str] | None = None) -> Any:
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _direct.open(request, timeout=_HTTP_TIMEOUT_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError, http.client.HTTPException):
        return None


async def _ensure_pool(name: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    async with get_client() as client:
        try:
            await client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            return  # left as it is: its limits may have been changed in the UI


def main() -> None:
    asyncio.run(_ensure_pool(sys.argv[1]))
    sys.argv = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file())]
    try:
        runpy.run_module("prefect", run_name="__main__", alter_sys=True)
    except SystemExit as e:
        if e.code:
            raise
    from deployments import automation

    asyncio.run(automation.ensure())


if __name__ == "__main__":
    main()
