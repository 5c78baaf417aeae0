"""The ATA controller: a PCI IDE function in compatibility mode, with a bus master.

Two channels at the places and interrupt lines that they have had since the AT (PCI IDE Controller
Specification 1.0, 2.1); up to four drives. Identity and configuration registers are those of the
IDE function of Intel's PIIX3 (82371SB datasheet, 2.4), which every firmware and kernel knows: a
channel is decoded while Command.IOSpace and the Decode Enable bit of its timing register are set.
That bit is clear after a reset of the real one, and firmware sets it; kernels that are booted
without firmware would find no channel, so here it begins as firmware leaves it.

A disk that is read-only aborts writes: ATA has no way to say it beforehand.

Reads and writes by PIO are done when they are asked for, and the child's own time is the drive's
BSY; DMA is done in turns, a flush beside the guest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

from devices.ata.bus_master import SIZE, BusMaster, BusMasterState
from devices.ata.channel import Channel, ChannelState, CommandBlock, ControlBlock
from devices.ata.drive import Drive
from devices.ata.identify import SERIAL_LENGTH
from devices.ata.medium import Medium
from devices.ata.registers import CHANNELS, DRIVES, SECTOR
from devices.bus import BusDevice, BusType
from devices.bytewise import ByteRegisters
from devices.contract import DeviceHost, Region
from devices.errors import OptionError
from devices.files import HostFile
from devices.pci.config import Header
from devices.pci.contract import BarInfo
from devices.pci.decode import COMMAND, Command
from devices.pci.function import PciFunction, PciState
from devices.pci.registers import Field

VENDOR_ID, DEVICE_ID = 0x8086, 0x7010
CLASS_CODE = 0x010180
"""IDE; bus master; both channels in compatibility mode, and not to be switched."""
COMMAND_BLOCKS, CONTROL_BLOCKS, LINES = (0x1F0, 0x170), (0x3F6, 0x376), (14, 15)
NAMES = ("primary", "secondary")
BUS_MASTER_BAR = 4

TIMING = 0x10
"""The dword with the timing registers of both channels, 16 bits each."""
DECODE_ENABLE = 1 << 15
_IO_SPACE = int(Command.IO_SPACE)


@dataclass
class AtaOptions:
    """Up to four disks; 0 and 1 on the primary channel, 2 and 3 on the secondary.

    Attributes:
        disk0, disk1, disk2, disk3: the raw image, or a block device, of whole sectors of 512 bytes.
        readonly0, readonly1, readonly2, readonly3: the guest cannot write to it.
        serial0, serial1, serial2, serial3: of the disk, as the guest sees it, up to 20 characters.
    """

    disk0: Annotated[str, HostFile(read_only_if="readonly0", unit=SECTOR)] = ""
    readonly0: bool = False
    serial0: str = ""
    disk1: Annotated[str, HostFile(read_only_if="readonly1", unit=SECTOR)] = ""
    readonly1: bool = False
    serial1: str = ""
    disk2: Annotated[str, HostFile(read_only_if="readonly2", unit=SECTOR)] = ""
    readonly2: bool = False
    serial2: str = ""
    disk3: Annotated[str, HostFile(read_only_if="readonly3", unit=SECTOR)] = ""
    readonly3: bool = False
    serial3: str = ""

    def __post_init__(self) -> None:
        for number in range(CHANNELS * DRIVES):
            serial = getattr(self, f"serial{number}")
            if len(serial) > SERIAL_LENGTH or not (serial.isascii() and serial.isprintable()):
                problem = f"is at most {SERIAL_LENGTH} ASCII characters"
                raise OptionError(f"serial{number} {problem}", f"serial{number}")


@dataclass
class AtaState(PciState):
    """Of both channels."""

    channels: list[ChannelState] = field(
        default_factory=lambda: [ChannelState() for _ in range(CHANNELS)]
    )
    bus_masters: list[BusMasterState] = field(
        default_factory=lambda: [BusMasterState() for _ in range(CHANNELS)]
    )


class BusMasters(ByteRegisters):
    """The ports of BAR 4: those of the primary channel's bus master, then the secondary's."""

    def __init__(self, device: Ata) -> None:
        self._device = device

    def read_byte(self, offset: int) -> int:
        channel, register = divmod(offset, SIZE)
        return self._device.bus_masters[channel].read_byte(register)

    def write_byte(self, offset: int, value: int) -> None:
        channel, register = divmod(offset, SIZE)
        self._device.bus_masters[channel].write_byte(register, value)
        self._device.look()


class Ata(PciFunction):
    model: ClassVar[str] = "ata"
    summary: ClassVar[str] = "ATA (IDE) disk controller: disk0=IMAGE,readonly0=BOOL,... to disk3"
    dma: ClassVar[bool] = True
    Options = AtaOptions
    State = AtaState
    options: AtaOptions
    state: AtaState

    def __init__(self, host: DeviceHost, options: AtaOptions | None = None) -> None:
        super().__init__(host, options)
        self.channels = [
            Channel(partial(self._drive_line, number), self.look) for number in range(CHANNELS)
        ]
        self.bus_masters = [BusMaster(channel) for channel in self.channels]
        for number in range(CHANNELS * DRIVES):
            fd = host.fds.get(f"disk{number}")
            if fd is not None:
                self._connect(number, fd)
        self._decoded = [False] * CHANNELS
        self._keep_state()

    def _connect(self, number: int, fd: int) -> None:
        medium = Medium(
            fd,
            getattr(self.options, f"readonly{number}"),
            lambda line: self.host.log(f"disk{number}: {line}"),
        )
        serial = getattr(self.options, f"serial{number}") or f"VMM{number:05}"
        channel, place = divmod(number, DRIVES)
        self.channels[channel].connect(place, lambda changed: Drive(medium, serial, changed))

    def _keep_state(self) -> None:
        """The parts' states are the device's."""
        self.state.channels = [channel.state for channel in self.channels]
        self.state.bus_masters = [master.state for master in self.bus_masters]

    # PCI.

    def header(self) -> Header:
        return Header(
            VENDOR_ID,
            DEVICE_ID,
            CLASS_CODE,
            # In compatibility mode the interrupts are those of the ISA bus: no pin.
            interrupt_pin=0,
            bars=(BarInfo(BUS_MASTER_BAR, 0, BusType.PIO, CHANNELS * SIZE),),
            registers=(
                Field("primary timing", 0x40, 2, DECODE_ENABLE, writable=0xFFFF),
                Field("secondary timing", 0x42, 2, DECODE_ENABLE, writable=0xFFFF),
                Field("drive 1 timing", 0x44, 1, writable=0xFF),
            ),
        )

    def regions(self) -> tuple[Region, ...]:
        """The bus masters, whose writes are turns, and each channel's two blocks."""
        regions = [Region("bus masters", BusType.PIO, CHANNELS * SIZE, synced=True)]
        for name, command, control, line in zip(
            NAMES, COMMAND_BLOCKS, CONTROL_BLOCKS, LINES, strict=True
        ):
            regions.append(Region(name, BusType.PIO, 8, command, irq=line, ahead=True))
            regions.append(Region(f"{name} control", BusType.PIO, 1, control))
        return tuple(regions)

    def handlers(self) -> Sequence[BusDevice]:
        handlers: list[BusDevice] = [BusMasters(self)]
        for number, channel in enumerate(self.channels):
            decoded = partial(self._decoded.__getitem__, number)
            handlers += (CommandBlock(channel, decoded), ControlBlock(channel, decoded))
        return handlers

    def ahead(self, region: int) -> bytes:
        drive = self._read_by_pio(region)
        return b"" if drive is None else drive.ahead()

    def take_ahead(self, region: int, count: int) -> None:
        drive = self._read_by_pio(region)
        if drive is not None:
            drive.take_ahead(count)

    def _read_by_pio(self, region: int) -> Drive | None:
        """The drive that answers at the data port of a command block; None: nothing does."""
        number = (region - 1) // 2
        return self.channels[number].drive if self._decoded[number] else None

    def config_written(self, register: int) -> None:
        self._decode()
        self.look()  # it may have become a bus master

    def _decode(self) -> None:
        timing, on = self.config.values[TIMING], bool(self.config.values[COMMAND] & _IO_SPACE)
        for number in range(CHANNELS):
            self._decoded[number] = on and bool(timing >> 16 * number & DECODE_ENABLE)

    def reset(self) -> None:
        for channel, master in zip(self.channels, self.bus_masters, strict=True):
            master.state = BusMasterState()
            channel.reset()
        self._keep_state()
        self._decode()

    # What the parts ask for.

    def _drive_line(self, number: int, level: bool) -> None:
        if level:
            self.bus_masters[number].interrupted()
        self.host.set_irq(level, number)

    def look(self) -> None:
        """Something changed: whoever waits for a turn or for the host's disk gets it."""
        if any(channel.flushing() for channel in self.channels):
            self.host.want_work()
        if self.may_master() and any(master.ready() for master in self.bus_masters):
            self.host.want_turn()

    def turn(self) -> None:
        if self.may_master():
            for master in self.bus_masters:
                if master.ready():
                    master.run(self.host.memory)
        self.look()

    def work(self) -> None:
        for channel in self.channels:
            channel.finish_flushes()

    # Suspend and state.

    def sleep(self) -> None:
        """What waits for the host's disk ends here; a DMA transfer goes on after `wake`."""
        self.work()
        super().sleep()

    def wake(self) -> None:
        super().wake()
        self.look()

    def validate(self, state: Any) -> None:
        if len(state.channels) != CHANNELS or len(state.bus_masters) != CHANNELS:
            raise ValueError(f"there are {CHANNELS} channels")
        for channel, saved in zip(self.channels, state.channels, strict=True):
            channel.check(saved)
        for saved in state.bus_masters:
            saved.check()

    def restored(self) -> None:
        for channel, saved in zip(self.channels, self.state.channels, strict=True):
            channel.load(saved)
        for master, kept in zip(self.bus_masters, self.state.bus_masters, strict=True):
            master.state = kept
        self._decode()
        for number, channel in enumerate(self.channels):
            # Not by `_drive_line`: that the line was asserted is in the bus master's state.
            self.host.set_irq(channel.settle(), number)
