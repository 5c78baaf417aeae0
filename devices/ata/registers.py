"""The registers of an ATA channel, and the commands of its drives.

Source: ATA/ATAPI-6 (INCITS 361), chapters 7 (registers) and 8 (commands); what it calls obsolete
(CHS addresses, RECALIBRATE, SEEK) is from ATA/ATAPI-4 (NCITS 317).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SECTOR: Final = 512
"""Bytes."""
CHANNELS: Final = 2
DRIVES: Final = 2
"""On one channel."""
MOST_MULTIPLE: Final = 16
"""Sectors of one block of READ MULTIPLE and WRITE MULTIPLE."""

# Offsets in the command block (7.2); of those with two names the second is for writes.
DATA, ERROR_FEATURES, COUNT, LOW, MID, HIGH, DEVICE, STATUS_COMMAND = range(8)

# The Status register (7.15). Plain integers: these are in the path of an access.
ERR: Final = 1 << 0
DRQ: Final = 1 << 3
DSC: Final = 1 << 4
"""Obsolete since ATA/ATAPI-4, and what drivers expect of a drive that is ready."""
DRDY: Final = 1 << 6
BSY: Final = 1 << 7
READY: Final = DRDY | DSC

# The Error register (7.9).
ABRT: Final = 1 << 2
IDNF: Final = 1 << 4
UNC: Final = 1 << 6
PASSED: Final = 1
"""Not an error but the diagnostic code of a drive that is well (8.9)."""

# The Device register (7.7).
DEV: Final = 1 << 4
LBA: Final = 1 << 6
HEAD: Final = 0xF
OBSOLETE: Final = 1 << 7 | 1 << 5
"""Set by drivers since the first disks."""

# The Device Control register (7.8).
NIEN: Final = 1 << 1
SRST: Final = 1 << 2
HOB: Final = 1 << 7

FLOATING: Final = 0xFF
FLOATING_STATUS: Final = 0x7F
"""Nobody drives the cable: the host pulls DD7 down (5.2), the other lines float high."""


class Protocol(enum.Enum):
    """How a command goes on after it was given (chapter 9)."""

    NON_DATA = enum.auto()
    PIO_IN = enum.auto()
    PIO_OUT = enum.auto()
    DMA_IN = enum.auto()
    DMA_OUT = enum.auto()


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table.

    Attributes:
        action: the method of `Drive` that carries it out.
        protocol: of those that move sectors.
        ext: its address and count are 48-bit ones.
        multiple: a block of data has as many sectors as SET MULTIPLE MODE said.
    """

    name: str
    action: str
    protocol: Protocol = Protocol.NON_DATA
    ext: bool = False
    multiple: bool = False


def _read(name: str, *, ext: bool = False, multiple: bool = False) -> Command:
    return Command(name, "_transfer", Protocol.PIO_IN, ext, multiple)


def _write(name: str, *, ext: bool = False, multiple: bool = False) -> Command:
    return Command(name, "_transfer", Protocol.PIO_OUT, ext, multiple)


COMMANDS: Final[Mapping[int, Command]] = {
    **{code: Command("RECALIBRATE", "_done") for code in range(0x10, 0x20)},
    0x20: _read("READ SECTOR(S)"),
    0x21: _read("READ SECTOR(S), without retries"),
    0x24: _read("READ SECTOR(S) EXT", ext=True),
    0x25: Command("READ DMA EXT", "_transfer", Protocol.DMA_IN, ext=True),
    0x29: _read("READ MULTIPLE EXT", ext=True, multiple=True),
    0x30: _write("WRITE SECTOR(S)"),
    0x31: _write("WRITE SECTOR(S), without retries"),
    0x34: _write("WRITE SECTOR(S) EXT", ext=True),
    0x35: Command("WRITE DMA EXT", "_transfer", Protocol.DMA_OUT, ext=True),
    0x39: _write("WRITE MULTIPLE EXT", ext=True, multiple=True),
    0x40: Command("READ VERIFY SECTOR(S)", "_verify"),
    0x41: Command("READ VERIFY SECTOR(S), without retries", "_verify"),
    0x42: Command("READ VERIFY SECTOR(S) EXT", "_verify", ext=True),
    **{code: Command("SEEK", "_seek") for code in range(0x70, 0x80)},
    # 0x90, EXECUTE DEVICE DIAGNOSTIC, is for both drives: see `Channel`.
    0x91: Command("INITIALIZE DEVICE PARAMETERS", "_initialize"),
    0xC4: _read("READ MULTIPLE", multiple=True),
    0xC5: _write("WRITE MULTIPLE", multiple=True),
    0xC6: Command("SET MULTIPLE MODE", "_set_multiple"),
    0xC8: Command("READ DMA", "_transfer", Protocol.DMA_IN),
    0xC9: Command("READ DMA, without retries", "_transfer", Protocol.DMA_IN),
    0xCA: Command("WRITE DMA", "_transfer", Protocol.DMA_OUT),
    0xCB: Command("WRITE DMA, without retries", "_transfer", Protocol.DMA_OUT),
    0xE0: Command("STANDBY IMMEDIATE", "_stand_by"),
    0xE1: Command("IDLE IMMEDIATE", "_idle"),
    0xE2: Command("STANDBY", "_stand_by"),
    0xE3: Command("IDLE", "_idle"),
    0xE5: Command("CHECK POWER MODE", "_check_power"),
    0xE6: Command("SLEEP", "_fall_asleep"),
    0xE7: Command("FLUSH CACHE", "_flush"),
    0xEA: Command("FLUSH CACHE EXT", "_flush"),
    0xEC: Command("IDENTIFY DEVICE", "_identify", Protocol.PIO_IN),
    0xEF: Command("SET FEATURES", "_set_features"),
}
"""Everything else is aborted, as drives abort what they do not have: NOP (0x00) and what is for
packet devices, IDENTIFY PACKET DEVICE (0xA1), too."""
DIAGNOSTIC: Final = 0x90
