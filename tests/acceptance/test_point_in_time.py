"""Back to a second, as an operator does it: `engram litestream` beside a whole stack, the command line, HTTP."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from shared import litestream
from shared.litestream import Control
from shared.settings import Settings
from tests.acceptance.conftest import Stack
from tests.acceptance.slow_restore import Beside
from tests.core_fixtures import wait_until
from tests.litestream_fixtures import sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def layered(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """The stack with the layer on, as a machine of its own would run the part: one more process."""
    monkeypatch.setenv("ENGRAM_POINT_IN_TIME", "litestream")
    on = replace(stack, environment=stack.environment | {"ENGRAM_POINT_IN_TIME": "litestream"})
    process = subprocess.Popen([sys.executable, "-m", "deployments.cli", "litestream"], env=on.environment)
    try:
        wait_until(lambda: litestream.answers(Settings(data_dir=stack.data_dir)), 60)
        yield on
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_an_operator_goes_back_to_the_second_before_the_damage(layered: Stack) -> None:
    """Between two backups is where things go wrong: the plan names its source, the restore takes it, a drill proves it.

    What is asserted is what clients see; Litestream is only asked when it has seen the writes.
    """
    client, settings = layered.tenant("seconds"), Settings(data_dir=layered.data_dir)

    def write(content: str) -> str:
        answer = client.post("/v1/memories", json={"content": content})
        answer.raise_for_status()
        return str(answer.json()["id"])

    def caught_up() -> str:
        file = layered.data_dir / "tenants" / "seconds" / "engram.db"
        wait_until(lambda: str(file.resolve()) in Control(settings).databases())
        sync(settings, file)
        return datetime.now(UTC).isoformat()

    def contents() -> list[str]:
        return sorted(m["content"] for m in client.get("/v1/memories").json()["memories"])

    with closing(Beside(layered)) as beside:
        write("in the backup")
        [made] = beside.run("backup", "seconds")["result"]
        dear = write("after the backup")
        at = caught_up()
        client.delete(f"/v1/memories/{dear}").raise_for_status()
        write("damage")
        caught_up()

        plan = layered.json("restore", "seconds", "--at", at, "--dry-run")
        assert plan["source"].startswith("Litestream's copy of generation 1") and plan["source_at"] <= at
        assert (plan["backup_id"], plan["fallback"], plan["writes_lost"]) == (None, f"backup {made['backup_id']}", 1)
        done = beside.run("restore", "seconds", at=at)
        assert done["state"] == "COMPLETED", done["message"]
        assert (done["result"]["outcome"], done["result"]["backup_id"]) == ("restored", None)
    assert contents() == ["after the backup", "in the backup"]
    [(source, note)] = layered.rows("SELECT source, note FROM restores WHERE tenant_id = 'seconds'")
    assert (source, note) == (plan["source"], None)

    write("afterwards")
    caught_up()
    tested = layered.json("restore-test", "seconds")
    assert (tested["outcome"], [c["outcome"] for c in tested["copies"]]) == ("pass", ["pass"])
    assert tested["copies"][0]["generation"] == 2
