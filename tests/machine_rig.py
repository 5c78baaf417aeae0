"""A virtio device in a whole machine, for `virtio_driver.Driver`: the guest's CPU never runs.

The clock is virtual, so that the device's work is done within its turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

from devices.bus import BusType
from devices.contract import Device
from devices.pci.intx import Slot
from vmm import post
from vmm.config import ClockKind, HostOptions
from vmm.machine import Machine

NAME = "dut"
RAM_SIZE = 8 << 20


class MachineRig:
    """A `virtio_driver.Rig`.

    Args:
        kind: the model, or its name.
        how: see `Machine.add_device`.
    """

    def __init__(
        self, kind: type[Device] | str, host: HostOptions | None = None, **how: Any
    ) -> None:
        self._kind = kind
        self._directory = tempfile.TemporaryDirectory()
        self.machine = Machine(memory=RAM_SIZE, devices=(), clock=ClockKind.VIRTUAL, host=host)
        try:
            self.machine.add_device(kind, NAME, **how)
            self._take_up()
            post.set_up_pci(self.parts)
        except BaseException:
            self.machine.close()
            raise

    def _take_up(self) -> None:
        self.parts = self.machine.parts
        self.ram: Any = self.parts.memory.view
        self._number = self.parts.wiring.attached[NAME].slot.number  # type: ignore[union-attr]
        self.messages: list[tuple[int, int]] = []
        wiring = self.parts.wiring
        wiring.msi = lambda name, address, data: self.messages.append((address, data))  # type: ignore[method-assign]

    @property
    def proxy(self) -> Any:
        (proxy,) = self.parts.proxies
        return proxy

    def _address(self, bar: int) -> int:
        return self.read_config(4 + bar) & ~0xF

    def read(self, bar: int, offset: int, size: int) -> int:
        return self.parts.buses[BusType.MMIO].read(self._address(bar) + offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.parts.buses[BusType.MMIO].write(self._address(bar) + offset, size, value)

    def read_config(self, register: int) -> int:
        return self.parts.pci.read_config(self._number, register)

    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None:
        data = value.to_bytes(size, "little")
        self.parts.pci.write_config(self._number, register, offset, data)

    def settle(self) -> None:
        self.parts.drain()
        while self.parts.turns._wanted:
            self.parts.turns.give(True)
            self.parts.drain()

    @property
    def irq(self) -> bool:
        return bool(self.parts.pci._intx.pins(Slot.of(self._number)))

    @property
    def logs(self) -> list[str]:
        return [text for _, text in self.parts.wiring.log_lines]

    def snapshot(self) -> Any:
        """The directory of a snapshot of the whole machine."""
        saved = Path(self._directory.name) / "saved"
        self.machine.snapshot(saved)
        return saved

    def replace(self, saved: Any) -> None:
        """Go on in another machine; its memory is another, too: the driver must take it anew."""
        models = [self._kind] if isinstance(self._kind, type) else []
        self.machine.close()
        self.machine = Machine.restore(saved, models=models)
        self._take_up()
        self.machine.resume()
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ram = None
        self.machine.close()
        self._directory.cleanup()
