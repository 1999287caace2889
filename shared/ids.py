"""Ids of rows: UUIDv7 (RFC 9562), so that rows of a table sort by when they were made."""

from __future__ import annotations

from uuid import UUID

from uuid6 import uuid7


def new_id() -> UUID:
    """A `uuid.UUID`: drivers and encoders do not know the subclass that uuid6 makes."""
    return UUID(int=uuid7().int)
