"""The messages of the device-process contract, and their bytes. No IO happens here.

Rules:
- Every message starts with one byte, its opcode: commands below 0x40, replies from 0x40, upcalls
  (the child speaks first) from 0x80. 0xF0 and above belong to the tube's framing.
- A command's class names the class of its reply; None means that it is posted.
- Three kinds of body. *Fixed*: a little-endian layout with zero padding, for all that is small or
  hot. *Bytes*: the rest of the message is one payload. *JSON*: for the rare ones with structure.
- Decoding is strict. A byte too many or too few, a padding byte that is not zero, an unknown
  field or a value out of range is a `ProtocolFault`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import msgspec

from devices.bus import BusType, Range
from devices.contract import Region
from devices.pci.contract import BarInfo, ConfigWriteResult
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
            message = cls(*cls.layout.unpack(data)[1:])
            if message.encode() == data:
                return message
        except (ValueError, struct.error, RecursionError) as error:
            raise ProtocolFault(f"malformed {cls.__name__}: {error}") from error
        raise ProtocolFault(f"malformed {cls.__name__}: padding is not zero")

    @classmethod
    def _parse(cls: type[M], body: bytes) -> M:
        return msgspec.json.decode(body, type=cls)


class _Payload(Message, frozen=True):
    """A message whose body is one run of bytes."""

    limit: ClassVar[int] = 1 + MAX_BYTES
    data: bytes

    def _body(self) -> bytes:
        return self.data

    @classmethod
    def _parse(cls: type[M], body: bytes) -> M:
        return cls(body)


class _Text(Message, frozen=True):
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


_EMPTY = struct.Struct("<B")
_DWORD = struct.Struct("<B3xI")
_TWO_DWORDS = struct.Struct("<B3xII")
_DWORD_QWORD = struct.Struct("<B3xIQ")


def _check_length(length: int, most: int) -> None:
    if not 1 <= length <= most:
        raise ValueError(f"length {length} is not 1..{most}")


# Replies.


class Ok(Message, frozen=True):
    """Done."""

    opcode: ClassVar[int] = 0x40
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Refused(_Text, frozen=True):
    """Not done; the device is as it was and the text says why."""

    opcode: ClassVar[int] = 0x41


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device looks like from outside; it never changes in the device's life."""

    regions: tuple[Region, ...] = ()
    is_pci: bool = False
    bars: tuple[BarInfo, ...] = ()
    takes_input: bool = False


class Activated(Message, frozen=True):
    """The child is a device now, of this shape; `lane` says that it can poll a shared page."""

    opcode: ClassVar[int] = 0x42
    shape: Shape
    lane: bool


class ReadResult(Message, frozen=True):
    """The value that was read, of which the low `length` bytes count."""

    opcode: ClassVar[int] = 0x43
    layout: ClassVar[struct.Struct | None] = struct.Struct("<BB6xQ")
    length: int
    data: int

    def __post_init__(self) -> None:
        _check_length(self.length, 8)


class ReadConfigResult(Message, frozen=True):
    """The dword of a config register."""

    opcode: ClassVar[int] = 0x44
    layout: ClassVar[struct.Struct | None] = _DWORD
    value: int


class WriteConfigResult(Message, frozen=True):
    """What a config write asks the machine to change on its buses."""

    opcode: ClassVar[int] = 0x45
    result: ConfigWriteResult


class MappingResult(Message, frozen=True):
    """Whether the device keeps the config mapping current from now on."""

    opcode: ClassVar[int] = 0x46
    layout: ClassVar[struct.Struct | None] = struct.Struct("<B?")
    mapped: bool


class ReadVirtualConfigResult(Message, frozen=True):
    """The value of a virtual config register."""

    opcode: ClassVar[int] = 0x47
    layout: ClassVar[struct.Struct | None] = _DWORD
    value: int


class ClaimedRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a region of the device is decoded at the moment."""

    region: int
    bus: BusType
    range: Range


class Ranges(Message, frozen=True):
    """All ranges that the device claims at the moment."""

    opcode: ClassVar[int] = 0x48
    ranges: tuple[ClaimedRange, ...]


class SnapshotResult(Message, frozen=True):
    """The device's state as plain values."""

    opcode: ClassVar[int] = 0x49
    limit: ClassVar[int] = MAX_MESSAGE
    state: Any


