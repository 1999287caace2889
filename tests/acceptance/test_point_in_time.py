"""Back to a second, as an operator does it: the stack with Litestream on, the command line, HTTP."""

import json
from datetime import UTC, datetime

import pytest

from shared.litestream import Control
from shared.settings import Settings
from tests.acceptance.conftest import Stack
from tests.core_fixtures import wait_until
from tests.litestream_fixtures import sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_an_operator_goes_back_to_the_second_before_the_damage(stack: Stack) -> None:
    """Between two backups is where things go wrong: the plan names its source, the restore takes it, a drill proves it.

    What is asserted is what clients see; Litestream is only asked when it has seen the writes.
    """
    assert next(p for p in stack.status["processes"] if p["name"] == "litestream")["state"] == "running"
    client = stack.tenant("seconds")
    settings = Settings(data_dir=stack.data_dir)

    def write(content: str) -> str:
        answer = client.post("/v1/memories", json={"content": content})
        answer.raise_for_status()
        return str(answer.json()["id"])

    def caught_up() -> str:
        file = stack.data_dir / "tenants" / "seconds" / "engram.db"
        wait_until(lambda: str(file.resolve()) in Control(settings).databases())
        sync(settings, file)
        return datetime.now(UTC).isoformat()

    def contents() -> list[str]:
        return sorted(m["content"] for m in client.get("/v1/memories").json()["memories"])

    write("in the backup")
    backup_id = stack.json("backup", "seconds")[0]["backup_id"]
    dear = write("after the backup")
    at = caught_up()
    client.delete(f"/v1/memories/{dear}").raise_for_status()
    write("damage")
    caught_up()

    plan = stack.json("restore", "seconds", "--at", at, "--dry-run")
    assert plan["source"].startswith("Litestream's copy of generation 1") and plan["source_at"] <= at
    assert (plan["backup_id"], plan["fallback"], plan["writes_lost"]) == (None, f"backup {backup_id}", 1)
    done = stack.json("restore", "seconds", "--at", at)
    assert (done["outcome"], done["backup_id"], done["note"]) == ("restored", None, None)
    assert done["source"] == plan["source"]
    assert contents() == ["after the backup", "in the backup"]

    write("afterwards")
    caught_up()
    tested = json.loads(stack.engram("restore-test", "seconds", "--json").stdout)
    assert (tested["outcome"], [c["outcome"] for c in tested["copies"]]) == ("pass", ["pass"])
    assert tested["copies"][0]["generation"] == 2
