"""Follow a run that the command line started, to its last word.

Prefect says how the run's process ended; what it did to a tenant stands in the run's own row in the control plane
(`restores`, `moves`). The row is believed: a process may be killed after its swap, and then the sweep closes its row
as `restored`; and Prefect may be away when the run ends. So a command ends when the row is closed, waits for the sweep
when the run has ended and its row has not, and otherwise says that it is not known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from deployments.cli.output import note
from deployments.prefect_api import NotKnown, PrefectApi, Run
from shared.errors import ControlPlaneUnavailable, Transient
from shared.settings import Settings

Row = TypeVar("Row")
RUN_SECONDS = 3600.0
# For the sweep, after the lease of a dead run: the drain's within seconds, else the flow's of every minute.
SWEEP_SECONDS = 90.0
_POLL_SECONDS = 0.5


class NotSettled(Transient):
    """The run has ended, its row has not: what is active now is not known."""


@dataclass(frozen=True, slots=True)
class Following(Generic[Row]):
    """`read` finds a run's row by the run's id, None when it has none yet; `look`: a command that shows the tenant."""

    api: PrefectApi
    settings: Settings
    read: Callable[[str], Row | None]
    is_closed: Callable[[Row], bool]
    look: str

    def start(self, deployment: str, parameters: dict[str, Any], machine_id: str) -> Run:
        try:
            return self.api.start(deployment, parameters, machine_id=machine_id, say=note)
        except NotKnown as e:
            raise self._with_look(e) from e

    def end(self, run: Run) -> tuple[Run, Row | None]:
        """The run as Prefect knows it last, and its row, which is closed; None when it did nothing that wants one.

        Raises `NotPickedUp`, `Transient` when it takes too long, `NotKnown` or `NotSettled`.
        """
        from rich.console import Console

        seen = run
        with Console(stderr=True).status("waiting for a worker") as status:
            try:
                for seen in self.api.follow(
                    run,
                    pick_up_seconds=self.settings.prefect_pick_up_seconds,
                    run_seconds=RUN_SECONDS,
                    say=note,
                    over=lambda: self._closed(run),
                ):
                    status.update(f"{seen.name}: {seen.state.lower()}")
            except NotKnown as e:
                raise self._with_look(e) from e
            row = self._settled(seen)
        self._show_steps(run)
        return seen, row

    def _closed(self, run: Run) -> bool:
        try:
            row = self.read(run.id)
        except ControlPlaneUnavailable:  # it may be the same PostgreSQL
            return False
        return row is not None and self.is_closed(row)

    def _settled(self, seen: Run) -> Row | None:
        deadline = time.monotonic() + self.settings.lease_seconds + SWEEP_SECONDS
        told = False
        while True:
            cause = "its row is still open"
            try:
                row = self.read(seen.id)
                if row is None or self.is_closed(row):
                    return row
            except ControlPlaneUnavailable as e:
                cause = str(e)
            ended = f"{seen.name} {'ended' if seen.ended else 'was'} {seen.state.lower()}"
            ended += f" ({seen.message})" if seen.message else ""
            if time.monotonic() > deadline:
                raise NotSettled(f"{ended}; what it did is not settled: {cause}; {self.look}")
            if not told:
                note(f"{ended}; {cause}; waiting until it is settled")
            told = True
            time.sleep(_POLL_SECONDS)

    def _show_steps(self, run: Run) -> None:
        try:
            for name, state in self.api.steps(run.id):
                note(f"  {name}: {state.lower()}")
        except Transient as e:
            note(f"its steps are not shown: {e}")

    def _with_look(self, error: NotKnown) -> NotKnown:
        return NotKnown(f"{error}; {self.look}")


def look_at(tenant_id: str) -> str:
    return f"`engram diagnose tenant-db {tenant_id}` says whether the tenant is held"
