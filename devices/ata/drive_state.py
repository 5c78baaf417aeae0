"""What there is to a drive, and what of it fits together.

Source: ATA/ATAPI-6, 6.2 (addresses), 6.10 (power), 7 (registers), 9.12 (signature).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from devices.ata.identify import PIO_MODES
from devices.ata.registers import (
    BSY,
    COMMANDS,
    DRQ,
    HEAD,
    LBA,
    MOST_MULTIPLE,
    PASSED,
    READY,
    SECTOR,
    Command,
    Protocol,
)
from devices.contract import U8, U16


class Phase(enum.StrEnum):
    """Where a drive is in a command."""

    IDLE = "idle"
    IN = "in"
    OUT = "out"
    DMA_IN = "dma-in"
    DMA_OUT = "dma-out"
    FLUSH = "flush"


class Power(enum.StrEnum):
    """6.10: a drive that sleeps hears nothing but a reset."""

    ACTIVE = "active"
    IDLE = "idle"
    STANDBY = "standby"
    SLEEP = "sleep"


PHASES = {
    Protocol.PIO_IN: Phase.IN,
    Protocol.PIO_OUT: Phase.OUT,
    Protocol.DMA_IN: Phase.DMA_IN,
    Protocol.DMA_OUT: Phase.DMA_OUT,
}
MULTIPLES = (0, 1, 2, 4, 8, MOST_MULTIPLE)
DEFAULT_MODE = 1 << 3 | PIO_MODES


@dataclass
class DriveState:
    """All there is to a drive beside its medium.

    Attributes:
        features, count, low, mid, high: registers; the upper byte is what each held before, since
            48-bit commands take two writes (6.2.1, 7.1.2).
        interrupt: INTRQ is pending.
        capacity: in sectors, which must be the same when a snapshot is restored; 0: no drive.
        heads, sectors: the current CHS translation.
        multiple: sectors of a block of READ MULTIPLE; 0: not set.
        mode: as SET FEATURES has it.
        phase: of the command under way; `command` is its code.
        sector, left: which one is next between the medium and the buffer, or guest memory, and
            how many are to come.
        buffer: the block that goes through the data register.
        position: of the next byte there; with DMA, in the sector.
    """

    features: U16 = 0
    count: U16 = 0
    low: U16 = 0
    mid: U16 = 0
    high: U16 = 0
    device: U8 = 0
    status: U8 = 0
    error: U8 = 0
    interrupt: bool = False
    capacity: int = 0
    heads: U8 = 0
    sectors: U8 = 0
    multiple: U8 = 0
    mode: U8 = DEFAULT_MODE
    write_cache: bool = True
    look_ahead: bool = True
    power: Power = Power.ACTIVE
    phase: Phase = Phase.IDLE
    command: U8 = 0
    sector: int = 0
    left: int = 0
    buffer: bytearray = field(default_factory=bytearray)
    position: int = 0

    def check(self, capacity: int, held: bool) -> None:
        """See whether this can be the state of a drive with so many sectors.

        Args:
            held: SRST is set.

        Raises:
            ValueError: it cannot.
        """
        if self.capacity != capacity:
            raise ValueError(f"the disk had {self.capacity} sectors, its file has {capacity} now")
        if self.multiple not in MULTIPLES or not 1 <= self.heads <= HEAD + 1 or not self.sectors:
            raise ValueError("no drive has these settings")
        command = COMMANDS.get(self.command)
        if self.phase is Phase.IDLE:
            fits = not (self.buffer or self.position or self.sector or self.left)
            fits &= self.status & (BSY | DRQ) == (BSY if held else 0)
        elif (
            held
            or command is None
            or command.multiple > self.multiple
            or PHASES.get(command.protocol) is not self.phase
        ):
            fits = False
        elif self.phase in (Phase.DMA_IN, Phase.DMA_OUT):
            fits = self._on_medium(1) and not self.buffer and 0 <= self.position < SECTOR
        else:
            sectors, odd = divmod(len(self.buffer), SECTOR)
            fits = self._on_medium(sectors if self.phase is Phase.OUT else 0) and not odd
            fits &= 0 < sectors <= MOST_MULTIPLE and 0 <= self.position < len(self.buffer)
            fits &= self.status & (BSY | DRQ) == DRQ
        if not fits:
            raise ValueError(f"no drive is in phase '{self.phase}' like that")

    def _on_medium(self, least: int) -> bool:
        return self.sector >= 0 and least <= self.left <= self.capacity - self.sector

    def name_sector(self, sector: int) -> None:
        """Put an address into the registers, in the form that the command has."""
        command = COMMANDS.get(self.command)
        if command is not None and command.ext:
            self.low = sector >> 16 & 0xFF00 | sector & 0xFF
            self.mid = sector >> 24 & 0xFF00 | sector >> 8 & 0xFF
            self.high = sector >> 32 & 0xFF00 | sector >> 16 & 0xFF
            return
        if self.device & LBA:
            low, mid, high, head = sector, sector >> 8, sector >> 16, sector >> 24
        else:
            track, number = divmod(sector, self.sectors)
            cylinder, head = divmod(track, self.heads)
            low, mid, high = number + 1, cylinder, cylinder >> 8
        self.low, self.mid, self.high = low & 0xFF, mid & 0xFF, high & 0xFF
        self.device = self.device & ~HEAD | head & HEAD

    def first_sector(self, command: Command) -> int | None:
        """The address in the registers; None if there is none like that."""
        low, mid, high = self.low & 0xFF, self.mid & 0xFF, self.high & 0xFF
        if command.ext:
            sector = low | mid << 8 | high << 16
            before = self.low >> 8 | self.mid >> 8 << 8 | self.high >> 8 << 16
            return sector | before << 24
        if self.device & LBA:
            return low | mid << 8 | high << 16 | (self.device & HEAD) << 24
        head = self.device & HEAD
        if not 1 <= low <= self.sectors or head >= self.heads:
            return None
        return ((mid | high << 8) * self.heads + head) * self.sectors + low - 1

    def sign(self) -> None:
        """The registers after a reset (9.12): what no packet device has in them."""
        self.features = 0
        self.count = self.low = 1
        self.mid = self.high = 0
        self.device = 0
        self.error, self.status = PASSED, READY
