"""A model that gets grants instead of guest memory, and the machine's side of that, in-process."""

from __future__ import annotations

import mmap
from typing import Any

from virtio_driver import LocalRig

from devices.dma import DmaMemory
from devices.virtio.granted import area_parts
from devices.virtio.transport import DOORBELL_SIZE, DOORBELLS
from vmm.grants import Granter


class Saved(dict[str, Any]):
    """The device's state, and what is kept beside it."""

    grants: Any


class GrantedRig(LocalRig):
    """As `vmm.granted_proxy` does it, without a process."""

    def _build(self) -> None:
        super()._build()
        self.host.turns.memory.map([])
        sizes = self.device.queue_sizes()
        self.area = memoryview(mmap.mmap(-1, area_parts(sizes)[1]))
        self.device.map_grants(self.area)
        self.wrote: list[tuple[int, int]] = []
        memory = DmaMemory(self.wrote.extend)
        memory.map([(0, memoryview(self.ram))])
        self.granter = Granter(memory, self.area, sizes, self.device.may_master)
        self.window = self.device._window

    def end(self) -> None:
        wrong = self.granter.end()
        assert not wrong, wrong
        if self.granter.again():
            self.host.calls.append(("want_turn",))

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        if bar:
            super().write(bar, offset, size, value)
            return
        self.granter.written(offset, size, value)
        self.granter.begin()
        super().write(bar, offset, size, value)
        self.end()

    def read(self, bar: int, offset: int, size: int) -> int:
        value = super().read(bar, offset, size)
        if not bar:
            assert self.granter.read(offset, size, value) == value, "an honest device"
        return value

    def read_config(self, register: int) -> int:
        value = super().read_config(register)
        assert self.granter.window_read(register - self.window, value) == value
        return value

    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None:
        data = value.to_bytes(size, "little")
        self.granter.window_written(register - self.window, offset, data)
        super().write_config(register, value, size, offset)

    def settle(self) -> None:
        while True:
            wanted = self.host.count("want_turn")
            if self.host.turns.work_wanted:
                self.host.turns.work()
            again = self.granter.again()
            self.granter.begin()
            for index in again:
                super().write(0, DOORBELLS + DOORBELL_SIZE * index, 2, index)
            self.host.turns.take()
            self.end()
            if self.host.count("want_turn") == wanted and not self.host.turns.work_wanted:
                return

    def snapshot(self) -> Any:
        self.granter.begin()
        device = super().snapshot()
        self.end()
        self.granter.revoke()
        saved = Saved(device)
        saved.grants = self.granter.snapshot()
        return saved

    def replace(self, saved: Any) -> None:
        self.device.close()
        self._build()
        self.device.sleep()
        self.device.restore(dict(saved))
        self.granter.restore("granted", saved.grants)
        self.device.wake()
        self.settle()