class InputResult(Message, frozen=True):
    """How many leading bytes of the input the device took."""

    opcode: ClassVar[int] = 0x4A
    layout: ClassVar[struct.Struct | None] = _DWORD
    accepted: int


# Commands.


class Activate(Message, frozen=True):
    """Become a device: the first command, and only once."""

    opcode: ClassVar[int] = 0x01
    reply: ClassVar[type[Message] | None] = Activated
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Read(Message, frozen=True):
    """Read `length` bytes at `offset` of a region.

    `address` is where the machine saw the access; `requester` says who asked (0: the vCPU).
    """

    opcode: ClassVar[int] = 0x02
    reply: ClassVar[type[Message] | None] = ReadResult
    layout: ClassVar[struct.Struct | None] = struct.Struct("<BBBxIQQ")
    length: int
    region: int
    requester: int
    offset: int
    address: int

    def __post_init__(self) -> None:
        _check_length(self.length, 8)


class Write(Message, frozen=True):
    """Write the low `length` bytes of `data`; posted."""

    opcode: ClassVar[int] = 0x03
    layout: ClassVar[struct.Struct | None] = struct.Struct("<BBBxIQQQ")
    length: int
    region: int
    requester: int
    offset: int
    address: int
    data: int

    def __post_init__(self) -> None:
        _check_length(self.length, 8)


class ReadConfig(Message, frozen=True):
    """Read one dword of configuration space."""

    opcode: ClassVar[int] = 0x04
    reply: ClassVar[type[Message] | None] = ReadConfigResult
    layout: ClassVar[struct.Struct | None] = _DWORD
    register: int


class WriteConfig(Message, frozen=True):
    """Write the first `length` bytes of `data` at byte `offset` of a config register."""

    opcode: ClassVar[int] = 0x05
    reply: ClassVar[type[Message] | None] = WriteConfigResult
    layout: ClassVar[struct.Struct | None] = struct.Struct("<BBBxI4s")
    offset: int
    length: int
    register: int
    data: bytes

    def __post_init__(self) -> None:
        _check_length(self.length, 4)
        _check_length(self.offset + self.length, 4)


class InitPciConfigMapping(Message, frozen=True):
    """Keep config registers in this shared memory, `length` bytes from byte `base`.

    One descriptor of the memory travels with the message.
    """

    opcode: ClassVar[int] = 0x06
    reply: ClassVar[type[Message] | None] = MappingResult
    layout: ClassVar[struct.Struct | None] = _TWO_DWORDS
    base: int
    length: int


class ReadVirtualConfig(Message, frozen=True):
    """Read a register that only the machine sees."""

    opcode: ClassVar[int] = 0x07
    reply: ClassVar[type[Message] | None] = ReadVirtualConfigResult
    layout: ClassVar[struct.Struct | None] = _DWORD
    register: int


class WriteVirtualConfig(Message, frozen=True):
    """Write a register that only the machine sees."""

    opcode: ClassVar[int] = 0x08
    reply: ClassVar[type[Message] | None] = Ok
    layout: ClassVar[struct.Struct | None] = _TWO_DWORDS
    register: int
    value: int


class DestroyDevice(Message, frozen=True):
    """The device goes away (hot-unplug), its process stays in its loop; posted."""

    opcode: ClassVar[int] = 0x09
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Shutdown(Message, frozen=True):
    """Clean up the device, answer, then end the process."""

    opcode: ClassVar[int] = 0x0A
    reply: ClassVar[type[Message] | None] = Ok
    layout: ClassVar[struct.Struct | None] = _EMPTY


