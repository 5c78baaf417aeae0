"""The replies among the messages, see `proxy.messages`."""

from __future__ import annotations

import struct
from typing import Any

from devices.pci.contract import ConfigWriteResult
from proxy.codec import MAX_MESSAGE, Message, PayloadMessage, TextMessage
from proxy.shape import ClaimedRange, Shape
from proxy.upcalls import DWORD, EMPTY


def check_length(length: int, most: int) -> None:
    if not 1 <= length <= most:
        raise ValueError(f"length {length} is not 1..{most}")


class Ok(Message, frozen=True):
    """Done."""

    opcode = 0x40
    layout = EMPTY


class Refused(TextMessage, frozen=True):
    """Not done; the device is as it was and the text says why."""

    opcode = 0x41


class Activated(Message, frozen=True):
    """The child is a device now, of this shape; `lane` says that it can poll a shared page."""

    opcode = 0x42
    shape: Shape
    lane: bool


class ReadResult(Message, frozen=True):
    """The value that was read, of which the low `length` bytes count."""

    opcode = 0x43
    layout = struct.Struct("<BB6xQ")
    length: int
    data: int

    def __post_init__(self) -> None:
        check_length(self.length, 8)


class ReadConfigResult(Message, frozen=True):
    """The dword of a config register."""

    opcode = 0x44
    layout = DWORD
    value: int


class WriteConfigResult(Message, frozen=True):
    """What a config write asks the machine to change on its buses."""

    opcode = 0x45
    result: ConfigWriteResult


class MappingResult(Message, frozen=True):
    """Whether the device keeps the config mapping current from now on."""

    opcode = 0x46
    layout = struct.Struct("<B?")
    mapped: bool


class ReadVirtualConfigResult(Message, frozen=True):
    """The value of a virtual config register."""

    opcode = 0x47
    layout = DWORD
    value: int


class Ranges(Message, frozen=True):
    """All ranges that the device claims at the moment."""

    opcode = 0x48
    ranges: tuple[ClaimedRange, ...]


class SnapshotResult(Message, frozen=True):
    """The device's state as plain values."""

    opcode = 0x49
    limit = MAX_MESSAGE
    state: Any


class InputResult(Message, frozen=True):
    """How many leading bytes of the input the device took."""

    opcode = 0x4A
    layout = DWORD
    accepted: int


class Ahead(PayloadMessage, frozen=True):
    """What comes next; empty if that cannot be said."""

    opcode = 0x4B
