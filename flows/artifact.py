"""What an operator reads after a run: one markdown artifact, with the same shape everywhere.

Title, one sentence that says what happened, then a table of facts. Artifact keys allow only a–z, 0–9 and dashes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run


def key(*parts: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", "-".join(parts).lower()).strip("-")


def flow_run_id() -> str | None:
    """The current flow run's id; None outside of one."""
    return flow_run.get_id()


def rename_run(name: str) -> None:
    """Give the current run a name once its tenant is known: run names carry the tenant."""
    if run_id := flow_run.get_id():
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run_id), name=name)


class Progress:
    """A progress bar in the run's artifacts, moved at most every ten percent. Without a server there is none."""

    def __init__(self, key_: str, description: str) -> None:
        self._id: UUID | None = None
        self._shown = 0
        with suppress(httpx.HTTPError, PrefectException):
            self._id = cast(UUID, create_progress_artifact(0.0, key=key_, description=description))

    def show(self, done: int, total: int) -> None:
        self.move(done, total)

    def move(self, done: int, total: int) -> bool:
        """`show`, and whether the bar moved."""
        percent = min(100, 100 * done // max(1, total))
        if percent < self._shown + 10 and not percent == 100 > self._shown:
            return False
        self._shown = percent
        if self._id is not None:
            with suppress(httpx.HTTPError, PrefectException):
                update_progress_artifact(self._id, float(percent))
        return True


def report(key_: str, title: str, sentence: str, facts: Mapping[str, Any], *tables: str) -> None:
    """Write the artifact of the current run. A Prefect server that is away costs the report, never the run."""
    lines = [f"# {title}", "", sentence, ""]
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in facts.items()), ""]
    for table_ in tables:
        lines += [table_, ""]
    with _logged():
        create_markdown_artifact("\n".join(lines), key=key_, description=sentence)


def rows(key_: str, description: str, found: list[dict[str, Any]]) -> None:
    """A table artifact, which the UI can sort."""
    with _logged():
        create_table_artifact(found, key=key_, description=description)


@contextmanager
def _logged() -> Iterator[None]:
    """The work is done and recorded; the report is not the work."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as e:
        get_run_logger().error("the report could not be written: %s", e)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as table text: units are in the column's name, times in UTC to the second."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S UTC")
    return str(value).replace("|", "\\|").replace("\n", " ")
