"""Structured logs: one JSON object a line on stderr (or a given stream); events are nouns, fields carry units.

Never logged: tokens, memory content, query text, bodies, secrets. `SecretStr` settings print as stars, and
`redact` drops fields by name as a second line of defence.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

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


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `component=name`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name)
    return logger
