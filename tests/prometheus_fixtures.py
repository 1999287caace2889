"""A real Prometheus for tests, with the rules of `deployments/prometheus/rules`, and a past written into it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import httpx
import pytest
import yaml

from tests.core_fixtures import ROOT
from tests.gateway_stack import eventually
from tests.ports import free_ports

RULES = sorted((ROOT / "deployments" / "prometheus" / "rules").glob("*.yml"))


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"no {name} on this machine (Debian: apt-get install prometheus)")
    return found


@contextlib.contextmanager
def prometheus(directory: Path, *, scrape: Sequence[str] = (), rules: bool = True) -> Iterator[str]:
    """The address of a started server over `directory`; it scrapes these `host:port` and evaluates every second."""
    [port] = free_ports(1)
    directory.mkdir(parents=True, exist_ok=True)
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in _hurried(directory)] if rules else [],
        "scrape_configs": [{"job_name": "engram-gateway", "static_configs": [{"targets": list(scrape)}]}],
    }
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{port}"
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                "--storage.tsdb.retention.time=60d",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        eventually(lambda: httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200, 120)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _hurried(directory: Path) -> list[Path]:
    """The rules, all of them evaluated as often as the server says, not once a minute."""
    written = []
    for path in RULES:
        document = yaml.load(path.read_text(), yaml.CSafeLoader)
        for group in document["groups"]:
            group.pop("interval", None)
        written.append(directory / path.name)
        written[-1].write_text(yaml.safe_dump(document))
    return written


def write_past(directory: Path, series: Mapping[str, Sequence[tuple[datetime, float]]]) -> None:
    """Put samples into the storage of a Prometheus that is then started over `directory`, by `name{labels}`."""
    file = directory / "past.txt"
    directory.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for name in sorted({full.partition("{")[0] for full in series}):
            out.write(f"# TYPE {name} gauge\n")
            for full, samples in series.items():
                if full.partition("{")[0] == name:
                    out.writelines(f"{full} {value!r} {at.timestamp():.3f}\n" for at, value in samples)
        out.write("# EOF\n")
    subprocess.run(
        [
            *(program("promtool"), "tsdb", "create-blocks-from", "openmetrics", "-q"),
            *("--max-block-duration=2000h", str(file), str(directory / "data")),  # one block instead of hundreds
        ],
        check=True,
        capture_output=True,
    )
