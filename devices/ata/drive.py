"""One ATA drive: its registers, its commands, and where it is in one of them.

Source: ATA/ATAPI-6, chapters 6 (features), 7, 8 and 9; see `registers`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from devices.ata.identify import (
    LARGEST_28,
    MWDMA_MODES,
    PIO_MODES,
    UDMA_MODES,
    Geometry,
    Settings,
    identify,
)
from devices.ata.medium import Medium
from devices.ata.registers import (
    ABRT,
    BSY,
    COMMANDS,
    COUNT,
    DEVICE,
    DRQ,
    ERR,
    ERROR_FEATURES,
    HEAD,
    HIGH,
    IDNF,
    LBA,
    LOW,
    MID,
    MOST_MULTIPLE,
    PASSED,
    READY,
    SECTOR,
    UNC,
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


_PHASES = {
    Protocol.PIO_IN: Phase.IN,
    Protocol.PIO_OUT: Phase.OUT,
    Protocol.DMA_IN: Phase.DMA_IN,
    Protocol.DMA_OUT: Phase.DMA_OUT,
}
_WRITES = (Protocol.PIO_OUT, Protocol.DMA_OUT)
_MODES = {0: 1, 1: PIO_MODES, 4: MWDMA_MODES, 8: UDMA_MODES}
"""SET FEATURES, table 45: kinds of transfer modes and the last of each."""
_MULTIPLES = (0, 1, 2, 4, 8, MOST_MULTIPLE)
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
        if self.multiple not in _MULTIPLES or not 1 <= self.heads <= HEAD + 1 or not self.sectors:
            raise ValueError("no drive has these settings")
        command = COMMANDS.get(self.command)
        if self.phase is Phase.IDLE:
            fits = not (self.buffer or self.position or self.sector or self.left)
            fits &= self.status & (BSY | DRQ) == (BSY if held else 0)
        elif (
            held
            or command is None
            or command.multiple > self.multiple
            or _PHASES.get(command.protocol) is not self.phase
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


class Drive:
    """One drive.

    Args:
        medium: its sectors.
        serial: its serial number.
        changed: called when anything but the position in a block has changed.
    """

    def __init__(self, medium: Medium, serial: str, changed: Callable[[], None]) -> None:
        self.medium = medium
        self._serial = serial
        self._changed = changed
        self.state = self.fresh()

    def fresh(self) -> DriveState:
        """The state after power-on."""
        usual = Geometry.default(self.medium.capacity)
        state = DriveState(capacity=self.medium.capacity, heads=usual.heads, sectors=usual.sectors)
        _sign(state)
        return state

    # Registers.

    def read_register(self, offset: int, before: bool) -> int:
        """A register of the command block other than Data.

        Args:
            before: what it held before, where two are kept (HOB).
        """
        state = self.state
        if offset == ERROR_FEATURES:
            return state.error
        if offset == DEVICE:
            return state.device
        pair = (0, 0, state.count, state.low, state.mid, state.high)
        if offset < DEVICE:
            return pair[offset] >> 8 if before else pair[offset] & 0xFF
        return state.status

    def write_register(self, offset: int, value: int) -> None:
        """Both drives hear of each write but those to Data and Command (7.1.1)."""
        state = self.state
        if state.status & (BSY | DRQ):
            return
        if offset == ERROR_FEATURES:
            state.features = (state.features << 8 | value) & 0xFFFF
        elif offset == COUNT:
            state.count = (state.count << 8 | value) & 0xFFFF
        elif offset == LOW:
            state.low = (state.low << 8 | value) & 0xFFFF
        elif offset == MID:
            state.mid = (state.mid << 8 | value) & 0xFFFF
        elif offset == HIGH:
            state.high = (state.high << 8 | value) & 0xFFFF
        elif offset == DEVICE:
            state.device = value

    def read_data(self, size: int) -> int:
        """`size` bytes of the block that is on offer; all-ones if none is."""
        state = self.state
        if state.phase is not Phase.IN:
            return (1 << 8 * size) - 1
        position = state.position
        end = position + size
        buffer = state.buffer
        value = int.from_bytes(buffer[position:end], "little")
        if end < len(buffer):
            state.position = end
        else:
            self._next_in()
        return value

    def write_data(self, size: int, value: int) -> None:
        """Bytes of the block that is asked for; without one they go nowhere."""
        state = self.state
        if state.phase is not Phase.OUT:
            return
        position = state.position
        end = position + size
        buffer = state.buffer
        if end < len(buffer):
            buffer[position:end] = value.to_bytes(size, "little")
            state.position = end
        else:
            rest = len(buffer) - position
            buffer[position:] = value.to_bytes(size, "little")[:rest]
            self._block_out()

    # Resets.

    def hold_reset(self) -> None:
        """SRST is set: what was under way is forgotten (9.2)."""
        self._forget()
        self.state.status = BSY
        self.state.interrupt = False

    def end_reset(self) -> None:
        """SRST is cleared, or EXECUTE DEVICE DIAGNOSTIC was given: the signature (9.12)."""
        self._forget()
        self.state.power = Power.ACTIVE
        self.state.interrupt = False
        _sign(self.state)

    def _forget(self) -> None:
        state = self.state
        state.phase, state.sector, state.left = Phase.IDLE, 0, 0
        state.buffer, state.position = bytearray(), 0

    # Commands.

    def execute(self, code: int) -> None:
        """The Command register was written."""
        state = self.state
        if state.status & (BSY | DRQ) or state.power is Power.SLEEP:
            return
        state.interrupt, state.error = False, 0
        state.status = READY
        state.command = code
        command = COMMANDS.get(code)
        if command is None:
            self._fail(ABRT)
        else:
            getattr(self, command.action)(command)
        self._changed()

    def _done(self, _: Command | None = None) -> None:
        """The command has ended well."""
        self._forget()
        self.state.status = READY
        self.state.interrupt = True

    def _fail(self, error: int, sector: int | None = None) -> None:
        """The command has ended with an error, perhaps at a sector, which registers then name."""
        state = self.state
        self._forget()
        state.status, state.error, state.interrupt = READY | ERR, error, True
        if sector is not None:
            self._name_sector(sector)

    def _name_sector(self, sector: int) -> None:
        state = self.state
        command = COMMANDS.get(state.command)
        if command is not None and command.ext:
            state.low = sector >> 16 & 0xFF00 | sector & 0xFF
            state.mid = sector >> 24 & 0xFF00 | sector >> 8 & 0xFF
            state.high = sector >> 32 & 0xFF00 | sector >> 16 & 0xFF
            return
        if state.device & LBA:
            low, mid, high, head = sector, sector >> 8, sector >> 16, sector >> 24
        else:
            track, number = divmod(sector, state.sectors)
            cylinder, head = divmod(track, state.heads)
            low, mid, high = number + 1, cylinder, cylinder >> 8
        state.low, state.mid, state.high = low & 0xFF, mid & 0xFF, high & 0xFF
        state.device = state.device & ~HEAD | head & HEAD

    def _first_sector(self, command: Command) -> int | None:
        """The address in the registers; None if there is none like that."""
        state = self.state
        low, mid, high = state.low & 0xFF, state.mid & 0xFF, state.high & 0xFF
        if command.ext:
            sector = low | mid << 8 | high << 16
            before = state.low >> 8 | state.mid >> 8 << 8 | state.high >> 8 << 16
            return sector | before << 24
        if state.device & LBA:
            return low | mid << 8 | high << 16 | (state.device & HEAD) << 24
        head = state.device & HEAD
        if not 1 <= low <= state.sectors or head >= state.heads:
            return None
        return ((mid | high << 8) * state.heads + head) * state.sectors + low - 1

    def _address(self, command: Command, count: int) -> int | None:
        """The first of `count` sectors; if not all are there the command has failed, and None."""
        state = self.state
        sector = self._first_sector(command)
        if sector is None:
            self._fail(IDNF)
        elif sector + count > state.capacity:
            self._fail(IDNF, max(sector, state.capacity))
        elif sector + count > LARGEST_28 and not command.ext:
            self._fail(IDNF, max(sector, LARGEST_28))
        else:
            return sector
        return None

    def _sector_count(self, command: Command) -> int:
        """Zero means the most that there can be."""
        if command.ext:
            return self.state.count or 1 << 16
        return self.state.count & 0xFF or 1 << 8

    def _transfer(self, command: Command) -> None:
        """READ and WRITE of all kinds."""
        state = self.state
        if command.protocol in _WRITES and self.medium.readonly:
            self._fail(ABRT)
            return
        if command.multiple and not state.multiple:
            self._fail(ABRT)
            return
        count = self._sector_count(command)
        sector = self._address(command, count)
        if sector is None:
            return
        state.power = Power.ACTIVE
        state.phase = _PHASES[command.protocol]
        state.sector, state.left = sector, count
        if state.phase is Phase.IN:
            self._next_in()
        elif state.phase is Phase.OUT:
            self._next_out()
        else:
            state.status = READY | BSY

    def _block(self) -> int:
        """Sectors of the next block."""
        command = COMMANDS[self.state.command]
        return min(self.state.left, self.state.multiple if command.multiple else 1)

    # PIO data-in (9.5): an interrupt for each block that is ready.

    def _next_in(self) -> None:
        state = self.state
        if not state.left:
            self._forget()
            state.status = READY
        else:
            count = self._block()
            try:
                state.buffer = self.medium.read(state.sector, count)
            except OSError as error:
                self.medium.tell(error)
                self._fail(UNC, state.sector)
            else:
                state.position = 0
                state.sector, state.left = state.sector + count, state.left - count
                state.status, state.interrupt = READY | DRQ, True
        self._changed()

    def _identify(self, _: Command) -> None:
        state = self.state
        cylinders = min(state.capacity // (state.heads * state.sectors), 0xFFFF)
        settings = Settings(
            Geometry(cylinders, state.heads, state.sectors),
            state.multiple,
            state.mode,
            state.write_cache,
            state.look_ahead,
        )
        state.buffer = bytearray(identify(state.capacity, self._serial, settings))
        state.phase = Phase.IN
        state.status, state.interrupt = READY | DRQ, True

    # PIO data-out (9.6): no interrupt for the first block, one for each that has been taken.

    def _next_out(self) -> None:
        state = self.state
        state.buffer, state.position = bytearray(self._block() * SECTOR), 0
        state.status = READY | DRQ

    def _block_out(self) -> None:
        state = self.state
        try:
            self.medium.write(state.sector * SECTOR, [memoryview(state.buffer)])
        except OSError as error:
            self.medium.tell(error)
            self._fail(ABRT, state.sector)
        else:
            count = len(state.buffer) // SECTOR
            state.sector, state.left = state.sector + count, state.left - count
            if state.left:
                self._next_out()
                state.interrupt = True
            else:
                self._written()
        self._changed()

    def _written(self) -> None:
        """All sectors of a write went to the file; without a write cache that is not enough."""
        if self.state.write_cache:
            self._done()
        else:
            self._flush()

    # DMA (9.7): the bus master asks for the sectors one part after the other.

    def dma_left(self) -> int:
        """Bytes of the command under way that are to come."""
        return self.state.left * SECTOR - self.state.position

    def dma(self, views: Sequence[memoryview]) -> None:
        """Go on with the command under way: the next bytes are read into `views`, or written."""
        state = self.state
        offset = state.sector * SECTOR + state.position
        try:
            if state.phase is Phase.DMA_IN:
                self.medium.read_into(offset, views)
            else:
                self.medium.write(offset, views)
        except OSError as error:
            self.medium.tell(error)
            self._fail(UNC if state.phase is Phase.DMA_IN else ABRT, state.sector)
        else:
            sectors, state.position = divmod(state.position + sum(map(len, views)), SECTOR)
            state.sector, state.left = state.sector + sectors, state.left - sectors
            if not state.left:
                if state.phase is Phase.DMA_OUT:
                    self._written()
                else:
                    self._done()
        self._changed()

    # Without data.

    def _flush(self, _: Command | None = None) -> None:
        """Busy until `finish_flush`."""
        self._forget()
        self.state.phase = Phase.FLUSH
        self.state.status = READY | BSY

    def finish_flush(self) -> None:
        """Wait for the host's disk; then the command ends."""
        try:
            self.medium.sync()
        except OSError as error:
            self.medium.tell(error)
            self._fail(ABRT)
        else:
            self._done()
        self._changed()

    def _verify(self, command: Command) -> None:
        count = self._sector_count(command)
        sector = self._address(command, count)
        if sector is None:
            return
        self.state.power = Power.ACTIVE
        try:
            self.medium.verify(sector, count)
        except OSError as error:
            self.medium.tell(error)
            self._fail(UNC, sector)
        else:
            self._done()

    def _seek(self, command: Command) -> None:
        if self._address(command, 1) is not None:
            self._done()

    def _initialize(self, _: Command) -> None:
        state = self.state
        if not state.count & 0xFF:
            self._fail(ABRT)
            return
        state.heads, state.sectors = (state.device & HEAD) + 1, state.count & 0xFF
        self._done()

    def _set_multiple(self, _: Command) -> None:
        wanted = self.state.count & 0xFF
        if wanted not in _MULTIPLES:
            self._fail(ABRT)
            return
        self.state.multiple = wanted
        self._done()

    def _set_features(self, _: Command) -> None:
        """8.46."""
        state = self.state
        match state.features & 0xFF:
            case 0x02:
                state.write_cache = True
            case 0x82:
                state.write_cache = False
                self._flush()
                return
            case 0x03:
                mode = state.count & 0xFF
                if mode & 7 > _MODES.get(mode >> 3, -1):
                    self._fail(ABRT)
                    return
                state.mode = mode
            case 0x55 | 0xAA as code:
                state.look_ahead = code == 0xAA
            case 0x66 | 0xCC:
                pass  # settings outlive a software reset in any case
            case _:
                self._fail(ABRT)
                return
        self._done()

    def _stand_by(self, _: Command) -> None:
        """The timer of the form without IMMEDIATE never runs out: nothing is gained by it."""
        self.state.power = Power.STANDBY
        self._flush()

    def _idle(self, _: Command) -> None:
        self.state.power = Power.IDLE
        self._done()

    def _check_power(self, _: Command) -> None:
        """8.7."""
        mode = {Power.STANDBY: 0x00, Power.IDLE: 0x80}.get(self.state.power, 0xFF)
        self.state.count = mode
        self._done()

    def _fall_asleep(self, _: Command) -> None:
        self.state.power = Power.SLEEP
        self._flush()


def _sign(state: DriveState) -> None:
    """The registers after a reset (9.12): what no packet device has in them."""
    state.features = 0
    state.count = state.low = 1
    state.mid = state.high = 0
    state.device = 0
    state.error, state.status = PASSED, READY
