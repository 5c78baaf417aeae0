"""How messages of 9P are written: little-endian fields, one after the other, no padding.

A message is ``size[4] type[1] tag[2]``, where the size counts itself, then the fields of its type.
A field's kind is noted in its annotation (`messages` has examples)::

    class Walk(Message, frozen=True):
        number = 110
        fid: U32
        new_fid: U32
        names: Names

Source: the manual page intro(5) of Plan 9, and Linux, net/9p/protocol.c.
"""

from __future__ import annotations

import functools
import struct
import typing
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import msgspec

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Text = Annotated[bytes, "text"]
"""A 16-bit count and as many bytes. Names of files need not be UTF-8."""
Data = Annotated[bytes, "data"]
"""The same with a 32-bit count."""
Names = Annotated[tuple[bytes, ...], "names"]
"""A 16-bit count and as many `Text`."""

HEADER = struct.Struct("<IBH")
"""size, type, tag"""
_U16, _U32 = struct.Struct("<H"), struct.Struct("<I")
_QID = struct.Struct("<BIQ")


class CodecError(ValueError):
    """Bytes that are no message of this type."""


class Qid(NamedTuple):
    """What a server says of a file's identity: `kind` has `protocol.QidKind`."""

    kind: int
    version: int
    path: int


QID_SIZE = _QID.size
QidField = Annotated[Qid, "qid"]
Qids = Annotated[tuple[Qid, ...], "qids"]
"""A 16-bit count and as many qids."""


class Message(msgspec.Struct, frozen=True):
    """A message; subclasses declare their number and their fields in order."""

    number: ClassVar[int] = 0


_M = TypeVar("_M", bound=Message)


@functools.cache
def _layout(kind: type[Message]) -> tuple[struct.Struct | str, ...]:
    """The parts of a message: runs of numbers as one struct, everything else by its note."""
    hints = typing.get_type_hints(kind, include_extras=True)
    parts: list[struct.Struct | str] = []
    run = ""
    for name in kind.__struct_fields__:
        (note,) = hints[name].__metadata__
        if len(note) == 1:
            run += note
            continue
        if run:
            parts.append(struct.Struct(f"<{run}"))
        run = ""
        parts.append(note)
    if run:
        parts.append(struct.Struct(f"<{run}"))
    return tuple(parts)


def encode(message: Message, tag: int) -> bytes:
    """A whole message.

    Raises:
        CodecError: a value does not fit its field.
    """
    values = list(msgspec.structs.astuple(message))
    body = []
    try:
        for part in _layout(type(message)):
            if isinstance(part, struct.Struct):
                count = len(part.format) - 1
                body.append(part.pack(*values[:count]))
                del values[:count]
            else:
                body.append(_put(part, values.pop(0)))
        size = HEADER.size + sum(map(len, body))
        return b"".join((HEADER.pack(size, message.number, tag), *body))
    except struct.error as error:
        raise CodecError(str(error)) from error


def _put(kind: str, value: Any) -> bytes:
    if kind == "text":
        return _U16.pack(len(value)) + bytes(value)
    if kind == "data":
        return _U32.pack(len(value)) + bytes(value)
    if kind == "qid":
        return _QID.pack(*value)
    each = "text" if kind == "names" else "qid"
    return _U16.pack(len(value)) + b"".join(_put(each, one) for one in value)


def decode(kind: type[_M], body: bytes) -> _M:
    """The message of which `body` is all but the header.

    Raises:
        CodecError: it is cut short, or something follows.
    """
    values: list[Any] = []
    place = 0
    try:
        for part in _layout(kind):
            if isinstance(part, struct.Struct):
                values += part.unpack_from(body, place)
                place += part.size
            else:
                value, place = _take(part, body, place)
                values.append(value)
    except struct.error as error:
        raise CodecError(f"{kind.__name__} is cut short") from error
    if place != len(body):
        raise CodecError(f"something follows {kind.__name__}")
    return kind(*values)


def _take(kind: str, body: bytes, place: int) -> tuple[Any, int]:
    if kind == "qid":
        return Qid(*_QID.unpack_from(body, place)), place + _QID.size
    counter = _U32 if kind == "data" else _U16
    (count,) = counter.unpack_from(body, place)
    place += counter.size
    if kind in ("text", "data"):
        if place + count > len(body):
            raise struct.error("cut short")
        return body[place : place + count], place + count
    each = "text" if kind == "names" else "qid"
    found = []
    for _ in range(count):
        value, place = _take(each, body, place)
        found.append(value)
    return tuple(found), place
