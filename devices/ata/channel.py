"""One ATA channel: a cable with up to two drives, as its registers show it.

Both drives hear of every write; the one that is selected answers. If there is only drive 0 it
answers for drive 1 as well, with a Status of zero; if there is none where the guest looks, the
cable floats (ATA/ATAPI-6, 9.16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from devices.ata.drive import Drive
from devices.ata.drive_state import DriveState, Phase
from devices.ata.registers import (
    BSY,
    DATA,
    DEV,
    DEVICE,
    DIAGNOSTIC,
    DRIVES,
    DRQ,
    FLOATING,
    FLOATING_STATUS,
    HOB,
    NIEN,
    SRST,
    STATUS_COMMAND,
)
from devices.bytewise import ByteRegisters
from devices.contract import U8

_STICKY = NIEN | SRST


@dataclass
class ChannelState:
    """`control`: nIEN, SRST and HOB as written; `selected`: 0 or 1."""

    control: U8 = 0
    selected: U8 = 0
    drives: list[DriveState] = field(default_factory=lambda: [DriveState() for _ in range(DRIVES)])


class Channel:
    """The two drives of a cable.

    Args:
        line: drives the interrupt line (INTRQ).
        busy: told when a drive has something to do beside the guest, or for the bus master.
    """

    def __init__(self, line: Callable[[bool], None], busy: Callable[[], None]) -> None:
        self.state = ChannelState()
        self.drives: list[Drive | None] = [None] * DRIVES
        self.level = False
        self._line = line
        self._busy = busy

    def connect(self, number: int, make: Callable[[Callable[[], None]], Drive]) -> None:
        """Put a drive on the cable; `make` is given what the drive calls when it has changed."""
        self.drives[number] = drive = make(self.follow)
        self.state.drives[number] = drive.state

    @property
    def drive(self) -> Drive | None:
        """The one that is selected, if it is there."""
        return self.drives[self.state.selected]

    def present(self) -> list[Drive]:
        return [drive for drive in self.drives if drive is not None]

    def follow(self) -> None:
        """A drive has changed: the line follows, and who else waits for it hears of it."""
        drive = self.drive
        wanted = drive is not None and drive.state.interrupt and not self.state.control & NIEN
        if wanted != self.level:
            self.level = wanted
            self._line(wanted)
        if any(each.state.status & BSY for each in self.present()):
            self._busy()

    # Registers.

    def read(self, offset: int) -> int:
        """A register of the command block other than Data; reading Status takes the interrupt."""
        if offset != STATUS_COMMAND:
            answering = self.drive or self._stand_in()
            if answering is None:
                return FLOATING
            return answering.read_register(offset, bool(self.state.control & HOB))
        status = self.alternate_status()
        drive = self.drive
        if drive is not None and drive.state.interrupt:
            drive.state.interrupt = False
            self.follow()
        return status

    def alternate_status(self) -> int:
        """Status without taking the interrupt (7.3)."""
        drive = self.drive
        if drive is not None:
            return drive.state.status
        return FLOATING_STATUS if self._stand_in() is None else 0

    def _stand_in(self) -> Drive | None:
        """Drive 0 answers for a drive 1 that is not there, but not the other way round."""
        return self.drives[0] if self.state.selected else None

    def write(self, offset: int, value: int) -> None:
        """A register of the command block other than Data."""
        self.state.control &= _STICKY
        if offset == STATUS_COMMAND:
            self._command(value)
            return
        for drive in self.present():
            drive.write_register(offset, value)
        if offset == DEVICE:
            self.state.selected = 1 if value & DEV else 0
            self.follow()

    def _command(self, code: int) -> None:
        drive = self.drive
        if code != DIAGNOSTIC:
            if drive is not None:
                drive.execute(code)
            return
        # For both drives, whichever is selected (8.9); drive 0 reports.
        if self.state.control & SRST or any(
            each.state.status & (BSY | DRQ) for each in self.present()
        ):
            return
        for each in self.present():
            each.end_reset()
        self.state.selected = 0
        if self.drives[0] is not None:
            self.drives[0].state.interrupt = True
        self.follow()

    def write_control(self, value: int) -> None:
        """The Device Control register (7.8)."""
        before, self.state.control = self.state.control, value & (HOB | NIEN | SRST)
        if value & SRST and not before & SRST:
            for drive in self.present():
                drive.hold_reset()
        elif before & SRST and not value & SRST:
            for drive in self.present():
                drive.end_reset()
            self.state.selected = 0
        self.follow()

    # Beside commands.

    def flushing(self) -> bool:
        return any(drive.state.phase is Phase.FLUSH for drive in self.present())

    def finish_flushes(self) -> None:
        """Wait for the host's disk where a drive was asked to."""
        for drive in self.present():
            if drive.state.phase is Phase.FLUSH:
                drive.finish_flush()

    # State.

    def reset(self) -> None:
        """As after power-on."""
        states = [DriveState() if each is None else each.fresh() for each in self.drives]
        self.load(ChannelState(drives=states))
        self.follow()

    def check(self, state: ChannelState) -> None:
        """See whether `state` can be this channel's.

        Raises:
            ValueError: it cannot.
        """
        if state.selected > 1 or state.control & ~(HOB | NIEN | SRST):
            raise ValueError("a channel has no such registers")
        if len(state.drives) != DRIVES:
            raise ValueError(f"a channel has {DRIVES} drives, not {len(state.drives)}")
        for drive, saved in zip(self.drives, state.drives, strict=True):
            if drive is None:
                if saved != DriveState():
                    raise ValueError("a drive that was there is not there now")
            else:
                saved.check(drive.medium.capacity, bool(state.control & SRST))

    def load(self, state: ChannelState) -> None:
        """Take up a state that `check` accepted; `settle` follows."""
        self.state = state
        for drive, saved in zip(self.drives, state.drives, strict=True):
            if drive is not None:
                drive.state = saved

    def settle(self) -> bool:
        """After a restore: the level of the line, whatever it was."""
        drive = self.drive
        self.level = bool(drive and drive.state.interrupt and not self.state.control & NIEN)
        return self.level


