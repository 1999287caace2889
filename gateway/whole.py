"""Whole numbers written with a fraction: to JSON Schema, by which we describe what we take, `5.0` is an integer.

msgspec's `int` takes none, and its lax mode would take "5" too. So a body is decoded strictly, as ever; only when that
fails for a float it is done once more, with the whole ones turned into integers where an integer is wanted. What is in
free-form `metadata` stays as it was sent.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import ValidationError, inspect

_type_info = cache(inspect.type_info)


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """What `decoder.decode` returns or raises, but for whole numbers."""
    try:
        return decoder.decode(body)
    except ValidationError as e:
        if not _is_for_a_float(e):
            raise
    return convert(msgspec.json.decode(body), decoder.type)


def convert(value: Any, wanted: Any) -> Any:
    """What `msgspec.convert` returns or raises, but for whole numbers."""
    try:
        return msgspec.convert(value, wanted)
    except ValidationError as e:
        if not _is_for_a_float(e):
            raise
    return msgspec.convert(_whole(value, _type_info(wanted)), wanted)


def _is_for_a_float(e: ValidationError) -> bool:
    return "got `float`" in str(e)


def _whole(value: Any, wanted: inspect.Type) -> Any:
    """A copy as far as structs and their lists go. Of a union only an optional integer is meant: in one that has room
    for others a float is what it is."""
    match wanted, value:
        case inspect.IntType(), float() if value.is_integer():
            return int(value)
        case inspect.StructType(), dict():
            types = {field.encode_name: field.type for field in wanted.fields}
            return {name: _whole(each, types[name]) if name in types else each for name, each in value.items()}
        case inspect.ListType(), list():
            return [_whole(each, wanted.item_type) for each in value]
        case inspect.UnionType(), _:
            others = [each for each in wanted.types if not isinstance(each, inspect.NoneType)]
            return _whole(value, others[0]) if len(others) == 1 else value
        case inspect.Metadata(), _:
            return _whole(value, wanted.type)
    return value
