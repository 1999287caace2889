"""How long to wait before asking again somebody who did not answer: longer each time, and never in step with others.

Many machines lose the same PostgreSQL in the same second. Each waits a random part of a doubling time, so that they
come back spread over it ("full jitter"), and the last of them within `most_seconds`.
"""

from __future__ import annotations

import random


class Backoff:
    def __init__(self, first_seconds: float, most_seconds: float) -> None:
        self._first, self._most = first_seconds, most_seconds
        self._ceiling = first_seconds

    def next_seconds(self) -> float:
        """At least a tenth of the ceiling: two tries in a row are no waiting at all."""
        ceiling, self._ceiling = self._ceiling, min(self._most, self._ceiling * 2)
        return random.uniform(ceiling / 10, ceiling)

    def reset(self) -> None:
        self._ceiling = self._first