class CommandBlock(ByteRegisters):
    """The eight ports of the command block, while they are decoded.

    Args:
        decoded: whether they are.
    """

    def __init__(self, channel: Channel, decoded: Callable[[], bool]) -> None:
        self._channel = channel
        self._decoded = decoded

    def read(self, offset: int, size: int) -> int:
        if offset == DATA and size > 1 and self._decoded():
            drive = self._channel.drive
            return (1 << 8 * size) - 1 if drive is None else drive.read_data(size)
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DATA and size > 1 and self._decoded():
            drive = self._channel.drive
            if drive is not None:
                drive.write_data(size, value)
            return
        super().write(offset, size, value)

    def read_byte(self, offset: int) -> int:
        if not self._decoded():
            return FLOATING
        if offset == DATA:
            drive = self._channel.drive
            return FLOATING if drive is None else drive.read_data(1)
        return self._channel.read(offset)

    def write_byte(self, offset: int, value: int) -> None:
        if not self._decoded():
            return
        if offset != DATA:
            self._channel.write(offset, value)
        elif (drive := self._channel.drive) is not None:
            drive.write_data(1, value)


class ControlBlock(ByteRegisters):
    """The one port of the control block: Alternate Status and Device Control."""

    def __init__(self, channel: Channel, decoded: Callable[[], bool]) -> None:
        self._channel = channel
        self._decoded = decoded

    def read_byte(self, offset: int) -> int:
        return self._channel.alternate_status() if self._decoded() else FLOATING

    def write_byte(self, offset: int, value: int) -> None:
        if self._decoded():
            self._channel.write_control(value)
