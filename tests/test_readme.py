"""A newcomer's day: each command of the README is executed, on the stack that its first lines brought up.

A command of the README is covered by being a line of "First restore", by a rule of `RULES` (what is run for it, what it
answers), by `ELSEWHERE` (the test that runs it) or by `NOT_RUN` (why nobody can here). One that is covered by none
fails, and so does a rule whose command is gone.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from deployments import __main__ as bootstrap
from shared.settings import Settings
from tests.core_fixtures import ROOT
from tests.environment_fixtures import bare
from tests.forked_python import ForkedPython
from tests.test_docs import README
from tests.test_runbooks import FILLED_IN, commands
from tests.test_stack import PARTS, remains

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TEN_MINUTES = 600
PROGRAMS = {"engram", "python", "python3", "docker", "fly", "age", "curl", "prefect"}
PROGRAMS |= {word for word in re.findall(r"`([a-z][\w.-]*) ", README) if shutil.which(word)}
FIRST_RESTORE = commands(README.partition("## First restore\n")[2].partition("\n## ")[0], ())
FOUND = dict.fromkeys(c for c in commands(README, PROGRAMS))
FILLED = FILLED_IN | {"FILE": "events.jsonl", "FILE.jsonl": "conversation.jsonl"}


@dataclass(frozen=True)
class Rule:
    """What is run for a command ("": itself, with what its placeholders stand for) and what it answers (a pattern)."""

    line: str = ""
    says: str = ""
    exits: tuple[int, ...] = (0,)


OLDEST_BACKUP = "import json, sys; print(json.load(sys.stdin)[-1]['backup_id'])"
# A diagnosis of a small machine under tests may find that it is slow.
LOOKS = Rule(says=r"found  ", exits=(0, 1))
RULES = {
    "python3 -m deployments demo": Rule(says=r"\bok\b"),
    "engram status": Rule(says="gateway_url"),
    "engram sweep": Rule(says="traces of dead runs"),
    "engram backups --stale": Rule(says="last good"),
    "engram backups TENANT": Rule(says=r"taken at"),
    "engram restore TENANT --backup ID": Rule(
        f'engram restore acme --dry-run --backup "$(engram backups acme --json | python -c "{OLDEST_BACKUP}")"',
        "source_at",
    ),
    "engram restore TENANT --at TIME": Rule('engram restore acme --at "$(date -u +%FT%TZ)" --dry-run', "source_at"),
    "engram restore-test": Rule(says=r"\bpass\b"),
    "engram restore-test TENANT": Rule(says="acme: pass"),
    "engram reconcile": Rule(says="agree"),
    "engram retention": Rule(says="backups deleted"),
    "engram slo-report": Rule(says="ENGRAM_PROMETHEUS_URL is not set", exits=(1,)),  # never "kept" when not measured
    "engram diagnose": Rule("engram diagnose backups", LOOKS.says, LOOKS.exits),
    "engram diagnose auth": LOOKS,
    "engram diagnose backups": LOOKS,
    "engram diagnose latency": LOOKS,
    "engram diagnose metering": LOOKS,
    "engram diagnose tenant-db": LOOKS,
    "engram diagnose tenant-db TENANT": LOOKS,
    "engram act": Rule("engram act volume-health", r"^result +(healthy|not as it should be)"),
    "engram act NAME": Rule("engram act jwks-status", r"^result +[1-9]\d* keys served"),
    "engram act top": Rule(says=r"^result +\d+ requests in "),
    "engram act history": Rule(says="reason"),
    "engram act restart-workers": Rule("engram act restart-workers --reason why", r"([1-9]\d*) of \1 workers replaced"),
    "engram usage TENANT": Rule(says="complete until"),
    "engram usage-import FILE --reason …": Rule(says=r"events\s+1\b"),
    "engram usage-dry-runs --bill": Rule(says="given back"),
    "engram tenant delete": Rule("engram tenant delete leaver --reason why --yes", "all of it erased"),
    "engram config show": Rule(says="ENGRAM_DATA_DIR"),
    "engram config check": Rule(says="nothing to object to"),
    "engram config diff [A [B]]": Rule("engram config diff; engram config diff staging prod", "ENGRAM_QUOTA_MODE"),
    "engram token": Rule("engram token acme", r"^ey"),
    "engram migrate": Rule(says="up to date"),
    "engram drain": Rule(
        "engram drain 2> drain.log & until grep -q drain_started drain.log; do sleep 0.2; done; kill $!; wait $!;"
        " cat drain.log",
        "drain_stopped",
    ),
    "engram export acme --out acme.jsonl --format jsonl": Rule(
        "engram export acme --out acme.jsonl --format jsonl; head -n 1 acme.jsonl", '"content"'
    ),
    "engram keys new": Rule(says="AGE-SECRET-KEY"),
    "engram keys rotate [TENANT]": Rule("engram keys rotate; engram keys rotate acme", "keys wrapped anew"),
    "age -d -i master.key wrapped > tenant.key": Rule(
        "age -d -i master.key wrapped > tenant.key; cat tenant.key", "^AGE-SECRET-KEY-"
    ),
    "age -d -i tenant.key OBJECT | zstd -d > engram.db": Rule(
        "age -d -i master.key wrapped > own.key; age -d -i own.key OBJECT | zstd -d > engram.db; head -c 15 engram.db",
        "^SQLite format 3",
    ),
    "python -m tests.test_supply_licences": Rule(says="litestar"),
}
# The benchmarks print what they take, all from one interpreter: importing is what takes long.
HELP = """
import contextlib, runpy, sys
for sys.argv in ([*line.split(), "--help"] for line in sys.argv[1:]):
    with contextlib.suppress(SystemExit):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
