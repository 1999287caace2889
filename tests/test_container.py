"""The image, held to the code. No container engine runs here: what the Dockerfile does is done without one, and
everything it names must exist."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from deployments import healthcheck, monitoring
from shared import environment
from shared.settings import Settings
from tests.environment_fixtures import SAFE, bare
from tests.test_help import commands

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deployments" / "Dockerfile"
NOBODY = 65534


def beside_python(program: str) -> str:
    return str(Path(sys.executable).with_name(program))


def instructions(stage: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of one stage, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]
    starts = [i for i, (name, _) in enumerate(lines) if name == "FROM"] + [len(lines)]
    stages = {lines[a][1].rpartition(" AS ")[2]: lines[a:b] for a, b in itertools.pairwise(starts)}
    return stages[stage]


def every(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} (.+)$", DOCKERFILE.read_text(), re.MULTILINE)


def said(stage: str, instruction: str) -> list[str]:
    return [arguments for name, arguments in instructions(stage) if name == instruction]


def test_hadolint_has_nothing_to_say() -> None:
    """Rules somebody else wrote down, among them exec form, pinned tags, no cache left behind."""
    done = subprocess.run([beside_python("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_engram_as_nobody_special_on_a_volume() -> None:
    """Whoever breaks out of a process must not be root, and data must not be in a layer."""
    assert said("engram", "USER") == ["10001:10001"]
    assert json.loads(said("engram", "ENTRYPOINT")[0]) == ["engram"]
    assert json.loads(said("engram", "CMD")[0])[0] in commands()
    assert said("engram", "VOLUME") == said("engram", "WORKDIR") == [str(Settings(env="prod").data_dir)]
    assert said("engram", "EXPOSE") == [str(Settings.model_fields["gateway_port"].default)]
    assert f'"-m", "{healthcheck.__name__}"' in said("engram", "HEALTHCHECK")[0]
    assert "ENGRAM_ENV=prod" in said("engram", "ENV")[0], "an image that is started bare refuses what is unsafe"


def test_the_image_that_watches_has_the_programs_that_the_code_starts_and_compose_tries() -> None:
    """One that is missing is noticed at the start; one of another version, by a setting it does not know."""
    stages = {line.rpartition(" AS ")[2]: line.partition(" AS ")[0] for line in every("FROM")}
    compose = yaml.load((ROOT / "deployments" / "compose.yaml").read_text(), yaml.CSafeLoader)
    told = {name: s["image"] for name, s in compose["services"].items() if s["image"].startswith("prom/")}
    assert {name: stages[name] for name in told} == told
    copied = {part: line.split()[1:-1] for line in said("monitoring", "COPY") if (part := line.split()[0][7:])}
    assert copied.keys() == told.keys()
    brought = {path.rpartition("/")[2] for paths in copied.values() for path in paths}
    assert {maker for _, maker, _ in monitoring._PROGRAMS.values()} <= brought
    assert {line.split()[-1] for line in said("monitoring", "COPY")} == {"/usr/local/bin/"}
    assert json.loads(said("monitoring", "CMD")[0]) == ["monitor"] and "monitor" in commands()
    assert said("monitoring", "EXPOSE") == [str(Settings.model_fields["prometheus_port"].default)]
    assert said("monitoring", "FROM") == ["engram AS monitoring"] and not said("monitoring", "USER"), "as nobody, too"
    assert every("FROM")[-1] == "engram AS default", "what is built when no target is named"


def test_what_the_dockerfile_copies_is_in_the_repository_and_sent_to_the_builder() -> None:
    """A file that is there only on its author's machine breaks the build of everybody else."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    sent = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in said("build", "COPY") for source in line.split()[:-1]]
    assert {source.split("/")[0] for source in copied} == set(sent)
    for source in copied:
        assert source in tracked or any(path.startswith(f"{source}/") for path in tracked), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*packages["packages"], *packages["force-include"]} <= set(copied)


def test_no_registry_is_recorded() -> None:
    """Where packages come from is the builder's own business, and may be a mirror."""
    for path in (DOCKERFILE, ROOT / "deployments" / "constraints.txt"):
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", path.read_text()), path.name


def test_every_dependency_of_the_image_is_pinned_to_what_was_tested() -> None:
    """pip takes what the constraints say, and the rest from wherever it is today: there must be no rest."""
    pins = dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", constraints(), re.MULTILINE))
    found = {name: metadata.version(name) for name in closure(image_requirements())}
    assert len(found) > 80
    assert {name: pins.get(name) for name in found} == found
    assert f'"hatchling=={pins["hatchling"]}"' in said("build", "RUN")[0], "the builder's version as well"


def constraints() -> str:
    return (ROOT / "deployments" / "constraints.txt").read_text()


