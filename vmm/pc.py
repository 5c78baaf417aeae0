"""The board of a PC: what lives in the machine's process and is not chosen by the user.

Interrupt controllers, timers, the PCI root, power and reset, and the ports that every PC program
pokes. Each is an ordinary `Device` with state; here they get their wires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from devices.bus import Bus, BusType, Range
from devices.clock import Clock
from devices.contract import Device
from devices.irqchip.pc import IrqChip
from devices.pci.host_bridge import PciRoot
from devices.platform.a20 import A20Gate
from devices.platform.acpi_pm import AcpiPm
from devices.platform.debug_console import DebugConsole
from devices.platform.fw_cfg import FwCfg
from devices.platform.hpet import Hpet
from devices.platform.i8042 import I8042
from devices.platform.pit import Pit
from devices.platform.port92 import Port92
from devices.platform.post import PostPort
from devices.platform.reset import ResetControl
from devices.platform.rtc import Rtc
from devices.platform.vga_text import VgaText
from vmm.attachment import Attachment
from vmm.config import DeviceConfig
from vmm.firmware import fw_cfg_items
from vmm.firmware.platform import Platform
from vmm.local import LocalHost
from vmm.memory import GuestMemory
from vmm.wiring import Wiring

DEBUG_CONSOLE = "debug-console"
PM_TIMER_BITS = 32
PIT_IRQ, RTC_IRQ = 0, 8
SCREEN_AT = 0xB8000
SCREEN_BYTES = 0x8000
"""Where the text screen's memory lies; it is plain RAM here."""


def platform_of(memory: GuestMemory) -> Platform:
    """The board as its tables tell it; fw_cfg is there only for firmware."""
    return Platform(pm_timer_bits=PM_TIMER_BITS, fw_cfg=memory.rom is not None)


def _fw_cfg(host: LocalHost, board: Platform, memory: GuestMemory) -> FwCfg:
    ram = [Range(region.start, region.size) for region in memory.ram]
    # Without a disk SeaBIOS waits for a key for ever instead of starting over and over.
    extra = {"etc/boot-fail-wait": b"\xff\xff\xff\xff"}
    return FwCfg(
        host,
        items=fw_cfg_items.items(ram),
        files=fw_cfg_items.files(board, ram, extra=extra),
        memory=memory,
    )


@dataclass(frozen=True)
class BoardEvents:
    """What the board does to the machine; all called in the middle of an access.

    Attributes:
        power_off: the guest switched itself off.
        reset: the guest asked for a reset.
        a20: the A20 gate was opened or closed.
        pci_fault: (owner, text): a PCI device said what the guest did not ask for.
    """

    power_off: Callable[[], None]
    reset: Callable[[], None]
    a20: Callable[[bool], None]
    pci_fault: Callable[[str, str], None]


class Board:
    """Builds and connects everything; the devices are on the buses afterwards.

    Args:
        epoch: the time of day at guest time 0, in seconds since 1970 (UTC).
    """

    def __init__(
        self,
        buses: Mapping[BusType, Bus],
        memory: GuestMemory,
        clock: Clock,
        *,
        wiring: Wiring,
        events: BoardEvents,
        epoch: int,
    ) -> None:
        def host(name: str) -> LocalHost:
            return LocalHost(name, wiring, {})

        self.irqchip = IrqChip(host("irqchip"), clock, on_init=events.reset)
        gate = A20Gate(events.a20)
        reset_control = ResetControl(host("reset"), reset=events.reset)
        self.pci = PciRoot(
            host("pci"),
            buses[BusType.MMIO],
            buses[BusType.PIO],
            set_irq_line=wiring.isa_line,
            on_violation=events.pci_fault,
            reset_control=reset_control,
        )
        self.screen = VgaText(host("screen"))
        hpet = Hpet(host("hpet"), clock, lambda line, level: wiring.isa_line(line, level, "hpet"))
        # In legacy replacement mode the HPET takes these two lines over.
        wiring.wires["pit"] = lambda level: hpet.isa_input(PIT_IRQ, level)
        wiring.wires["rtc"] = lambda level: hpet.isa_input(RTC_IRQ, level)
        low = memory.ram[0].size
        board = platform_of(memory)
        pic, ioapic, lapic = self.irqchip.devices()
        devices: dict[str, Device] = {
            "pci": self.pci,
            "reset": reset_control,
            "pit": Pit(host("pit"), clock),
            "rtc": Rtc(
                host("rtc"), clock, epoch=epoch, low_memory=low, high_memory=memory.size - low
            ),
            "hpet": hpet,
            "acpi-pm": AcpiPm(host("acpi-pm"), clock, events.power_off, timer_bits=PM_TIMER_BITS),
            "i8042": I8042(host("i8042"), gate=gate, reset=events.reset),
            "port92": Port92(host("port92"), gate=gate, reset=events.reset),
            "post": PostPort(host("post")),
            DEBUG_CONSOLE: DebugConsole(host(DEBUG_CONSOLE)),
            "screen": self.screen,
            **({"fw-cfg": _fw_cfg(host("fw-cfg"), board, memory)} if board.fw_cfg else {}),
            # Last: what the others say on their lines while they are restored is already part of
            # the interrupt controllers' saved state.
            "pic": pic,
            "ioapic": ioapic,
            "lapic": lapic,
        }
        self.attachments = [
            Attachment(DeviceConfig(name, device.model, isolated=False), device)
            for name, device in devices.items()
        ]
        self._memory = memory
        for attachment in self.attachments:
            attachment.place(buses)
            wiring.attached[attachment.name] = attachment

    def screen_lines(self) -> list[str]:
        """The text screen as lines without blanks at their ends; empty ones at the end are cut."""
        text = str(self.screen.screen(self._memory.window(SCREEN_AT, SCREEN_BYTES)))
        return text.splitlines()
