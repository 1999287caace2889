"""What is stored and asked: turns of conversations put together from a vocabulary with a natural skew.

Word frequencies follow Zipf's law, as in real text, because that is what a search costs by: a query for two rare
words reads a handful of postings, one for two common words reads thousands.
"""

# ruff: noqa: SIM905  word lists read better as text
from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

_TOPICS = (
    "kitchen garden piano lisbon marathon invoice database python sourdough passport dentist camera bicycle novel "
    "budget espresso landlord sister birthday backpack spanish therapy thesis router mortgage wedding allergy kayak "
    "chess museum recipe meeting deadline contract guitar terrace winter airport visa tomato orchid server backup "
    "podcast insurance keyboard telescope pottery archive festival neighbour vaccine library harbour notebook"
).split()
_VERBS = (
    "prefers asked about wants remembered decided booked cancelled moved finished started explained forgot bought "
    "sold repaired learned planned mentioned compared recommended visited measured wrote called"
).split()
_COMMON = "the user a to and of in is that for with on it as was at by my we this be have from they".split()
_SYLLABLES = "ba ce di fo gu ha ke li mo nu pa re si to vu wa xe yo za".split()


class Corpus:
    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)
        rare = sorted({"".join(self._random.choices(_SYLLABLES, k=self._random.randint(2, 4))) for _ in range(4_000)})
        self._random.shuffle(rare)
        self._words = [*_COMMON, *_VERBS, *_TOPICS, *rare]
        self._weights = list(accumulate(1 / (rank + 2) for rank in range(len(self._words))))

    def memory(self) -> dict[str, Any]:
        """The body of one POST /v1/memories: 8 to 60 words, sometimes tagged."""
        text = " ".join(self._pick(self._random.randint(8, 60)))
        memory: dict[str, Any] = {"content": text[0].upper() + text[1:] + "."}
        memory["memory_type"] = self._random.choice(("note", "fact", "preference", "event"))
        memory["tags"] = self._random.sample(_TOPICS[:12], self._random.choice((0, 1, 1, 2, 3)))
        memory["metadata"] = {"source": "chat", "turn": self._random.randint(1, 400)}
        memory["importance"] = round(self._random.random(), 2)
        return memory

    def query(self) -> dict[str, Any]:
        """The body of one POST /v1/search, of the kinds people and agents send."""
        topic, other = self._random.sample(_TOPICS, 2)
        verb = self._random.choice(_VERBS)
        kind = self._random.random()
        if kind < 0.35:
            return {"query": f"{topic} {other}"}
        if kind < 0.55:
            return {"query": f"{topic} OR {other}"}
        if kind < 0.65:
            return {"query": f"{verb} {topic}", "limit": 20}
        if kind < 0.75:
            return {"query": topic[:4] + "*"}
        if kind < 0.85:
            return {"query": topic, "memory_type": "fact"}
        if kind < 0.93:
            return {"query": verb, "tags": [self._random.choice(_TOPICS[:12])]}
        if kind < 0.98:
            return {"query": f"{topic} OR {other} OR {verb}"}
        return {"query": "the user"}

    def _pick(self, count: int) -> list[str]:
        return self._random.choices(self._words, cum_weights=self._weights, k=count)
