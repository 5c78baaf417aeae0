"""What guests poke at for an 80x25 text screen: the VGA's ports, and a picture of its memory.

There is no graphics. The text at 0xB8000 is plain guest RAM; this device keeps the registers, of
which the CRTC's say where the screen and its cursor are, and `render` makes text of the bytes.

Registers are indexed pairs (IBM VGA Technical Reference; FreeVGA): attribute controller 0x3C0
(index and data by turns, set to "index" by reading input status 1), sequencer 0x3C4, graphics
controller 0x3CE, CRTC 0x3D4, palette 0x3C7 to 0x3C9, miscellaneous output 0x3C2 (read at 0x3CC),
input status 1 at 0x3DA. What has no meaning for text is kept and read back. Only the colour
addresses answer, whatever the miscellaneous register chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

from devices.bus import BusType
from devices.bytewise import ByteRegisters
from devices.contract import U8, Device, DeviceHost, Region

COLUMNS, ROWS = 80, 25
TEXT_ADDRESS = 0xB8000
TEXT_SIZE = 0x8000
"""Of the memory at `TEXT_ADDRESS`, in bytes; a cell is a character and an attribute."""

PORTS = 0x3C0
ATTRIBUTES, SEQUENCER_REGISTERS, GRAPHICS_REGISTERS, CRTC_REGISTERS = 21, 5, 9, 25
PALETTE_SIZE = 256 * 3
_STATUS_TOGGLES = 0b1001
"""Display disabled and vertical retrace: each read shows the other phase, so no wait is endless."""
_MISC_COLOUR = 0x67

_GLYPHS = (
    " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
    + bytes(range(0x20, 0x7F)).decode("cp437")
    + "⌂"
    + bytes(range(0x80, 0x100)).decode("cp437").replace("\xa0", " ")
)
"""Code page 437 as the adapter shows it: the control codes are pictures too."""


class Crtc(IntEnum):
    """The CRTC registers that text depends on."""

    CURSOR_START = 0x0A
    START_HIGH = 0x0C
    START_LOW = 0x0D
    CURSOR_HIGH = 0x0E
    CURSOR_LOW = 0x0F


CURSOR_OFF = 1 << 5
"""In `Crtc.CURSOR_START`."""


def _text_mode() -> bytearray:
    """The CRTC of mode 3 as a VGA BIOS leaves it; the positions are zero."""
    return bytearray.fromhex("5f4f50825581bf1f004f0d0e000000009c8e8f281f96b9a3ff")


@dataclass
class VgaTextState:
    """The registers, and where each index points.

    Attributes:
        attribute_data: the next write to 0x3C0 is data.
        palette_read, palette_write: position of the next byte, 3 a colour.
        status: input status 1 as the last read showed it.
    """

    misc: U8 = _MISC_COLOUR
    feature: U8 = 0
    attribute_index: U8 = 0
    attribute_data: bool = False
    sequencer_index: U8 = 0
    graphics_index: U8 = 0
    crtc_index: U8 = 0
    palette_mask: U8 = 0xFF
    palette_read: int = 0
    palette_write: int = 0
    status: U8 = 0
    attributes: bytearray = field(default_factory=lambda: bytearray(ATTRIBUTES))
    sequencer: bytearray = field(default_factory=lambda: bytearray.fromhex("0300030002"))
    graphics: bytearray = field(default_factory=lambda: bytearray.fromhex("0000000000100e0fff"))
    crtc: bytearray = field(default_factory=_text_mode)
    palette: bytearray = field(default_factory=lambda: bytearray(PALETTE_SIZE))

    def __post_init__(self) -> None:
        sizes = (
            ("attributes", self.attributes, ATTRIBUTES),
            ("sequencer", self.sequencer, SEQUENCER_REGISTERS),
            ("graphics", self.graphics, GRAPHICS_REGISTERS),
            ("crtc", self.crtc, CRTC_REGISTERS),
            ("palette", self.palette, PALETTE_SIZE),
        )
        for name, registers, size in sizes:
            if len(registers) != size:
                raise ValueError(f"{name}: {len(registers)} registers, not {size}")
        for position in (self.palette_read, self.palette_write):
            if not 0 <= position < PALETTE_SIZE:
                raise ValueError(f"palette position {position}")
        if self.status not in (0, _STATUS_TOGGLES):
            raise ValueError(f"input status 1 cannot be {self.status:#x}")


@dataclass(frozen=True)
class Screen:
    """A text screen.

    Attributes:
        lines: `ROWS` lines, blanks at their ends removed.
        cursor: (row, column), or None if it is off or not on the screen.
    """

    lines: tuple[str, ...]
    cursor: tuple[int, int] | None

    def __str__(self) -> str:
        return "\n".join(self.lines).rstrip("\n")


def render(memory: bytes | memoryview, start: int = 0, cursor: int | None = None) -> Screen:
    """Make text of text memory.

    Args:
        memory: from `TEXT_ADDRESS`, up to `TEXT_SIZE` bytes; what is missing is blank.
        start: the cell that is shown first; positions wrap at the end of the memory.
        cursor: its cell, counted as `start` is.
    """
    cells = TEXT_SIZE // 2
    characters = bytes(memory[:TEXT_SIZE:2]).ljust(cells, b"\0")
    lines = []
    for row in range(ROWS):
        first = (start + row * COLUMNS) % cells
        shown = (characters[first:] + characters[:first])[:COLUMNS]
        lines.append("".join(_GLYPHS[code] for code in shown).rstrip())
    place = None
    if cursor is not None and (cursor - start) % cells < ROWS * COLUMNS:
        place = divmod((cursor - start) % cells, COLUMNS)
    return Screen(tuple(lines), place)


class VgaText(ByteRegisters, Device):
    model: ClassVar[str] = "vga-text"
    summary: ClassVar[str] = "the ports of a VGA that can only do text"
    State = VgaTextState
    state: VgaTextState

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self._readers: dict[int, Callable[[], int]] = {
            0x00: lambda: self.state.attribute_index,
            0x01: lambda: _at(self.state.attributes, self.state.attribute_index & 0x1F),
            0x02: lambda: 0,
            0x04: lambda: self.state.sequencer_index,
            0x05: lambda: _at(self.state.sequencer, self.state.sequencer_index),
            0x06: lambda: self.state.palette_mask,
            0x07: lambda: 0,
            0x08: lambda: self.state.palette_write // 3,
            0x09: self._read_palette,
            0x0A: lambda: self.state.feature,
            0x0C: lambda: self.state.misc,
            0x0E: lambda: self.state.graphics_index,
            0x0F: lambda: _at(self.state.graphics, self.state.graphics_index),
            0x14: lambda: self.state.crtc_index,
            0x15: lambda: _at(self.state.crtc, self.state.crtc_index),
            0x1A: self._read_status,
        }

    def regions(self) -> tuple[Region, ...]:
        return (Region("registers", BusType.PIO, 0x20, start=PORTS),)

    def read_byte(self, offset: int, /) -> int:
        reader = self._readers.get(offset)
        return 0xFF if reader is None else reader()

    def write_byte(self, offset: int, value: int, /) -> None:
        state = self.state
        match offset:
            case 0x00:
                self._write_attribute(value)
            case 0x02:
                state.misc = value
            case 0x04:
                state.sequencer_index = value
            case 0x05:
                _put(state.sequencer, state.sequencer_index, value)
            case 0x06:
                state.palette_mask = value
            case 0x07:
                state.palette_read = value * 3
            case 0x08:
                state.palette_write = value * 3
            case 0x09:
                state.palette[state.palette_write] = value & 0x3F
                state.palette_write = (state.palette_write + 1) % PALETTE_SIZE
            case 0x0E:
                state.graphics_index = value
            case 0x0F:
                _put(state.graphics, state.graphics_index, value)
            case 0x14:
                state.crtc_index = value
            case 0x15:
                _put(state.crtc, state.crtc_index, value)
            case 0x1A:
                state.feature = value

    def screen(self, memory: bytes | memoryview) -> Screen:
        """What is on the screen, given the text memory; see `render`."""
        crtc = self.state.crtc
        start = crtc[Crtc.START_HIGH] << 8 | crtc[Crtc.START_LOW]
        cursor = crtc[Crtc.CURSOR_HIGH] << 8 | crtc[Crtc.CURSOR_LOW]
        off = crtc[Crtc.CURSOR_START] & CURSOR_OFF
        return render(memory, start, None if off else cursor)

    def _read_status(self) -> int:
        state = self.state
        state.attribute_data = False
        state.status ^= _STATUS_TOGGLES
        return state.status

    def _read_palette(self) -> int:
        state = self.state
        value = state.palette[state.palette_read]
        state.palette_read = (state.palette_read + 1) % PALETTE_SIZE
        return value

    def _write_attribute(self, value: int) -> None:
        state = self.state
        if state.attribute_data:
            _put(state.attributes, state.attribute_index & 0x1F, value)
        else:
            state.attribute_index = value & 0x3F
        state.attribute_data = not state.attribute_data


def _at(registers: bytearray, index: int) -> int:
    """A register that does not exist reads 0."""
    return registers[index] if index < len(registers) else 0


def _put(registers: bytearray, index: int, value: int) -> None:
    if index < len(registers):
        registers[index] = value
