"""What IDENTIFY DEVICE says of a drive: 256 words.

Source: ATA/ATAPI-6, 8.15, tables 26 and following; the words of CHS addressing are those of
ATA/ATAPI-4, 8.12.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from devices.ata.registers import MOST_MULTIPLE, SECTOR

MODEL_NAME = "JAILED-VMM ATA DISK"
FIRMWARE = "1.0"
SERIAL_LENGTH = 20

LARGEST_28 = (1 << 28) - 1
"""The most sectors that 28-bit commands are told of (6.2.1)."""
_CHS_HEADS, _CHS_SECTORS, _CHS_CYLINDERS = 16, 63, 16383
"""6.2: the default translation, of at most 8 GiB."""
PIO_MODES, MWDMA_MODES, UDMA_MODES = 4, 2, 5
"""The fastest of each kind (PIO 3 and 4 are those with flow control)."""

_LBA_DMA = 1 << 9 | 1 << 8 | 1 << 10 | 1 << 11  # with IORDY, which may be switched off
_MAJOR = sum(1 << version for version in (3, 4, 5, 6))
_WRITE_CACHE, _LOOK_AHEAD = 1 << 5, 1 << 6
_POWER_MANAGEMENT = 1 << 3
_FLUSH_EXT, _FLUSH, _LBA48 = 1 << 13, 1 << 12, 1 << 10
_VALID = 1 << 14
_SIGNATURE = 0xA5


class Geometry(NamedTuple):
    """A translation of cylinder, head and sector numbers."""

    cylinders: int
    heads: int
    sectors: int

    @classmethod
    def default(cls, capacity: int) -> Geometry:
        """Of a disk of `capacity` sectors."""
        cylinders = min(capacity // (_CHS_HEADS * _CHS_SECTORS), _CHS_CYLINDERS)
        return cls(cylinders, _CHS_HEADS, _CHS_SECTORS)


class Settings(NamedTuple):
    """What a guest has set and IDENTIFY DEVICE shows."""

    geometry: Geometry
    multiple: int
    mode: int
    write_cache: bool
    look_ahead: bool


def identify(capacity: int, serial: str, now: Settings) -> bytes:
    """The 512 bytes.

    Args:
        capacity: in sectors.
        serial: up to `SERIAL_LENGTH` ASCII characters.
    """
    words = [0] * 256
    usual, (cylinders, heads, sectors) = Geometry.default(capacity), now.geometry
    words[0] = 1 << 6  # ATA, not removable
    words[1], words[3], words[6] = usual
    _text(words, 10, serial, SERIAL_LENGTH)
    _text(words, 23, FIRMWARE, 8)
    _text(words, 27, MODEL_NAME, 40)
    words[47] = 0x80 << 8 | MOST_MULTIPLE
    words[48] = 1  # obsolete: the data register may be read 32 bits at a time
    words[49] = _LBA_DMA
    words[50] = _VALID
    words[51] = 2 << 8  # obsolete: PIO timing
    words[53] = 0b111
    words[54], words[55], words[56] = now.geometry
    _long(words, 57, cylinders * heads * sectors)
    words[59] = 1 << 8 | now.multiple if now.multiple else 0
    _long(words, 60, min(capacity, LARGEST_28))
    words[63] = _modes(MWDMA_MODES, 0x20, now.mode)
    words[64] = 0b11
    words[65] = words[66] = words[67] = words[68] = 120  # ns of one cycle
    words[80] = _MAJOR
    words[82] = words[85] = _WRITE_CACHE | _LOOK_AHEAD | _POWER_MANAGEMENT
    words[85] &= ~(0 if now.write_cache else _WRITE_CACHE)
    words[85] &= ~(0 if now.look_ahead else _LOOK_AHEAD)
    words[83] = words[86] = _FLUSH_EXT | _FLUSH | _LBA48
    words[83] |= _VALID
    words[84] = words[87] = _VALID
    words[88] = _modes(UDMA_MODES, 0x40, now.mode)
    words[93] = _VALID | 1 << 13 | 1  # passed its reset; the cable has 80 wires
    _long(words, 100, capacity & 0xFFFF_FFFF)
    _long(words, 102, capacity >> 32)
    words[255] = _SIGNATURE
    data = bytearray(struct.pack("<256H", *words))
    data[SECTOR - 1] = -sum(data) & 0xFF
    return bytes(data)


def _modes(fastest: int, kind: int, chosen: int) -> int:
    """The modes of one kind, and which of them SET FEATURES chose."""
    bits = (1 << fastest + 1) - 1
    return bits | (1 << 8 + (chosen & 7) if chosen & ~7 == kind else 0)


def _text(words: list[int], first: int, text: str, length: int) -> None:
    """The first character of each pair is in the upper byte."""
    data = text.encode("ascii", "replace").ljust(length)[:length]
    words[first : first + length // 2] = struct.unpack(f">{length // 2}H", data)


def _long(words: list[int], first: int, value: int) -> None:
    words[first], words[first + 1] = value & 0xFFFF, value >> 16
