"""Receipts: what one step hands to the next, so that a wrong order does not type-check.

Immutable structs. Deliberately not dataclasses: an orchestrator that walks dataclasses to find what a value was
made from would draw an edge from every step to every later one; a receipt is one value, so its edge is one.
"""

from __future__ import annotations

import msgspec


class Receipt(msgspec.Struct, frozen=True, weakref=True):
    """Base of all receipts."""
