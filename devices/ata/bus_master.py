"""The bus master of one channel: DMA between its drives and guest memory.

The guest puts a table of physical regions (PRDs) into memory, gives a drive a DMA command and sets
Start. Each entry is the address of a region, then its length in bytes (0: 64 KiB) with the top bit
set in the last one.

Sources: "Programming Interface for Bus Master IDE Controller", revision 1.0 (1994); SFF-8038i 1.0.
What they do not say: a table or a region outside RAM sets Error and stops, as a target abort does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from devices.ata.channel import Channel
from devices.ata.drive_state import Phase
from devices.contract import U8, U32
from devices.dma import DmaFault, GuestMemory

COMMAND, STATUS, TABLE = 0, 2, 4
"""Offsets; each of the two bus masters has eight bytes."""
SIZE = 8

START, TO_MEMORY = 1 << 0, 1 << 3
ACTIVE, ERROR, INTERRUPT = 1 << 0, 1 << 1, 1 << 2
DRIVES_CAPABLE = 0b11 << 5
"""Bits that drivers set for themselves."""

SLICE = 512 << 10
"""Bytes of one turn: the guest stands still for as long."""
MOST_REGIONS = 256
"""Of one turn; the host takes up to 1024 pieces in one call."""
_ENTRY = struct.Struct("<II")
_LAST = 1 << 31
_EVEN = 0xFFFF_FFFE
"""Bit 0 of addresses and lengths is zero."""


@dataclass
class BusMasterState:
    """Registers, and how far a transfer has come.

    Attributes:
        table: of the guest; `entry` is the address of the next one to be read.
        address, left: what is still to be served of the region that was read last.
        last: that was the last one.
    """

    command: U8 = 0
    status: U8 = 0
    table: U32 = 0
    entry: U32 = 0
    address: int = 0
    left: int = 0
    last: bool = False

    def check(self) -> None:
        """Raises ValueError if no bus master is ever like that."""
        if self.command & ~(START | TO_MEMORY) or self.table & 3:
            raise ValueError("a bus master has no such registers")
        if self.status & ~(ACTIVE | ERROR | INTERRUPT | DRIVES_CAPABLE):
            raise ValueError("a bus master has no such status")
        if not 0 <= self.address <= 1 << 32 or not 0 <= self.left <= 1 << 16:
            raise ValueError("a bus master was never in the middle of that")


class BusMaster:
    """One of them."""

    def __init__(self, channel: Channel) -> None:
        self.state = BusMasterState()
        self._channel = channel

    # Registers, byte by byte.

    def read_byte(self, offset: int) -> int:
        state = self.state
        if offset >= TABLE:
            return state.table >> 8 * (offset - TABLE) & 0xFF
        return {COMMAND: state.command, STATUS: state.status}.get(offset, 0)

    def write_byte(self, offset: int, value: int) -> None:
        state = self.state
        if offset == COMMAND:
            self._write_command(value & (START | TO_MEMORY))
        elif offset == STATUS:
            state.status &= ~(value & (ERROR | INTERRUPT))
            state.status = state.status & ~DRIVES_CAPABLE | value & DRIVES_CAPABLE
        elif offset >= TABLE and not state.status & ACTIVE:
            shift = 8 * (offset - TABLE)
            state.table = (state.table & ~(0xFF << shift) | value << shift) & ~3

    def _write_command(self, value: int) -> None:
        state = self.state
        started = value & START and not state.command & START
        if state.command & START and value & START:
            value = value & START | state.command & TO_MEMORY  # not to be changed while it runs
        state.command = value
        if started:
            state.status |= ACTIVE
            state.entry, state.left, state.last = state.table, 0, False
        elif not value & START:
            state.status &= ~ACTIVE

    def interrupted(self) -> None:
        """The channel's line was asserted."""
        self.state.status |= INTERRUPT

    # Transfers.

    def ready(self) -> bool:
        """Whether a drive waits for it, and the other way round."""
        state, drive = self.state, self._channel.drive
        if drive is None or not state.status & ACTIVE:
            return False
        wanted = Phase.DMA_IN if state.command & TO_MEMORY else Phase.DMA_OUT
        return drive.state.phase is wanted

    def run(self, memory: GuestMemory) -> None:
        """Move a part, in a turn; again, while `ready`."""
        drive = self._channel.drive
        assert drive is not None
        state, into_memory = self.state, drive.state.phase is Phase.DMA_IN
        try:
            pieces = self._pieces(memory, min(drive.dma_left(), SLICE))
            views = [memory.window(address, length) for address, length in pieces]
        except DmaFault:
            state.status = state.status & ~ACTIVE | ERROR
            return
        if state.last and not state.left:
            # The table is used up; whether the drive has as much is its own affair.
            state.status &= ~ACTIVE
        drive.dma(views)
        if into_memory:
            for address, length in pieces:
                memory.mark(address, length)

    def _pieces(self, memory: GuestMemory, wanted: int) -> list[tuple[int, int]]:
        """The next pieces of memory, of `wanted` bytes together or less; DmaFault if none."""
        state = self.state
        pieces: list[tuple[int, int]] = []
        while wanted and len(pieces) < MOST_REGIONS:
            if not state.left:
                if state.last:
                    break
                address, length = _ENTRY.unpack(memory.read(state.entry, _ENTRY.size))
                state.entry = state.entry + _ENTRY.size & 0xFFFF_FFFF
                state.address, state.last = address & _EVEN, bool(length & _LAST)
                state.left = length & 0xFFFE or 1 << 16
            length = min(state.left, wanted)
            pieces.append((state.address, length))
            state.address, state.left = state.address + length, state.left - length
            wanted -= length
        return pieces
