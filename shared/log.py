"""Structured logs: one JSON object a line on stderr (or a given stream); events are nouns, fields carry units.

Never logged: tokens, memory content, query text, bodies, secrets. `SecretStr` settings print as stars, and
`redact` drops fields by name as a second line of defence.

structlog comes with `configure`, which every process that may have to say what failed calls as it begins: a line that
had to import it then might fail itself. Commands that log nothing would spend a fifth of their time on it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_FORBIDDEN = frozenset({"token", "authorization", "password", "secret", "content", "query", "body"})


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the value of any field that must never be logged."""
    for name in _FORBIDDEN & event.keys():
        event[name] = "[redacted]"
    return event


class Stderr:
    """stderr where a full disk under the log costs lines and never what is being logged about.

    Without it the line that reports "the spool's disk is full" raises, in the middle of keeping the event.
    """

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(2, text.encode("utf-8", "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Set up structlog for this process. Call once, at the process edge.

    A line leaves as one `write`: workers share a stderr, and a line whose end is written apart gets another's in it.
    """
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            redact,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(stream or cast(TextIO, Stderr())),
        cache_logger_on_first_use=True,
    )


class _Logger:
    """structlog's, from its first line on: modules make theirs before anybody has configured anything."""

    def __init__(self, name: str) -> None:
        self._name = name

    @functools.cached_property
    def _logger(self) -> FilteringBoundLogger:
        import structlog

        logger: FilteringBoundLogger = structlog.get_logger(component=self._name)
        return logger

    def __getattr__(self, level: str) -> Any:
        if level.startswith("_"):
            raise AttributeError(level)
        return getattr(self._logger, level)


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `component=name`."""
    return cast("FilteringBoundLogger", _Logger(name))
