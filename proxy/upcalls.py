"""What a child says unasked; see `proxy.messages`, which has all of these, too."""

from __future__ import annotations

import struct

from proxy.codec import Message, PayloadMessage, TextMessage

EMPTY = struct.Struct("<B")
DWORD = struct.Struct("<B3xI")
DWORD_QWORD = struct.Struct("<B3xIQ")
_COUNT = struct.Struct("<I")
_RUN = struct.Struct("<QQ")
MAX_RUNS = 256
"""Runs of pages in one message, at most."""


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
    """Guest pages of 4 KiB were written: runs of them, each (number of the first, how many)."""

    opcode = 0x82
    limit = 5 + 16 * MAX_RUNS
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for first, count in self.runs:
            if not (first >= 0 <= count and first + count <= 1 << 52):
                raise ValueError("pages past the end of the address space")

    def _body(self) -> bytes:
        runs = [_RUN.pack(first, count) for first, count in self.runs]
        return _COUNT.pack(len(runs)) + b"".join(runs)

    @classmethod
    def _parse(cls, body: bytes) -> WrotePages:
        runs = tuple(_RUN.iter_unpack(body[_COUNT.size :]))
        if _COUNT.unpack_from(body)[0] != len(runs):
            raise ValueError("it does not have as many runs as it says")
        return cls(runs)


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