class GetRanges(Message, frozen=True):
    """Ask for all ranges that the device claims at the moment."""

    opcode: ClassVar[int] = 0x0B
    reply: ClassVar[type[Message] | None] = Ranges
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Snapshot(Message, frozen=True):
    """Ask for the device's state."""

    opcode: ClassVar[int] = 0x0C
    reply: ClassVar[type[Message] | None] = SnapshotResult
    refusable: ClassVar[bool] = True
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Restore(Message, frozen=True):
    """Take up this state."""

    opcode: ClassVar[int] = 0x0D
    reply: ClassVar[type[Message] | None] = Ok
    refusable: ClassVar[bool] = True
    limit: ClassVar[int] = MAX_MESSAGE
    state: Any


class Sleep(Message, frozen=True):
    """Stop all activity; idempotent. The answer is a barrier for all that was posted."""

    opcode: ClassVar[int] = 0x0E
    reply: ClassVar[type[Message] | None] = Ok
    refusable: ClassVar[bool] = True
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Wake(Message, frozen=True):
    """Go on after `Sleep`; idempotent."""

    opcode: ClassVar[int] = 0x0F
    reply: ClassVar[type[Message] | None] = Ok
    refusable: ClassVar[bool] = True
    layout: ClassVar[struct.Struct | None] = _EMPTY


class Input(_Payload, frozen=True):
    """Bytes from the outside world."""

    opcode: ClassVar[int] = 0x10
    reply: ClassVar[type[Message] | None] = InputResult


class LaneOpen(Message, frozen=True):
    """From here on accesses come through the shared page; posted. Generations count up from 1."""

    opcode: ClassVar[int] = 0x11
    layout: ClassVar[struct.Struct | None] = _DWORD
    generation: int


class LaneClose(Message, frozen=True):
    """Finish what is in the shared page; accesses come through the tube again; posted."""

    opcode: ClassVar[int] = 0x12
    layout: ClassVar[struct.Struct | None] = _EMPTY


# Upcalls.


class IrqLevel(Message, frozen=True):
    """Drive an interrupt line."""

    opcode: ClassVar[int] = 0x80
    layout: ClassVar[struct.Struct | None] = struct.Struct("<B?B")
    level: bool
    pin: int


class Msi(Message, frozen=True):
    """A message-signalled interrupt."""

    opcode: ClassVar[int] = 0x81
    layout: ClassVar[struct.Struct | None] = _DWORD_QWORD
    data: int
    address: int


class WrotePages(Message, frozen=True):
    """`count` guest pages of 4 KiB from page number `first` were written."""

    opcode: ClassVar[int] = 0x82
    layout: ClassVar[struct.Struct | None] = _DWORD_QWORD
    count: int
    first: int

    def __post_init__(self) -> None:
        if self.first + self.count > 1 << 52:
            raise ValueError("pages past the end of the address space")


class Log(_Text, frozen=True):
    """One line for the machine's log."""

    opcode: ClassVar[int] = 0x83


class Output(_Payload, frozen=True):
    """Bytes for the outside world."""

    opcode: ClassVar[int] = 0x84


class InputWanted(Message, frozen=True):
    """There is room for input again."""

    opcode: ClassVar[int] = 0x85
    layout: ClassVar[struct.Struct | None] = _EMPTY


class ExitRequest(Message, frozen=True):
    """End the run with this guest exit value."""

    opcode: ClassVar[int] = 0x86
    layout: ClassVar[struct.Struct | None] = struct.Struct("<B7xQ")
    value: int


class LastWords(_Text, frozen=True):
    """Why the process is about to end by itself."""

    opcode: ClassVar[int] = 0x87


def _table(classes: Iterable[type[Message]]) -> dict[int, type[Message]]:
    return {each.opcode: each for each in classes}


_ALL = [
    each
    for each in list(globals().values())
    if isinstance(each, type) and issubclass(each, Message) and each.opcode
]
COMMANDS: Mapping[int, type[Message]] = _table(m for m in _ALL if m.opcode < 0x40)
REPLIES: Mapping[int, type[Message]] = _table(m for m in _ALL if 0x40 <= m.opcode < 0x80)
UPCALLS: Mapping[int, type[Message]] = _table(m for m in _ALL if m.opcode >= 0x80)
FROM_CHILD: Mapping[int, type[Message]] = {**REPLIES, **UPCALLS}


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
