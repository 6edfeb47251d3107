"""Messages as msgpack with a schema: the dataclasses themselves. Never pickle.

A record is an array of its fields in order; a message is [name, record]. Decoding checks every
type, so a truncated or foreign message is a BadMessage and nothing else.
"""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

import msgpack

from engine import messages
from engine.errors import BadMessage

if TYPE_CHECKING:
    from engine.messages import Message

Read = typing.Callable[[Any], Any]
Record = typing.TypeVar("Record")


def encode(message: Message) -> bytes:
    packed: bytes = msgpack.packb([type(message).__name__, message], default=_as_fields)
    return packed


def decode(data: bytes) -> Message:
    try:
        name, record = msgpack.unpackb(data, use_list=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadMessage(f"not a message: {error}") from error
    kind = _kinds().get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadMessage(f"unknown message {name!r}")
    message: Message = _reader(kind)(record)
    return message


def encode_record(record: object) -> bytes:
    """A dataclass that is no message of its own, such as a transport's metadata."""
    packed: bytes = msgpack.packb(record, default=_as_fields)
    return packed


def decode_record(kind: type[Record], data: bytes) -> Record:
    try:
        value = msgpack.unpackb(data, use_list=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadMessage(f"not a {kind.__name__}: {error}") from error
    read: Read = _reader(typing.cast("Any", kind))
    record: Record = read(value)
    return record


def _as_fields(value: object) -> object:
    if is_dataclass(value):
        return [getattr(value, name) for name in _names(value.__class__)]
    raise TypeError(f"{type(value).__name__} does not travel")


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


@cache
def _kinds() -> dict[str, type]:
    return {kind.__name__: kind for kind in typing.get_args(messages.Message)}


@cache
def _reader(hint: Any) -> Read:
    """A function that turns what msgpack gave into `hint`, or raises BadMessage."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _optional(args)
    if origin is tuple:
        return _tuple(args)
    if is_dataclass(hint):
        return _record(typing.cast("type", hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(hint)
    return _plain(hint)


def _optional(args: tuple[Any, ...]) -> Read:
    (inner,) = (arg for arg in args if arg is not types.NoneType)
    read = _reader(inner)
    return lambda value: None if value is None else read(value)


def _tuple(args: tuple[Any, ...]) -> Read:
    if args[-1] is Ellipsis:
        read = _reader(args[0])
        if args[0] is int:
            return _int_tuple
        return lambda value: tuple(read(item) for item in _list(value, None))
    readers = [_reader(arg) for arg in args]
    return lambda value: tuple(
        read(item) for read, item in zip(readers, _list(value, len(readers)), strict=True)
    )


def _int_tuple(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise BadMessage(f"expected integers, got {str(value)[:40]}")
    return tuple(value)


def _record(kind: type) -> Read:
    hints = typing.get_type_hints(kind)
    readers = [_reader(hints[name]) for name in _names(kind)]

    def read(value: Any) -> Any:
        items = _list(value, len(readers))
        return kind(*[read_field(item) for read_field, item in zip(readers, items, strict=True)])

    return read


def _member(kind: type[Enum]) -> Read:
    def read(value: Any) -> Enum:
        try:
            return kind(value)
        except ValueError as error:
            raise BadMessage(str(error)) from error

    return read


def _plain(kind: type) -> Read:
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)

    def read(value: Any) -> Any:
        if type(value) not in accepted:
            raise BadMessage(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return read


def _list(value: Any, length: int | None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"{length} fields"
        raise BadMessage(f"expected {wanted}, got {str(value)[:40]}")
    return value
