"""A PS/2 keyboard as the keyboard controller sees it: commands in, scan codes of set 2 out.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboards"; Microsoft, "Keyboard Scan
Code Specification", whose appendix has the translation to set 1 that the controller does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from devices.contract import U8

QUEUE_SIZE = 64
"""Bytes that wait for the controller; the keyboard's own buffer has 16, and hosts paste."""

ACK, BAT_OK = 0xFA, 0xAA
RESEND = 0xFE
BREAK = 0xF0
"""Before the code of a key that is released."""
IDENTITY = b"\xab\x83"
"""An MF2 keyboard."""


class Command(IntEnum):
    """What the host may send."""

    SET_LEDS = 0xED
    ECHO = 0xEE
    CODE_SET = 0xF0
    IDENTIFY = 0xF2
    TYPEMATIC = 0xF3
    ENABLE = 0xF4
    DISABLE = 0xF5
    DEFAULTS = 0xF6
    RESEND = 0xFE
    RESET = 0xFF


_WITH_ARGUMENT = (Command.SET_LEDS, Command.CODE_SET, Command.TYPEMATIC)

_SET_1 = bytes.fromhex(
    "ff43413f3d3b3c58644442403e0f295965382a701d10025a66712c1f1e11035b"
    "672e2d201205045c68392f211413065d693130232215075e6a7232162408095f"
    "6b332517180b0a606c34352627190c616d7328741a0d626e3a361c1b752b6376"
    "55567778797a0e7b7c4f7d4b477e7f6f5253504c4d480145574e514a37494654"
)
"""The set 1 code of each set 2 code below 0x80."""
_SET_1_ABOVE = {0x83: 0x41, 0x84: 0x54}
"""F7 and SysRq; all other codes from 0x80 on are no keys and stay as they are."""


def translate(code: int) -> int:
    """What the controller makes of a byte of the keyboard, break prefixes left aside."""
    return _SET_1[code] if code < 0x80 else _SET_1_ABOVE.get(code, code)


@dataclass
class KeyboardState:
    """What the keyboard remembers.

    Attributes:
        queue: what it has to say, oldest first.
        scanning: it reports keys.
        argument_of: the command that waits for its argument, or 0.
        leds: bit 0 scroll lock, 1 num lock, 2 caps lock.
        code_set: only set 2 is spoken, whatever is chosen.
        last: what it said last, for RESEND.
    """

    queue: bytearray = field(default_factory=bytearray)
    scanning: bool = True
    argument_of: U8 = 0
    leds: U8 = 0
    typematic: U8 = 0x2B
    code_set: U8 = 2
    last: U8 = 0

    def __post_init__(self) -> None:
        if len(self.queue) > QUEUE_SIZE:
            raise ValueError(f"{len(self.queue)} bytes wait, more than {QUEUE_SIZE}")
        if self.argument_of and self.argument_of not in _WITH_ARGUMENT:
            raise ValueError(f"command {self.argument_of:#x} takes no argument")


class Keyboard:
    """Acts on its state, which belongs to the controller's."""

    def __init__(self, state: KeyboardState) -> None:
        self.state = state

    def press(self, codes: bytes) -> int:
        """Take set 2 codes of whole keys; all or nothing, the number of bytes taken."""
        if len(self.state.queue) + len(codes) > QUEUE_SIZE:
            return 0
        if self.state.scanning:
            self.state.queue += codes
        return len(codes)

    def next_byte(self) -> int:
        """The next thing it says; there must be one."""
        self.state.last = self.state.queue.pop(0)
        return self.state.last

    def command(self, value: int) -> None:
        """The host sends a byte: a command, or the argument of the one before."""
        state = self.state
        before, state.argument_of = state.argument_of, 0
        if before and value < Command.SET_LEDS:
            self._argument(before, value)
            return
        if value == Command.RESEND:
            state.queue.insert(0, state.last)
            del state.queue[QUEUE_SIZE:]
            return
        state.queue.clear()
        match value:
            case Command.ECHO:
                self._say(Command.ECHO)
            case Command.IDENTIFY:
                self._say(ACK, *IDENTITY)
            case Command.ENABLE | Command.DISABLE:
                state.scanning = value == Command.ENABLE
                self._say(ACK)
            case Command.DEFAULTS:
                self._set_defaults()
                self._say(ACK)
            case Command.RESET:
                self._set_defaults()
                state.leds = 0
                self._say(ACK, BAT_OK)
            case Command.SET_LEDS | Command.CODE_SET | Command.TYPEMATIC:
                state.argument_of = value
                self._say(ACK)
            case _:
                self._say(RESEND)

    def _argument(self, command: int, value: int) -> None:
        state = self.state
        self._say(ACK)
        if command == Command.SET_LEDS:
            state.leds = value & 7
        elif command == Command.TYPEMATIC:
            state.typematic = value
        elif value == 0:
            self._say(state.code_set)
        elif value <= 3:
            state.code_set = value

    def _set_defaults(self) -> None:
        self.state.scanning = True
        self.state.typematic = 0x2B
        self.state.code_set = 2

    def _say(self, *values: int) -> None:
        room = QUEUE_SIZE - len(self.state.queue)
        self.state.queue += bytes(values[:room])
