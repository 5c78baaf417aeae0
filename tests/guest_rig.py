"""A bare machine for guests: CPU, buses and devices in this process, and no jail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from fakes import FakeHost

import guests
from devices.bus import Bus, BusType, Range
from devices.contract import Device
from devices.debug_exit import DebugExit
from devices.echo import Echo
from devices.irqchip.pic import PicPair
from devices.pci.config_space import ConfigSpaceDevice
from devices.pci.host_bridge import PciRoot
from devices.serial import Serial
from vmm.boot.loader import load
from vmm.boot.options import BootOptions, Mode, Module
from vmm.cpu.engine import Cpu, StopReason
from vmm.memory import GuestMemory

BUDGET = 4096
PATIENCE = 60.0
"""Seconds after which a guest that does not end is a failure of the test."""


class Host(FakeHost):
    """Leads interrupts and exits where the rig wants them."""

    def __init__(
        self,
        on_irq: Callable[[bool, int], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_irq, self._on_exit = on_irq, on_exit

    def set_irq(self, level: bool, pin: int = 0) -> None:
        if self._on_irq is not None:
            self._on_irq(level, pin)

    def request_exit(self, value: int) -> None:
        super().request_exit(value)
        if self._on_exit is not None:
            self._on_exit(value)


@dataclass
class Run:
    """How a guest ended: "halt", "exit" or "shutdown"; and what it said."""

    ending: str
    output: str
    exit_value: int | None = None
    detail: str = ""
    notes: list[str] = field(default_factory=list)


class Rig:
    """The default machine's devices at their default places."""

    def __init__(self, *, memory: int = 64 << 20, echo: bool = True, pci: bool = True) -> None:
        self.exit_value: int | None = None
        self.memory = GuestMemory(memory)
        self.ports = Bus(BusType.PIO, 0x10000)
        self.mmio = Bus(BusType.MMIO, 1 << 40)
        for region in self.memory.regions:
            self.mmio.reserve(Range(region.start, region.size))
        self.cpu = Cpu(self.memory, self.ports, self.mmio)
        self.pic = PicPair(FakeHost())
        self.console = Host(on_irq=lambda level, _pin: self.pic.set_irq(4, level))
        self.serial = Serial(self.console)
        attached: list[Device] = [self.pic, self.serial, DebugExit(Host(on_exit=self._exit))]
        if echo:
            attached.append(Echo(FakeHost()))
        root = PciRoot(
            FakeHost(),
            self.mmio,
            self.ports,
            set_irq_line=self.pic.set_irq,
            on_violation=self._violation,
        )
        attached.append(root)
        if pci:
            function = ConfigSpaceDevice(FakeHost())
            root.add(1, function, "config-space", function.handlers(), function.bars())
        root.assign_resources()
        for device in attached:
            for region, handler in zip(device.regions(), device.handlers(), strict=True):
                claimed = region.range()
                assert claimed is not None
                self._bus(region.bus).insert(claimed, handler, device.model)

    def close(self) -> None:
        self.cpu.close()
        self.memory.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(
        self,
        name: str,
        *,
        image: bytes | None = None,
        typed: bytes = b"",
        cmdline: str = "",
        modules: tuple[Module, ...] = (),
        chunk: int = 64,
    ) -> Run:
        """Boot a guest of `guests.GUESTS` and run it to its end."""
        guest = guests.GUESTS[name]
        options = BootOptions(
            load_addr=guest.load_addr,
            mode=None if guest.mode is None else Mode(guest.mode),
            cmdline=cmdline,
            modules=modules,
            name=name,
        )
        data = guests.image(name) if image is None else image
        self.cpu.set_state(load(self.memory, data, options).state)
        limit = monotonic() + PATIENCE
        while monotonic() < limit:
            if self.pic.pending() and self.cpu.interruptible():
                self.cpu.inject(self.pic.acknowledge())
            stop = self.cpu.run(BUDGET)
            if self.exit_value is not None:
                return Run("exit", self.output, self.exit_value)
            if stop.reason is StopReason.SHUTDOWN:
                return Run("shutdown", self.output, detail=stop.detail)
            assert stop.reason in (StopReason.BUDGET, StopReason.HALT), stop
            if stop.reason is StopReason.HALT and not self.pic.pending():
                if not self.cpu.interruptible():
                    return Run("halt", self.output)
                assert typed, f"the guest waits for ever; it said: {self.output}"
            if typed:
                typed = typed[self.serial.receive(typed[:chunk]) :]
        raise AssertionError(f"the guest does not end; it said: {self.output}")

    @property
    def output(self) -> str:
        return self.console.printed.decode("ascii", "replace")

    def _bus(self, kind: BusType) -> Bus:
        return self.ports if kind is BusType.PIO else self.mmio

    def _exit(self, value: int) -> None:
        self.exit_value = value
        self.cpu.stop_now()

    def _violation(self, owner: str, text: str) -> None:
        raise AssertionError(f"{owner}: {text}")
