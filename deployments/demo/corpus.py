"""The memories a demo writes: the caller's files, or the small corpus that ships with the project."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import Permanent

_BUILT_IN = Path(__file__).parent.parent / "corpus"
_FIELDS = ("content", "tags", "metadata", "memory_type", "importance")
_WORD = re.compile(r"[A-Za-z]{4,}")


@dataclass(frozen=True, slots=True)
class Conversation:
    name: str
    memories: list[dict[str, Any]]

    def distinctive(self) -> tuple[str, str]:
        """An FTS5 query that matches exactly one memory, and that memory's content."""
        words = [frozenset(w.lower() for w in _WORD.findall(m["content"])) for m in self.memories]
        seen = Counter(word for each in words for word in each)
        for memory, each in zip(self.memories, words, strict=True):
            if rare := sorted(word for word in each if seen[word] == 1):
                return rare[0], memory["content"]
        raise Permanent(f"{self.name}: no memory has a word of its own")

    def common_words(self, number: int) -> list[str]:
        """The most frequent words, for searches that find a lot."""
        counted = Counter(w.lower() for m in self.memories for w in _WORD.findall(m["content"]))
        return [word for word, _ in counted.most_common(number)]


def load(files: list[Path]) -> list[Conversation]:
    """One conversation a file, one memory a line. Raises `Permanent` naming the file and line that is wrong."""
    paths = files or sorted(_BUILT_IN.glob("*.jsonl"))
    return [Conversation(path.stem, _memories(path)) for path in paths]


def _memories(path: Path) -> list[dict[str, Any]]:
    memories = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise Permanent(f"{path}: {e}") from e
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            memory = json.loads(line)
        except ValueError as e:
            raise Permanent(f"{path}:{number}: not JSON: {e}") from e
        if not isinstance(memory, dict) or not isinstance(memory.get("content"), str) or not memory["content"]:
            raise Permanent(f"{path}:{number}: a memory needs a non-empty string `content`")
        memories.append({name: memory[name] for name in _FIELDS if name in memory})
    if not memories:
        raise Permanent(f"{path}: no memory in it")
    return memories
