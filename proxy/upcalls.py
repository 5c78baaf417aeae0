"""What a child says unasked; see `proxy.messages`, which has all of these, too."""

from __future__ import annotations

import struct

from proxy.codec import Message, PayloadMessage, TextMessage

EMPTY = struct.Struct("<B")
DWORD = struct.Struct("<B3xI")
DWORD_QWORD = struct.Struct("<B3xIQ")


class IrqLevel(Message, frozen=True):
    """Drive an interrupt line."""

    opcode = 0x80
    layout = struct.Struct("<B?B")
    level: bool
    pin: int


class Msi(Message, frozen=True):
    """A message-signalled interrupt."""

    opcode = 0x81
    layout = DWORD_QWORD
    data: int
    address: int


class WrotePages(Message, frozen=True):
    """`count` guest pages of 4 KiB from page number `first` were written."""

    opcode = 0x82
    layout = DWORD_QWORD
    count: int
    first: int

    def __post_init__(self) -> None:
        if self.first + self.count > 1 << 52:
            raise ValueError("pages past the end of the address space")


class Log(TextMessage, frozen=True):
    """One line for the machine's log."""

    opcode = 0x83


class Output(PayloadMessage, frozen=True):
    """Bytes for the outside world."""

    opcode = 0x84


class InputWanted(Message, frozen=True):
    """There is room for input again."""

    opcode = 0x85
    layout = EMPTY


class ExitRequest(Message, frozen=True):
    """End the run with this guest exit value."""

    opcode = 0x86
    layout = struct.Struct("<B7xQ")
    value: int


class LastWords(TextMessage, frozen=True):
    """Why the process is about to end by itself."""

    opcode = 0x87


class WantTurn(Message, frozen=True):
    """Have the device take its turn soon: send `Sync` with the vCPU stopped."""

    opcode = 0x88
    layout = EMPTY
