"""How full the spool may be, and what is refused or dropped when it is.

The size of the whole directory decides (all workers, sealed, quarantine, dry runs); `usage_at_limit` says how:

| size                         | refuse                                       | drop                          |
|------------------------------|----------------------------------------------|-------------------------------|
| below the limit              | everything is served and recorded            | the same                      |
| limit … limit + reserve      | writes are refused; the rest is recorded     | the same as below the limit   |
| limit + reserve and above    | everything is refused                        | served; events are dropped    |

A disk that is full before that is no level: the spool then keeps events in memory and refuses everything.

Between two measurements, a second apart, the workers of a machine can pass a line by what they append meanwhile
(about 80 bytes a request). At half of the limit a warning is logged, once until it falls to three eighths.
"""

from __future__ import annotations

from enum import IntEnum

from shared import metrics
from shared.log import get_logger
from shared.settings import Settings
from shared.spool_dir import Surveyor

log = get_logger("spool")


class Level(IntEnum):
    AMPLE = 0
    HALF = 1
    FULL = 2
    RESERVE_GONE = 3


class SpoolLimit:
    """One worker's view. `measure` is for a thread; the rest are plain values that any thread may read."""

    def __init__(self, settings: Settings) -> None:
        self._limit_bytes = settings.usage_spool_limit_bytes
        self._reserve_bytes = settings.usage_spool_reserve_bytes
        self._drop = settings.usage_at_limit == "drop"
        self._surveyor = Surveyor(settings.spool_dir)
        self._level = Level.AMPLE
        self.takes_writes = True
        self.refusing = False  # everything
        self.dropping = False

    def measure(self) -> float:
        """Set the gauges and what is refused from now on; the age of the oldest event on disk in seconds. Blocking."""
        seen = self._surveyor.look()
        metrics.usage_spool_bytes.set(seen.size_bytes)
        metrics.usage_spool_limit_bytes.set(self._limit_bytes)
        metrics.usage_quarantined_segments.set(seen.quarantined)
        metrics.usage_stuck_segments.set(seen.stuck)
        level = self._level_at(seen.size_bytes)
        if level != self._level:
            self._say(level, seen.size_bytes)
            self._level = level
            self.takes_writes = self._drop or level < Level.FULL
            self.refusing = not self._drop and level == Level.RESERVE_GONE
            self.dropping = self._drop and level == Level.RESERVE_GONE
        return seen.oldest_age_seconds

    def _level_at(self, size_bytes: int) -> Level:
        room_bytes = self._limit_bytes - size_bytes
        if room_bytes <= 0:
            return Level.RESERVE_GONE if room_bytes <= -self._reserve_bytes else Level.FULL
        eighths = 4 if self._level == Level.AMPLE else 3
        return Level.HALF if size_bytes * 8 >= self._limit_bytes * eighths else Level.AMPLE

    def _say(self, level: Level, size_bytes: int) -> None:
        worse = log.warning if level == Level.HALF else log.error
        say = worse if level > self._level else log.info
        if self._drop:
            consequence = "events are dropped" if level == Level.RESERVE_GONE else "none"
        else:
            consequence = ("none", "none", "writes are refused", "everything is refused")[level]
        say(
            "usage_spool_level",
            now=level.name.lower(),
            spool_bytes=size_bytes,
            limit_bytes=self._limit_bytes,
            reserve_bytes=self._reserve_bytes,
            consequence=consequence,
        )
