"""What a worker says of itself to whoever acts or diagnoses on this machine (`shared.workers.Report`)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from gateway.busiest import WINDOW_SECONDS, Busiest
from gateway.services import Services
from shared.workers import Announcement, Keys, Report

_DONE_KEPT = 16


class SelfReport:
    """`doing` is for the event loop, `publish` for one thread."""

    def __init__(self, services: Services, busiest: Busiest, announcement: Announcement) -> None:
        self._services = services
        self._busiest = busiest
        self._announcement = announcement
        self._started_at = time.time()
        self._doing: deque[tuple[str, Callable[[], bool]]] = deque(maxlen=_DONE_KEPT)

    def doing(self, entry_id: str, is_done: Callable[[], bool]) -> None:
        """Something that is carried out once has begun."""
        self._doing.append((entry_id, is_done))

    def publish(self) -> None:
        """Write what changed since the last time."""
        jwks, busiest = self._services.jwks, self._busiest
        self._announcement.says(
            Report(
                started_at=self._started_at,
                keys=Keys(jwks.kids, jwks.asked_at, jwks.failed),
                done=[entry_id for entry_id, is_done in list(self._doing) if is_done()],
                window_seconds=WINDOW_SECONDS,
                requests=busiest.requests,
                unseen=busiest.unseen,
                tenants=busiest.tenants,
            )
        )
