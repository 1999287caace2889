"""The image's bill of materials, made as the Dockerfile makes it but without an engine: the same tool, the same words,
over the environment of these tests, which holds what the image does (`tests/test_container.py`) and more."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.test_container import closure, image_requirements, said

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{name: version} of what the tool finds, from the lines of the Dockerfile's stage."""
    directory: Path = tmp_path_factory.mktemp("sbom")
    install, make = (part.strip() for part in said("sbom-build", "RUN")[0].split("&&"))
    [wanted] = re.findall(r"cyclonedx-bom==[\d.]+", install)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory / "tool")], check=True, timeout=120)
    programs = directory / "tool" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "--disable-pip-version-check", "-q"]
    pip += ["install", "--no-compile", wanted]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.skip(f"nothing was listed: {wanted} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    words = shlex.split(make.replace("/engram.cdx.json", str(directory / "engram.cdx.json")))
    assert words[-1] == "/opt/engram/bin/python"
    words[-1] = sys.executable
    subprocess.run([str(programs / words[0]), *words[1:]], check=True, timeout=300)
    listed = json.loads((directory / "engram.cdx.json").read_text())
    assert listed["bomFormat"] == "CycloneDX" and "serialNumber" not in listed, "the same each time"
    return {re.sub(r"[-_.]+", "-", c["name"]).lower(): c["version"] for c in listed["components"]}


def test_everything_in_the_image_is_listed_with_its_version(components: dict[str, str]) -> None:
    """Whoever is told of a weakness in a version looks here first."""
    wanted = {name: metadata.version(name) for name in closure(image_requirements())}
    assert len(wanted) > 80
    assert {name: components.get(name) for name in wanted} == wanted
