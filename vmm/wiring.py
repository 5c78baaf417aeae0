"""What devices tell the machine, and where it goes: interrupts, console bytes, exits, failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from devices.errors import DeviceFailure
from devices.irqchip.ioapic import PINS
from devices.irqchip.pc import IrqChip
from devices.pci.host_bridge import PciRoot
from devices.spans import PAGE_SHIFT
from proxy.shape import ISA_LINES
from vmm.attachment import Attachment
from vmm.config import DmaMode
from vmm.console import ConsoleBuffer
from vmm.cpu.engine import Cpu
from vmm.log_limit import LogLimit

_LOG_KEEP = 1000
_LINES = ISA_LINES | frozenset(range(16, PINS))


@dataclass
class Wiring:
    """Implements `vmm.attachment.DeviceEvents` for one machine.

    Attributes:
        wires: by device name: where its interrupt pin leads if not to a line of the board.
        consoles: by device name; what a device without one prints is kept nowhere.
        turn_wanted: called with the name of a device that asks for a turn.
        attention: asks the vCPU loop to come back and look (see `VcpuLoop.attention`).
        guest_exit: called with model and value when a device that may do so ends the run.
        device_failed: called once for each failure.
        log_sink: where log lines of devices go, as they come; a new one is told first what nobody
            was there to hear.
        log_limit: what keeps a device from logging too much.
        lost_msis: messages that were sent where no interrupt controller is, or that the guest had
            not allowed the device to send.
        lost_writes: runs of pages that a device says it wrote though the guest does not allow it
            to; nobody looks at them.
    """

    cpu: Cpu
    attention: Callable[[], None]
    guest_exit: Callable[[str, int], None]
    device_failed: Callable[[DeviceFailure], None]
    turn_wanted: Callable[[str], None] = lambda name: None
    consoles: dict[str, ConsoleBuffer] = field(default_factory=dict)
    wires: dict[str, Callable[[bool], None]] = field(default_factory=dict)
    attached: dict[str, Attachment] = field(default_factory=dict)
    irqchip: IrqChip | None = None
    pci: PciRoot | None = None
    log_lines: list[tuple[str, str]] = field(default_factory=list)
    log_limit: LogLimit = field(default_factory=LogLimit)
    lost_msis: int = 0
    lost_writes: int = 0
    _log_sink: Callable[[str, str], None] | None = None
    _isa_levels: dict[int, set[str]] = field(default_factory=dict)

    @property
    def log_sink(self) -> Callable[[str, str], None] | None:
        return self._log_sink

    @log_sink.setter
    def log_sink(self, sink: Callable[[str, str], None] | None) -> None:
        had, self._log_sink = self._log_sink, sink
        if sink is not None and had is None:
            for name, text in list(self.log_lines):
                sink(name, text)

    def irq(self, name: str, pin: int, level: bool) -> None:
        """A device drives its interrupt pin."""
        wire = self.wires.get(name)
        if wire is not None:
            wire(level)
            return
        attachment = self.attached.get(name)
        if attachment is None:
            return
        if attachment.lines:
            if pin < len(attachment.lines):
                self.isa_line(attachment.lines[pin], level, name)
        elif attachment.slot is not None and self.pci is not None:
            self.pci.set_intx(attachment.slot, pin, level)

    def isa_line(self, irq: int, level: bool, source: str = "pci") -> None:
        """Drive an interrupt line; one that several sources share is high while any of them is.

        A line that the board does not have is driven in vain: this may be called for what a
        device says, in the middle of an access, so it never raises.
        """
        if irq not in _LINES:
            return
        sources = self._isa_levels.setdefault(irq, set())
        if level:
            sources.add(source)
        else:
            sources.discard(source)
        if self.irqchip is not None:
            self.irqchip.set_irq(irq, bool(sources))

    def msi(self, name: str, address: int, data: int) -> None:
        """A device sends a message; one from elsewhere than a bus master is not passed on."""
        if self.irqchip is None or self.pci is None:
            return
        if not self.may_master(name):
            reason = "it is no bus master"
        elif not self.irqchip.msi(address, data):
            reason = "no interrupt controller takes it"
        else:
            return
        self.lost_msis += 1
        self.log(name, f"MSI {data:#x} to {address:#x} is lost: {reason}")

    def may_master(self, name: str) -> bool:
        """Whether a device is a PCI function that the guest lets write to memory."""
        attachment = self.attached.get(name)
        slot = None if attachment is None else attachment.slot
        return slot is not None and self.pci is not None and self.pci.may_master(slot)

    def wrote_pages(self, name: str, runs: Sequence[tuple[int, int]]) -> None:
        """A device says that it wrote pages of guest memory."""
        attachment = self.attached.get(name)
        if attachment is None:
            reason = ""
        elif attachment.config.dma is DmaMode.GRANTED:
            reason = "it has no guest memory"
        else:
            masters = attachment.slot is None or self.may_master(name)
            reason = "" if masters else "it is no bus master"
        if not reason:
            self.cpu.invalidate_pages(runs)
            return
        self.lost_writes += len(runs)
        pages = ", ".join(f"{count} at {first << PAGE_SHIFT:#x}" for first, count in runs[:4])
        self.log(name, f"pages that it says it wrote ({pages}) are not looked at: {reason}")

    def want_turn(self, name: str) -> None:
        self.turn_wanted(name)

    def output(self, name: str, data: bytes) -> None:
        console = self.consoles.get(name)
        if console is not None:
            console.emit(data)

    def input_wanted(self, name: str) -> None:
        console = self.consoles.get(name)
        if console is not None:
            console.blocked = False
            self.attention()

    def exit_request(self, name: str, value: int) -> None:
        attachment = self.attached.get(name)
        if attachment is not None and attachment.config.may_exit:
            self.guest_exit(attachment.config.model, value)
        else:
            self.log(name, f"asked to end the run ({value}); it has no right to")

    def log(self, name: str, text: str, *, always: bool = False) -> None:
        """Keep a line about a device and pass it on; one of too many is only counted.

        Args:
            always: it may not be lost, however much the device has logged.
        """
        for line in [text] if always else self.log_limit.lines(name, text):
            if len(self.log_lines) >= _LOG_KEEP:
                del self.log_lines[: _LOG_KEEP // 2]
            self.log_lines.append((name, line))
            if self.log_sink is not None:
                self.log_sink(name, line)

    def failed(self, failure: DeviceFailure) -> None:
        # A line that a dead device held high would interrupt the guest for ever.
        attachment = self.attached.get(failure.device)
        for pin in range(max(1, len(attachment.lines) if attachment is not None else 0)):
            self.irq(failure.device, pin, False)
        self.log(failure.device, failure.reason, always=True)
        self.device_failed(failure)