BENCHMARKS = [c for c in FOUND if c.startswith("python -m tests.bench.")]
ELSEWHERE = {
    "engram up": "tests/test_stack.py",
    "engram up --monitoring": "tests/acceptance/test_alerts_live.py",
    "python3 -m deployments demo --memories FILE.jsonl …": "tests/acceptance/test_demo.py",
    "engram serve": "tests/test_environments.py",
    "engram worker": "tests/acceptance/test_machines.py",
    "engram bridge": "tests/test_bridge.py",
    "engram monitor": "tests/test_monitoring_process.py",
    "engram move TENANT MACHINE": "tests/acceptance/test_machines.py",
    "engram litestream": "tests/acceptance/test_point_in_time.py",
}
NOT_RUN = {
    "python3 -m deployments test": "it runs this test",
    "python3 -m deployments test -m unit": "it would run itself",
    "docker compose -f deployments/compose.yaml up --build --wait": "no container engine; tests/test_compose.py",
    "docker build -f deployments/Dockerfile --target sbom --output type=local,dest=. .": "no container engine",
}


def filled(command: str) -> str:
    """With values for its placeholders."""
    return " ".join(FILLED.get(word, word) for word in command.split())


def journey() -> tuple[str, str]:
    """The lines of "First restore" but its last, and the last: `engram down`."""
    assert FIRST_RESTORE[-1] == "engram down"
    return "\n".join(FIRST_RESTORE[:-1]), FIRST_RESTORE[-1]


