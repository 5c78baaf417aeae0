"""How messages become bytes: the base of all messages, and strict decoding. No IO happens here.

Every message starts with one byte, its opcode. Three kinds of body follow:
- *fixed*: a little-endian layout with zero padding, for all that is small or hot;
- *bytes*: the rest of the message is one payload or one line of text;
- *JSON*: for the rare ones with structure.

Decoding is strict. A byte too many or too few, a padding byte that is not zero, an unknown field
or a value out of range is a `ProtocolFault`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import msgspec

from proxy.errors import ProtocolFault

MAX_MESSAGE = 16 << 20
"""Bytes of the longest message (a snapshot), all its chunks together."""
MAX_BYTES = 4096
"""Bytes of the longest payload of input or output."""
MAX_TEXT = 2048
"""Bytes of the longest log line or reason."""

M = TypeVar("M", bound="Message")


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of all messages.

    Attributes:
        opcode: its first byte.
        reply: the class that answers it; None for posted commands, replies and upcalls.
        refusable: a command that may also be answered by `Refused`.
        layout: of a fixed message: the opcode, then the fields in order.
        limit: bytes that a message of this class never exceeds, opcode included.
    """

    opcode: ClassVar[int] = 0
    reply: ClassVar[type[Message] | None] = None
    refusable: ClassVar[bool] = False
    layout: ClassVar[struct.Struct | None] = None
    limit: ClassVar[int] = 16 << 10

    def encode(self) -> bytes:
        """The message's bytes.

        Raises:
            ValueError: it is longer than its limit, or holds what its encoding cannot express.
        """
        if self.layout is not None:
            try:
                return self.layout.pack(self.opcode, *msgspec.structs.astuple(self))
            except struct.error as error:
                raise ValueError(f"{type(self).__name__}: {error}") from error
        try:
            data = bytes((self.opcode,)) + self._body()
        except (TypeError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error
        if len(data) > self.limit:
            raise ValueError(f"{type(self).__name__} of {len(data)} bytes; {self.limit} at most")
        return data

    def _body(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls: type[M], data: bytes) -> M:
        """Make the message from all its bytes; the opcode is already known to be right.

        Raises:
            ProtocolFault: these bytes are not such a message.
        """
        if len(data) > cls.limit:
            raise ProtocolFault(f"{cls.__name__} of {len(data)} bytes; {cls.limit} at most")
        try:
            if cls.layout is None:
                return cls._parse(data[1:])
            values = cls.layout.unpack(data)
            if cls.layout.pack(*values) == data:
                return cls(*values[1:])
        except (ValueError, struct.error, RecursionError) as error:
            raise ProtocolFault(f"malformed {cls.__name__}: {error}") from error
        raise ProtocolFault(f"malformed {cls.__name__}: padding is not zero")

    @classmethod
    def _parse(cls: type[M], body: bytes) -> M:
        return msgspec.json.decode(body, type=cls)


class PayloadMessage(Message, frozen=True):
    """A message whose body is one run of bytes."""

    limit: ClassVar[int] = 1 + MAX_BYTES
    data: bytes

    def _body(self) -> bytes:
        return self.data

    @classmethod
    def _parse(cls: type[M], body: bytes) -> M:
        return cls(body)


class TextMessage(Message, frozen=True):
    """A message whose body is one line of text for people."""

    limit: ClassVar[int] = 1 + MAX_TEXT
    text: str

    def _body(self) -> bytes:
        return self.text.encode("utf-8", "replace")[:MAX_TEXT]

    @classmethod
    def _parse(cls: type[M], body: bytes) -> M:
        return cls(printable(body.decode("utf-8", "replace")))


def printable(text: str) -> str:
    """`text` with everything replaced that could steer the reader's terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def decode(data: bytes, known: Mapping[int, type[Message]]) -> Message:
    """Make a message of whole bytes; `known` is COMMANDS or FROM_CHILD.

    Raises:
        ProtocolFault: these bytes are no message that this side may send.
    """
    if not data:
        raise ProtocolFault("an empty message")
    found = known.get(data[0])
    if found is None:
        raise ProtocolFault(f"unknown opcode {data[0]:#04x}")
    return found.decode(data)
