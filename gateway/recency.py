"""Who was used when, in two parts, so that a tenant used once never pushes out one used all the time.

A segmented LRU: the first use puts a key among the `once`, the next one among the `often`; what `often` has more
than its share of, goes back to the young end of `once`, and whoever leaves goes from its old end. A sweep over
thousands of tenants (a crawler, a nightly job) so turns over a fifth of the places and not all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")
OFTEN_SHARE = 0.8


class Recency(Generic[Value]):
    """Keys with their values, ordered for leaving. It lets nobody go by itself: `size` only sets the share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._once: OrderedDict[str, Value] = OrderedDict()
        self._often: OrderedDict[str, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def get(self, key: str) -> Value | None:
        """The value, without counting as a use."""
        found = self._often.get(key)
        return found if found is not None else self._once.get(key)

    def add(self, key: str, value: Value) -> None:
        self._once[key] = value

    def use(self, key: str) -> Value | None:
        """The value, used now."""
        value = self._often.get(key)
        if value is not None:
            self._often.move_to_end(key)
            return value
        value = self._once.pop(key, None)
        if value is not None:
            self._often[key] = value
            if len(self._often) > self.size * OFTEN_SHARE:
                demoted, its = self._often.popitem(last=False)
                self._once[demoted] = its
        return value

    def remove(self, key: str) -> None:
        if self._often.pop(key, None) is None:
            self._once.pop(key, None)

    def leaving(self) -> Iterator[Value]:
        """Who should leave first. Not to be changed meanwhile."""
        yield from self._once.values()
        yield from self._often.values()

    def clear(self) -> list[Value]:
        """Empty it; the values there were."""
        values = list(self.leaving())
        self._once.clear()
        self._often.clear()
        return values
