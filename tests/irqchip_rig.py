"""The APICs and a guest that programs them."""

from __future__ import annotations

from typing import Any

from fake_clock import FakeClock
from fakes import FakeHost

from devices.contract import DeviceHost
from devices.irqchip.apic_registers import Register
from devices.irqchip.ioapic import IoApic
from devices.irqchip.lapic import LocalApic
from devices.irqchip.pc import IrqChip

ENABLE, MASKED, LEVEL, LOGICAL = 0x100, 1 << 16, 1 << 15, 1 << 11
NMI, INIT, EXTINT = 0x400, 0x500, 0x700
SELF, ALL, OTHERS = 1 << 18, 2 << 18, 3 << 18
SPURIOUS = 0xFF


class SoloLapic(LocalApic):
    """Built like any model, for the suites that know only models."""

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, FakeClock())


class SoloIoApic(IoApic):
    """The same; a CPU that takes everything, as MSIs in the host's story."""

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, deliver=self._take)

    def _take(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        self.host.send_msi(destination << 12 | logical << 2, mode << 8 | vector | level << 15)
        return True


class LapicGuest:
    """Register accesses to a local APIC; `attach` it to one."""

    apic: LocalApic

    def get(self, register: int) -> int:
        return self.apic.handlers()[0].read(register << 4, 4)

    def put(self, register: int, value: int) -> None:
        self.apic.handlers()[0].write(register << 4, 4, value)

    def enable(self) -> None:
        self.put(Register.SVR, ENABLE | SPURIOUS)

    def eoi(self) -> None:
        self.put(Register.EOI, 0)

    def ipi(self, command: int, destination: int = 0) -> None:
        self.put(Register.ICR_HIGH, destination << 24)
        self.put(Register.ICR, command)

    def vectors(self, first: int) -> set[int]:
        """The 256 bits of ISR, TMR or IRR."""
        words = [self.get(first + index) for index in range(8)]
        return {vector for vector in range(256) if words[vector // 32] >> vector % 32 & 1}


class Lapic(LapicGuest):
    """A local APIC alone, software-enabled unless told otherwise."""

    def __init__(self, enable: bool = True, now: int = 0) -> None:
        self.clock = FakeClock(now)
        self.ended: list[int] = []
        self.inits = 0
        self.retries = 0
        self.apic = LocalApic(
            FakeHost(),
            self.clock,
            broadcast_eoi=self.ended.append,
            reachable=self._retry,
            on_init=self._init,
        )
        if enable:
            self.enable()
            self.retries = 0

    def _retry(self) -> None:
        self.retries += 1

    def _init(self) -> None:
        self.inits += 1

    def take(self) -> int:
        """The vector of a request that must be there."""
        assert self.apic.request >= 0
        return self.apic.acknowledge()

    def reborn(self) -> Lapic:
        """Another one, restored from this one's snapshot at the same time."""
        other = Lapic(enable=False, now=self.clock.time)
        other.apic.restore(self.apic.snapshot())
        return other


class Board(LapicGuest):
    """The whole `IrqChip`."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.kicks = 0
        self.inits = 0
        self.chip = IrqChip(FakeHost(), self.clock, on_init=self._init)
        self.chip.on_pending = self._kick
        self.apic = self.chip.lapic
        self.ports = self.chip.pic.handlers()

    def _kick(self) -> None:
        self.kicks += 1

    def _init(self) -> None:
        self.inits += 1

    def init_pic(self, base: int = 0x20, icw4: int = 0x01) -> Board:
        for port, first, cascade in ((0, base, 4), (1, base + 8, 2)):
            self.ports[port].write(0, 1, 0x11)
            for word in (first, cascade, icw4):
                self.ports[port].write(1, 1, word)
        return self

    def mask_pic(self) -> None:
        for port in (0, 1):
            self.ports[port].write(1, 1, 0xFF)

    def pic_eoi(self) -> None:
        self.ports[0].write(0, 1, 0x20)

    def redirect(self, pin: int, low: int, destination: int = 0) -> None:
        ioapic_put(self.chip.ioapic, 0x11 + 2 * pin, destination << 24)
        ioapic_put(self.chip.ioapic, 0x10 + 2 * pin, low)

    def redirection(self, pin: int) -> int:
        return ioapic_get(self.chip.ioapic, 0x10 + 2 * pin)

    def take(self) -> int:
        assert self.chip.pending()
        return self.chip.acknowledge()

    def reborn(self) -> Board:
        other = Board()
        for mine, its in zip(self.chip.devices(), other.chip.devices(), strict=True):
            its.restore(mine.snapshot())
        return other


def ioapic_get(ioapic: IoApic, index: int) -> int:
    ioapic.write(0, 4, index)
    return ioapic.read(0x10, 4)


def ioapic_put(ioapic: IoApic, index: int, value: int) -> None:
    ioapic.write(0, 4, index)
    ioapic.write(0x10, 4, value)