@dataclass
class Newcomer:
    """A shell in a checkout, with nothing set and nothing running."""

    checkout: Path
    environment: dict[str, str]
    said: str = ""
    took_seconds: float = 0.0
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def data_dir(self) -> Path:
        return self.checkout / ".engram"

    def run(self, line: str, timeout_seconds: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{line}"],
            cwd=self.checkout,
            env=self.environment | self.variables,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("engram status --json").stdout)
        return found


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """Has done all of "First restore" but its last line. `.venv` is what these tests run in.

    Only where that was made by `python3 -m deployments` does the bootstrap run as it stands; elsewhere it would
    install everything a second time, and `engram` is called as it would.
    """
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("deployments", "tests", "shared", "gateway", "flows", "prefect.yaml", "pyproject.toml"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / ".venv").symlink_to(sys.prefix)
    programs = checkout / "bin"
    programs.mkdir()
    if bootstrap.fingerprint() not in bootstrap.read_markers().values():
        (programs / "python3").write_text(f'#!/bin/sh\n[ "$1 $2" = "-m deployments" ]; shift 2; exec {ENGRAM} "$@"\n')
        (programs / "python3").chmod(0o755)
    # What activation does for one shell, for all those that follow.
    made = Newcomer(checkout, bare() | {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"})
    try:
        lines, _ = journey()
        began = time.monotonic()
        # The port's default gives way when somebody has it; then a newcomer copies the other one.
        up, address, rest = lines.partition("URL=http://127.0.0.1:8080")
        assert address and Settings.model_fields["gateway_port"].default == 8080
        done = made.run(f'{up}URL="$(engram status --json | python -c "{GATEWAY_URL}")"{rest}')
        made.took_seconds = time.monotonic() - began
        assert done.returncode == 0, done.stderr + done.stdout
        made.said = done.stdout + done.stderr
        yield made
    finally:
        made.run("engram down")
        assert remains(made.data_dir) == []


ENGRAM = f"{sys.executable} -m deployments.cli"
GATEWAY_URL = "import json, sys; print(json.load(sys.stdin)['gateway_url'])"


def test_every_command_is_covered_and_every_rule_has_its_command() -> None:
    """A command that is added to the README needs somebody who runs it."""
    lines = {filled(line) for line in FIRST_RESTORE}
    covered = RULES.keys() | ELSEWHERE.keys() | NOT_RUN.keys() | set(BENCHMARKS)
    assert [c for c in FOUND if c not in covered and filled(c) not in lines] == []
    assert sorted((RULES.keys() | ELSEWHERE.keys() | NOT_RUN.keys()) - FOUND.keys()) == []
    assert [command for command, rule in RULES.items() if not rule.says] == []


def test_what_another_test_runs_is_there() -> None:
    """A pointer to a test that no longer does it would be worse than none."""
    for command, file in ELSEWHERE.items():
        words = command.removeprefix("python3 -m deployments ").removeprefix("engram ").split()
        name, *options = [word for word in words if word.islower()]
        started = [line for line in _started(ROOT / file) if line[:1] == [name] and {*options} <= {*line}]
        assert started, (command, file)


def _started(file: Path) -> Iterator[list[str]]:
    """The command lines that a test starts, each without what is no literal: `stack.engram("up", …)`, or a list or
    `arguments` for the module of the command line."""
    for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", "") in ("run", "start", "engram", "json"):
            yield _literals(call.args)
        for given in (*call.args[:1], *(k.value for k in call.keywords if k.arg == "arguments")):
            if isinstance(given, ast.List | ast.Tuple):
                yield [word for word in _literals(given.elts) if word not in ("-m", "deployments.cli")]


def _literals(given: list[ast.expr]) -> list[str]:
    return [node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_cannot_run_here_is_a_line_of_a_shell_about_files_that_exist(command: str) -> None:
    """Little, but a file that moved is noticed."""
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert NOT_RUN[command]
    for word in shlex.split(command):
        assert not word.startswith("deployments/") or (ROOT / word).is_file(), word
    if "--target" in command:
        stage = shlex.split(command)[shlex.split(command).index("--target") + 1]
        assert re.search(rf" AS {stage}$", (ROOT / "deployments" / "Dockerfile").read_text(), re.MULTILINE)


def test_from_nothing_to_a_first_restore_within_ten_minutes(newcomer: Newcomer) -> None:
    """All but the installation is done here, as it stands; what it says of the mistake is true."""
    assert newcomer.took_seconds < TEN_MINUTES
    [found] = re.findall(r'^\{"results":.*\}', newcomer.said, re.MULTILINE)
    assert [hit["memory"]["content"] for hit in json.loads(found)["results"]] == ["worth keeping"], "after the restore"
    token = newcomer.run("engram token acme").stdout.strip()
    answer = httpx.get(
        f"{newcomer.status()['gateway_url']}/v1/memories", headers={"Authorization": f"Bearer {token}"}
    ).json()
    assert {m["content"] for m in answer["memories"]} == {"worth keeping", "a mistake"}, "after its undoing"
    assert "writes were held for" in newcomer.said and "writes_lost" in newcomer.said


def test_up_brought_everything(newcomer: Newcomer) -> None:
    """One command, ready when it returns."""
    found = newcomer.status()
    assert (found["state"], found["environment"]) == ("running", "dev")
    assert [p["name"] for p in found["processes"]] == PARTS
    assert {p["state"] for p in found["processes"]} == {"running"}
    assert all(p["rss_bytes"] > 0 for p in found["processes"])
    assert httpx.get(f"{found['gateway_url']}/ready").status_code == 200
    assert httpx.get(found["prefect_ui_url"]).status_code == 200
    assert httpx.get(found["jwks_url"]).json()["keys"]
    deployments = httpx.post(f"{found['prefect_api_url']}/deployments/filter", json={}).json()
    assert {"backup", "restore", "restore-test", "metering"} <= {d["name"] for d in deployments}
    assert [d["name"] for d in deployments if d["pull_steps"]] == [], "a worker must not pull or copy code"
    second = newcomer.run("engram up")
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1 and "already up" in second.stderr


@pytest.fixture(scope="module")
def answers(newcomer: Newcomer) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Everything else, a few at a time: most of it waits for Prefect. "First restore" was the console script's."""
    late = {"tenant_id": "acme", "route": "/v1/search", "status": 200, "ts": datetime.now(UTC).isoformat()}
    (newcomer.checkout / "events.jsonl").write_text(json.dumps(late) + "\n")
    _encrypted_backup(newcomer)
    assert newcomer.run("engram tenant create leaver").returncode == 0
    with ThreadPoolExecutor(3) as pool, closing(ForkedPython(newcomer.environment, newcomer.checkout)) as python:
        newcomer.variables["PATH"] = f"{python.program.parent}:{newcomer.environment['PATH']}"
        modules = [c.removeprefix("python -m ") for c in BENCHMARKS]
        helps = pool.submit(newcomer.run, shlex.join(["python", "-c", HELP, *modules]))
        ran = {c: pool.submit(newcomer.run, rule.line or filled(c)) for c, rule in RULES.items()}
        yield ran | dict.fromkeys(BENCHMARKS, helps)
        del newcomer.variables["PATH"]


def _encrypted_backup(newcomer: Newcomer) -> None:
    """`master.key`, `wrapped` and `OBJECT` of a tenant's compressed and encrypted backup."""
    (newcomer.checkout / "master.key").write_text(newcomer.run("engram keys new").stdout)
    newcomer.variables["ENGRAM_BACKUP_MASTER_KEY"] = (newcomer.checkout / "master.key").read_text().strip()
    packing = "ENGRAM_BACKUP_COMPRESSION=zstd ENGRAM_BACKUP_ENCRYPTION=age"
    done = newcomer.run(f"{packing} engram backup acme --json")
    assert done.returncode == 0, done.stderr
    [made] = json.loads(done.stdout)
    (newcomer.checkout / "OBJECT").symlink_to(newcomer.data_dir / "objects" / made["key"])
    with psycopg.connect(newcomer.status()["control_plane_url"]) as connection:
        [(wrapped,)] = connection.execute("SELECT wrapped FROM tenant_keys").fetchall()
    (newcomer.checkout / "wrapped").write_bytes(wrapped)


@pytest.mark.parametrize("command", RULES)
def test_a_command_of_the_readme_does_what_it_says(
    answers: dict[str, Future[subprocess.CompletedProcess[str]]], command: str
) -> None:
    """It is copied, not thought about."""
    done, rule = answers[command].result(), RULES[command]
    assert done.returncode in rule.exits, (done.returncode, done.stderr, done.stdout)
    assert re.search(rule.says, done.stdout + done.stderr, re.MULTILINE), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_benchmark_says_what_it_takes(
    answers: dict[str, Future[subprocess.CompletedProcess[str]]], command: str
) -> None:
    """They take minutes; that they still start is seen from their help."""
    done = answers[command].result()
    assert done.returncode == 0, done.stderr
    name = command.split()[2].rpartition(".")[2]
    assert re.search(rf"^usage: .*\b{name}\b", done.stdout, re.MULTILINE)


def test_down_ends_everything(newcomer: Newcomer) -> None:
    """Nothing is left afterwards, and ending what has ended is no mistake."""
    found = newcomer.status()
    down = newcomer.run(journey()[1])
    assert down.returncode == 0, down.stderr
    assert remains(newcomer.data_dir) == []
    for name in ("gateway_url", "prefect_api_url", "jwks_url"):
        with pytest.raises(httpx.TransportError):
            httpx.get(found[name])
    assert newcomer.status()["state"] == "stopped"
    assert newcomer.run(journey()[1]).returncode == 0
