"""A drive's registers, the life of a command, and the commands that move sectors.

Source: ATA/ATAPI-6, chapters 7, 8 and 9; see `registers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from devices.ata.drive_state import PHASES, DriveState, Phase, Power
from devices.ata.identify import LARGEST_28, Geometry
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
    HIGH,
    IDNF,
    LOW,
    MID,
    READY,
    SECTOR,
    UNC,
    Command,
    Protocol,
)

WIDEST = 4
"""Bytes of the widest read of the data port."""
_WRITES = (Protocol.PIO_OUT, Protocol.DMA_OUT)


class Transfers:
    """A drive that moves sectors; `Drive` adds the commands without data.

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
        state.sign()
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

    def ahead(self) -> bytes:
        """What `read_data` gives next, but for the end of the block, which more comes of."""
        state = self.state
        if state.phase is not Phase.IN:
            return b""
        return bytes(state.buffer[state.position : -WIDEST])

    def take_ahead(self, count: int) -> None:
        """So many bytes of that were read."""
        self.state.position += count

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
        self.state.sign()

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
            state.name_sector(sector)

    def _address(self, command: Command, count: int) -> int | None:
        """The first of `count` sectors; if not all are there the command has failed, and None."""
        state = self.state
        sector = state.first_sector(command)
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
        state.phase = PHASES[command.protocol]
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

    # Flushes.

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
