"""The messages of the device-process contract.

Commands go from the machine to the child and have opcodes below 0x40; replies have 0x40 and up,
upcalls (the child speaks first) 0x80 and up; 0xF0 and above belong to the tube's framing. A
command's class names the class of its reply; None means that it is posted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from proxy.codec import (
    MAX_BYTES,
    MAX_MESSAGE,
    MAX_TEXT,
    Message,
    PayloadMessage,
    decode,
)
from proxy.replies import (
    Activated,
    Ahead,
    InputResult,
    MappingResult,
    Ok,
    Ranges,
    ReadConfigResult,
    ReadResult,
    ReadVirtualConfigResult,
    Refused,
    SnapshotResult,
    WriteConfigResult,
    check_length,
)
from proxy.shape import ClaimedRange, MemoryRegion, Shape
from proxy.upcalls import (
    DWORD,
    EMPTY,
    MAX_RUNS,
    ExitRequest,
    InputWanted,
    IrqLevel,
    LastWords,
    Log,
    Msi,
    Output,
    WantTurn,
    WrotePages,
)

_TWO_DWORDS = struct.Struct("<B3xII")


# Commands.


class Activate(Message, frozen=True):
    """Become a device: the first command, and only once."""

    opcode = 0x01
    reply = Activated
    layout = EMPTY


class Read(Message, frozen=True):
    """Read `length` bytes at `offset` of a region.

    `address` is where the machine saw the access; `requester` says who asked (0: the vCPU).
    """

    opcode = 0x02
    reply = ReadResult
    layout = struct.Struct("<BBBxIQQ")
    length: int
    region: int
    requester: int
    offset: int
    address: int

    def __post_init__(self) -> None:
        check_length(self.length, 8)


class Write(Message, frozen=True):
    """Write the low `length` bytes of `data`; posted."""

    opcode = 0x03
    layout = struct.Struct("<BBBxIQQQ")
    length: int
    region: int
    requester: int
    offset: int
    address: int
    data: int

    def __post_init__(self) -> None:
        check_length(self.length, 8)


class SyncedWrite(Write, frozen=True):
    """As `Write`, but answered: the device has had the turn that the write led to."""

    opcode = 0x14
    reply = Ok


class ReadConfig(Message, frozen=True):
    """Read one dword of configuration space."""

    opcode = 0x04
    reply = ReadConfigResult
    layout = DWORD
    register: int


class WriteConfig(Message, frozen=True):
    """Write the first `length` bytes of `data` at byte `offset` of a config register."""

    opcode = 0x05
    reply = WriteConfigResult
    layout = struct.Struct("<BBBxI4s")
    offset: int
    length: int
    register: int
    data: bytes

    def __post_init__(self) -> None:
        check_length(self.length, 4)
        check_length(self.offset + self.length, 4)


class InitPciConfigMapping(Message, frozen=True):
    """Keep config registers in this shared memory, `length` bytes from byte `base`.

    One descriptor of the memory travels with the message.
    """

    opcode = 0x06
    reply = MappingResult
    layout = _TWO_DWORDS
    base: int
    length: int


class ReadVirtualConfig(Message, frozen=True):
    """Read a register that only the machine sees."""

    opcode = 0x07
    reply = ReadVirtualConfigResult
    layout = DWORD
    register: int


class WriteVirtualConfig(Message, frozen=True):
    """Write a register that only the machine sees."""

    opcode = 0x08
    reply = Ok
    layout = _TWO_DWORDS
    register: int
    value: int


class DestroyDevice(Message, frozen=True):
    """The device goes away (hot-unplug), its process stays in its loop; posted."""

    opcode = 0x09
    layout = EMPTY


class Shutdown(Message, frozen=True):
    """Clean up the device, answer, then end the process."""

    opcode = 0x0A
    reply = Ok
    layout = EMPTY


class GetRanges(Message, frozen=True):
    """Ask for all ranges that the device claims at the moment."""

    opcode = 0x0B
    reply = Ranges
    layout = EMPTY


class Snapshot(Message, frozen=True):
    """Ask for the device's state."""

    opcode = 0x0C
    reply = SnapshotResult
    refusable = True
    layout = EMPTY


class Restore(Message, frozen=True):
    """Take up this state."""

    opcode = 0x0D
    reply = Ok
    refusable = True
    limit = MAX_MESSAGE
    state: Any


class Sleep(Message, frozen=True):
    """Stop all activity; idempotent. The answer is a barrier for all that was posted."""

    opcode = 0x0E
    reply = Ok
    refusable = True
    layout = EMPTY


class Wake(Message, frozen=True):
    """Go on after `Sleep`; idempotent."""

    opcode = 0x0F
    reply = Ok
    refusable = True
    layout = EMPTY


class Input(PayloadMessage, frozen=True):
    """Bytes from the outside world."""

    opcode = 0x10
    reply = InputResult


class Adjust(Message, frozen=True):
    """These options have other values now, by name."""

    opcode = 0x16
    reply = Ok
    refusable = True
    options: dict[str, int | str | bool]


class TakeAhead(Message, frozen=True):
    """`taken` bytes of what the device said comes next were read; if `wanted`, say it anew."""

    opcode = 0x18
    reply = Ahead
    layout = struct.Struct("<B?xxII")
    wanted: bool
    region: int
    taken: int


class Sync(Message, frozen=True):
    """Answer once everything before this was done, and the device has had the turn it wants.

    A barrier that changes nothing if it wants none.
    """

    opcode = 0x13
    reply = Ok
    layout = EMPTY


class MapGuestMemory(Message, frozen=True):
    """This is guest memory; one descriptor of it travels with the message. Only for DMA."""

    opcode = 0x15
    reply = Ok
    regions: tuple[MemoryRegion, ...]


class MapGrants(Message, frozen=True):
    """What is granted of guest memory is in this: `length` bytes of the descriptor with it."""

    opcode = 0x17
    reply = Ok
    layout = DWORD
    length: int


class LaneOpen(Message, frozen=True):
    """Accesses come through the shared page from here on; posted; `shares`: 1 for one CPU, or 0."""

    opcode = 0x11
    layout = struct.Struct("<BB2xI")
    shares: int
    generation: int


class LaneClose(Message, frozen=True):
    """Finish what is in the shared page; accesses come through the tube again; posted."""

    opcode = 0x12
    layout = EMPTY


_ALL = [each for each in globals().values() if isinstance(each, type) and issubclass(each, Message)]


def _table(first: int, end: int) -> Mapping[int, type[Message]]:
    return {each.opcode: each for each in _ALL if first <= each.opcode < end}


COMMANDS = _table(0x01, 0x40)
REPLIES = _table(0x40, 0x80)
UPCALLS = _table(0x80, 0x100)
FROM_CHILD: Mapping[int, type[Message]] = {**REPLIES, **UPCALLS}

__all__ = [
    "MAX_BYTES",
    "MAX_MESSAGE",
    "MAX_RUNS",
    "MAX_TEXT",
    "Activated",
    "Ahead",
    "ClaimedRange",
    "ExitRequest",
    "InputResult",
    "InputWanted",
    "IrqLevel",
    "LastWords",
    "Log",
    "MappingResult",
    "MemoryRegion",
    "Message",
    "Msi",
    "Ok",
    "Output",
    "Ranges",
    "ReadConfigResult",
    "ReadResult",
    "ReadVirtualConfigResult",
    "Refused",
    "Shape",
    "SnapshotResult",
    "WantTurn",
    "WriteConfigResult",
    "WrotePages",
    "decode",
]
