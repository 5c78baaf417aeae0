"""The interrupt controller of a PC: two 8259A in cascade and their ELCR.

The slave's output drives input 2 of the master. Ports: master 0x20-0x21, slave 0xA0-0xA1, ELCR
0x4D0-0x4D1 (Intel 82371AB, 4.2.1 "Interrupt controller registers"). `PicPair` lives in the
machine's own process: the vCPU loop asks it before every slice of guest code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from devices.bus import BusDevice, BusType
from devices.bytewise import ByteRegisters
from devices.contract import Device, DeviceHost, Region
from devices.irqchip.i8259 import SPURIOUS, Chip, ChipState

CASCADE_IRQ = 2
_CASCADE = 1 << CASCADE_IRQ
_MASTER_LEVEL_MASK = 0xF8
"""IRQ 0, 1 and 2 are always edge-triggered (82371AB, 4.2.1.7)."""
_SLAVE_LEVEL_MASK = 0xDE
"""So are IRQ 8 and 13."""


@dataclass
class PicState:
    master: ChipState = field(default_factory=ChipState)
    slave: ChipState = field(default_factory=ChipState)

    def __post_init__(self) -> None:
        if self.master.level & ~_MASTER_LEVEL_MASK or self.slave.level & ~_SLAVE_LEVEL_MASK:
            raise ValueError("the ELCR names an IRQ that is always edge-triggered")
        asking = Chip(self.slave, 0, _SLAVE_LEVEL_MASK).candidate() is not None
        if asking != bool(self.master.lines & _CASCADE):
            raise ValueError("the master's input 2 is not what the slave drives")


class PicPair(Device):
    """Sixteen interrupt lines in, one interrupt request to the CPU out.

    Args:
        on_output: called with the level of the master's INT output when that changed.
    """

    model: ClassVar[str] = "pic"
    summary: ClassVar[str] = "two cascaded 8259A interrupt controllers"
    State = PicState
    state: PicState

    def __init__(
        self,
        host: DeviceHost,
        options: Any = None,
        *,
        on_output: Callable[[bool], None] | None = None,
    ) -> None:
        super().__init__(host, options)
        self._on_output = on_output
        self._master = Chip(self.state.master, _CASCADE, _MASTER_LEVEL_MASK)
        self._slave = Chip(self.state.slave, 0, _SLAVE_LEVEL_MASK)
        self._pending = False

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("master", BusType.PIO, 2, start=0x20),
            Region("slave", BusType.PIO, 2, start=0xA0),
            Region("elcr", BusType.PIO, 2, start=0x4D0),
        )

    def handlers(self) -> Sequence[BusDevice]:
        return (
            _ChipPorts(self, self._master),
            _ChipPorts(self, self._slave),
            _Elcr(self, (self._master, self._slave)),
        )

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive one of the lines 0..15.

        Raises:
            ValueError: there is no such line; IRQ 2 is the wire between the two chips.
        """
        if not 0 <= irq <= 15 or irq == CASCADE_IRQ:
            raise ValueError(f"no interrupt line {irq}: there are 0..15 without {CASCADE_IRQ}")
        if irq < 8:
            self._master.set_line(1 << irq, level)
            self._drive_output()
        else:
            self._slave.set_line(1 << irq - 8, level)
            self.update()

    def pending(self) -> bool:
        """Whether the master asks the CPU for an interrupt (its INT output)."""
        return self._pending

    def acknowledge(self) -> int:
        """The CPU takes the interrupt (INTA): the vector, 0..255.

        If the request is gone, it is that of IRQ 7 (of the slave: IRQ 15), which is then not in
        service: "Edge and Level Triggered Modes", default IR7.
        """
        level = self._master.acknowledge() if self._pending else SPURIOUS
        if self._pending and level == CASCADE_IRQ:
            vector = self.state.slave.vector | self._slave.acknowledge()
            # The slave's output falls with INTA: what it asks for next is a new edge.
            self._master.set_line(_CASCADE, False)
        else:
            vector = self.state.master.vector | level
        self.update()
        return vector

    def update(self) -> None:
        """Settle the wire from slave to master, and the output."""
        self._master.set_line(_CASCADE, self._slave.candidate() is not None)
        self._drive_output()

    def _drive_output(self) -> None:
        pending = self._master.candidate() is not None
        if pending != self._pending:
            self._pending = pending
            if self._on_output is not None:
                self._on_output(pending)

    def drop_cascade(self) -> None:
        """A poll of the slave acknowledges as INTA does; see `acknowledge`."""
        self._master.set_line(_CASCADE, False)

    def restored(self) -> None:
        self._master.state = self.state.master
        self._slave.state = self.state.slave
        self.update()


class _ChipPorts(ByteRegisters):
    def __init__(self, pair: PicPair, chip: Chip) -> None:
        self._pair = pair
        self._chip = chip

    def read_byte(self, offset: int, /) -> int:
        polling = self._chip.state.poll
        value = self._chip.read(offset)
        if polling:
            if value and self._chip.state is self._pair.state.slave:
                self._pair.drop_cascade()
            self._pair.update()
        return value

    def write_byte(self, offset: int, value: int, /) -> None:
        self._chip.write(offset, value)
        self._pair.update()


class _Elcr(ByteRegisters):
    def __init__(self, pair: PicPair, chips: tuple[Chip, Chip]) -> None:
        self._pair = pair
        self._chips = chips

    def read_byte(self, offset: int, /) -> int:
        return self._chips[offset].state.level

    def write_byte(self, offset: int, value: int, /) -> None:
        self._chips[offset].set_level_mode(value)
        self._pair.update()