def image_requirements() -> list[str]:
    """What the Dockerfile hands to pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["litestream"], *extras["redis"]]


def closure(requirements: list[str]) -> set[str]:
    """Every distribution that installing these brings here, by normal name."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(line, frozenset[str]()) for line in requirements]
    while todo:
        line, extras = todo.pop()
        needed = Requirement(line)
        if needed.marker is not None and not any(needed.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        found = (re.sub(r"[-_.]+", "-", needed.name).lower(), frozenset(needed.extras))
        if found not in seen:
            seen.add(found)
            todo += [(line, found[1]) for line in metadata.requires(found[0]) or []]
    return {name for name, _ in seen}


# The build, without an engine


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image's /opt/engram: the wheel of the committed tree in a virtual environment, without the checkout.

    The dependencies are those the tests run with (pinned, as the test above says), so that nothing is downloaded.
    """
    base = tmp_path_factory.mktemp("image")
    archive = base / "source.tar"
    subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True, timeout=60)
    with tarfile.open(archive) as tar:
        tar.extractall(base / "source", filter="data")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = str(base / "wheels")
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, str(base / "source")],
        check=True,
        timeout=200,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base / "opt")], check=True, timeout=60)
    inside = base / "opt" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    wheel = next((base / "wheels").glob("*.whl"))
    subprocess.run(
        [*pip, "--python", str(base / "opt" / "bin" / "python"), "install", "--no-deps", str(wheel)],
        check=True,
        timeout=100,
    )
    # A directory named in a .pth is searched last, and its own .pth files (the checkout's) are not read.
    (inside / "dependencies.pth").write_text(str(Path(pytest.__file__).parent.parent))
    yield base / "opt" / "bin"


def run_in(built: Path, data_dir: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As the image runs it: not as root, in that directory, with nothing of this process's settings."""
    as_nobody: list[str] = []
    if os.getuid() == 0:
        os.chown(data_dir, NOBODY, NOBODY)
        as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
        # The interpreter may lie in root's home; writing is what another user must do without.
        as_nobody += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    return subprocess.run(
        [*as_nobody, str(built / argv[0]), *argv[1:]],
        cwd=data_dir,
        env={k: v for k, v in bare().items() if k != "PYTHONPATH"}
        | {"HOME": str(data_dir), "ENGRAM_ENV": "prod", "PYTHONDONTWRITEBYTECODE": "1"}
        | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The volume."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_the_built_environment_has_the_whole_product_and_not_the_checkout(built: Path, data_dir: Path) -> None:
    """A file that hatch leaves out is missing in production only."""
    code = "import flows, gateway, shared, deployments as d\nfor m in (flows, gateway, shared, d): print(m.__file__)"
    files = run_in(built, data_dir, "python", "-c", code).stdout.split()
    assert len(files) == 4 and all(file.startswith(str(built.parent)) for file in files)
    installed = Path(files[-1]).parent
    for name in ("prefect.yaml", "environments/prod.env", "prometheus/prometheus.yml", "runbooks"):
        assert (installed / name).exists(), name
    assert (installed.parent / "shared" / "sql" / "queries.sql").exists()


def test_a_bare_container_says_what_it_needs_and_one_that_has_it_may_start(built: Path, data_dir: Path) -> None:
    """The default command in the default environment, as another user on an empty volume."""
    assert run_in(built, data_dir, "engram", "--help").returncode == 0
    bare_start = run_in(built, data_dir, "engram", *json.loads(said("engram", "CMD")[0]))
    assert (bare_start.returncode, bare_start.stderr.count("\n")) == (3, 1)
    assert "ENGRAM_CONTROL_PLANE_URL is not set" in bare_start.stderr
    safe = run_in(built, data_dir, "engram", "config", "check", **SAFE)
    assert (safe.returncode, safe.stdout, safe.stderr) == (0, "prod: nothing to object to\n", "")


def test_the_built_environment_migrates_a_control_plane(built: Path, data_dir: Path, new_database_url: str) -> None:
    """The release command; its SQL files must have been packed."""
    done = run_in(
        built, data_dir, "engram", "migrate", "--json", ENGRAM_ENV="dev", ENGRAM_CONTROL_PLANE_URL=new_database_url
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["control_plane"]) == len(list((ROOT / "shared/sql/schema").glob("*.sql")))


@pytest.fixture
def new_database_url(postgres: Any) -> str:
    import psycopg

    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE image")
    return str(postgres.url("image"))


# The health check


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_the_health_check_is_the_gateways_answer(monkeypatch: pytest.MonkeyPatch, status: int, exit_code: int) -> None:
    """An engine knows nothing but this exit code."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("ENGRAM_GATEWAY_HOST", "0.0.0.0")
        monkeypatch.setenv("ENGRAM_GATEWAY_PORT", str(server.server_port))
        assert healthcheck.main() == exit_code
        server.shutdown()
    assert healthcheck.main() == 1, "nobody listens any more"


def test_the_image_is_built_with_the_environments() -> None:
    """prod.env decides what the image does when nothing is said."""
    assert all(environment.value_file(env).is_file() for env in environment.ENVIRONMENTS)
