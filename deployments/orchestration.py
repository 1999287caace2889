"""Prefect as this stack runs it: the environment of its server, workers and clients, pool, queues, deployments.

`prefect.yaml` is the one source of deployments. Its `pull: []` and module entrypoints make a process worker
import the flow from the installed project: nothing is cloned or copied.

`python -m deployments.orchestration POOL` makes the work pool, applies `prefect.yaml` and the automation that starts
diagnoses, then exits: a process of its own, so that the supervisor never carries Prefect's 100 MB.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import runpy
import ssl
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared import queues
from shared.settings import Settings

# Flow runs send heartbeats this often; an automation that watches them needs a window of at least three.
_HEARTBEAT_SECONDS = 30
# How soon a worker sees a run that was just asked for. Idle, server and worker together take 3% of a core.
_WORKER_QUERY_SECONDS = 2
_HTTP_TIMEOUT_SECONDS = 5.0
_DAY_SECONDS = 86_400
_CSRF = "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED"
# Prefect reads its authorities anew for each of its many clients, also where no TLS is spoken: 17 ms each, a third of
# applying the deployments and an eighth of a flow run. This file has one, whose key was thrown away.
NO_AUTHORITIES = Path(__file__).with_name("no_authorities.pem")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback


def client_environment(settings: Settings) -> dict[str, str]:
    """For every process that talks to the Prefect API: worker, flow runs, drain, command line."""
    home = settings.data_dir / "prefect"
    auth = settings.prefect_api_auth_string.get_secret_value()
    plain = settings.prefect_api_url.startswith("http://")
    return {
        "PREFECT_API_URL": settings.prefect_api_url,
        **({"PREFECT_API_AUTH_STRING": auth} if auth else {}),
        **({"PREFECT_API_SSL_CERT_FILE": str(NO_AUTHORITIES)} if plain else {}),
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": str(_WORKER_QUERY_SECONDS),
        # No server of ours wants the token that each client would ask for; whoever's does says so.
        _CSRF: os.environ.get(_CSRF, "false"),
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
        # Every five seconds, else: a tenth of what an idle server takes, for runs that pause, which none of ours does,
        # clean-ups that died, and automations on what did not happen, of which there are none.
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "60",
        "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_LOOP_SECONDS": "60",
        "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1M",
        # Without these two, runs are kept for ever. An hourly pass deletes them with all that hangs on them; events are
        # kept 7 days by Prefect's own default.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(settings.prefect_retention_days * _DAY_SECONDS),
    }
    if auth := settings.prefect_api_auth_string.get_secret_value():
        environment["PREFECT_SERVER_API_AUTH_STRING"] = auth
    if database_url:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url.replace(
            "postgresql://", "postgresql+asyncpg://", 1
        )
    return environment


def server_argv(port: int) -> list[str]:
    words = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    return [sys.executable, "-m", "deployments.prefect_command", *words]


def worker_argv() -> list[str]:
    return [sys.executable, "-m", "deployments.worker"]


def deploy_argv(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "deployments.orchestration", settings.prefect_work_pool]


def ensure_queues(settings: Settings) -> bool:
    """Make this machine's work queues, where the runs of its tenants go; whether they are there."""
    machine_id, url = settings.machine_id, f"{_pool_url(settings)}/queues"
    described = f"Runs that need the volume of machine {machine_id}"
    wanted = (
        {"name": machine_id, "description": described},
        # Before the shared one: its places are taken by what only this machine can do.
        {"name": queues.urgent(machine_id), "description": f"{described} and wait for nothing else", "priority": 1},
    )
    return all(
        _post(settings, url, queue) is not None or _get(settings, f"{url}/{quote(str(queue['name']), safe='')}")
        for queue in wanted
    )


def worker_online(settings: Settings, since: float) -> bool:
    """Whether both of this machine's workers sent a heartbeat since `since` (their predecessors' may be younger)."""
    online = {
        worker["name"]
        for worker in _post(settings, f"{_pool_url(settings)}/workers/filter") or []
        if worker["status"] == "ONLINE" and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= since
    }
    return online >= set(queues.worker_names(settings))


def basic_auth(settings: Settings) -> dict[str, str]:
    """The header of a request to the Prefect API; none where nobody is asked."""
    auth = settings.prefect_api_auth_string.get_secret_value()
    return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"} if auth else {}


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


def _pool_url(settings: Settings) -> str:
    return f"{settings.prefect_api_url.rstrip('/')}/work_pools/{settings.prefect_work_pool}"


def _post(settings: Settings, url: str, body: Mapping[str, Any] | None = None) -> Any:
    """What is answered; None when that is an error."""
    return _answer(settings, url, json.dumps(body or {}).encode())


def _get(settings: Settings, url: str) -> bool:
    return _answer(settings, url, None) is not None


def _answer(settings: Settings, url: str, data: bytes | None) -> Any:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **basic_auth(settings)})
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
        # What is there is left as it is: limits and priorities may have been changed in the UI.
        with suppress(ObjectAlreadyExists):
            await client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        for priority, queue in enumerate((queues.SHARED_URGENT, queues.UPKEEP), 1):
            with suppress(ObjectAlreadyExists):
                await client.create_work_queue(name=queue, work_pool_name=name, priority=priority)


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
