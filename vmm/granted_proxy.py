"""A proxied device that gets the bytes of its requests and no guest memory: ``dma=granted``."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Any

from devices.bus import BusDevice
from devices.dma import DmaMemory
from devices.errors import DeviceError, Subject, UserError
from devices.pci.contract import VIRTUAL_RESET, ConfigWriteResult
from devices.virtio.granted import area_parts
from devices.virtio.structures import fixed_registers
from devices.virtio.transport import DOORBELL_SIZE, DOORBELLS, REGISTERS_BAR
from proxy import lane
from proxy import messages as m
from proxy.child_interface import ChildInterface
from proxy.device import ProxyDevice
from proxy.events import ProxyEvents
from proxy.link import Link
from vmm.config import NOT_GRANTABLE
from vmm.grants import Granter


class Turn:
    """One turn after another of a device with grants.

    Not the proxy, which stays out of every cycle of references.
    """

    def __init__(self, link: Link, granter: Granter) -> None:
        self._link, self._granter = link, granter
        self.begin = granter.begin

    def end(self) -> None:
        """Take what the device has used; it fails if it used what it may not."""
        link, granter = self._link, self._granter
        if link.failed is None:
            wrong = granter.end()
            if wrong:
                link.fail(f"broke the protocol: it {wrong}", "")
            elif granter.again():
                link.events.want_turn(link.name)


class Registers:
    """The transport's registers, whose every write may be a turn."""

    def __init__(self, inner: BusDevice, granter: Granter, turn: Turn) -> None:
        self._read, self._write = inner.read, inner.write
        self._granter, self._turn = granter, turn

    def read(self, offset: int, size: int) -> int:
        return self._granter.read(offset, size, self._read(offset, size))

    def write(self, offset: int, size: int, value: int) -> None:
        self._granter.written(offset, size, value)
        self._turn.begin()
        self._write(offset, size, value)
        self._turn.end()


class GrantedProxy(ProxyDevice):
    """A `ProxyDevice` around whose turns the machine copies requests in and results out.

    Args:
        memory: the guest's; told which pages were written when it is flushed.
        may_master: whether the guest lets the device do DMA now.
        others: see `ProxyDevice`.

    Raises:
        UserError: the device cannot do without guest memory.
        others: see `ProxyDevice`.
    """

    def __init__(
        self,
        child: ChildInterface,
        events: ProxyEvents,
        memory: DmaMemory,
        may_master: Callable[[], bool],
        **others: Any,
    ) -> None:
        super().__init__(child, events, **others)
        sizes = self.shape.virtqueues
        if not sizes:
            self.shutdown()
            raise UserError(f"device '{self.name}': {NOT_GRANTABLE}", Subject("dma", self.name))
        _, length = area_parts(sizes)
        fd = lane.create_sealed(f"grants-{self.name}", length)
        try:
            area = memoryview(mmap.mmap(fd, length))
            self._link.ask(m.MapGrants(length), (fd,))
        except BaseException:
            self.shutdown()
            raise
        finally:
            os.close(fd)
        self.granted_bytes = length
        self._granter = granter = Granter(memory, area, sizes, may_master)
        self._turn = turn = Turn(self._link, granter)
        # The driver must find the registers where we look for them: it goes by what the device
        # said before it saw anything of the guest.
        read = super().read_config
        self._window, fixed = fixed_registers(read)
        self._fixed = {n: (~bits, read(n) & bits) for n, bits in fixed.items()}
        region = next((info.region for info in self.bars() if info.bar == REGISTERS_BAR), 0)
        handlers: list[BusDevice] = list(super().handlers())
        self._write_register = handlers[region].write
        handlers[region] = Registers(handlers[region], granter, turn)
        self._handlers = tuple(handlers)

    def handlers(self) -> tuple[BusDevice, ...]:
        return self._handlers

    def read_config(self, register: int) -> int:
        value = super().read_config(register)
        if register in self._fixed and self.failed is None:
            others, ours = self._fixed[register]
            value = value & others | ours
        return self._granter.window_read(register - self._window, value)

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        self._granter.window_written(register - self._window, offset, data)
        return super().write_config(register, offset, data)

    def write_virtual_config(self, register: int, value: int) -> None:
        if register == VIRTUAL_RESET and value & 1:
            self._granter.reset()
        super().write_virtual_config(register, value)

    def sync(self) -> None:
        again = self._granter.again()
        self._turn.begin()
        for index in again:
            # It has seen the end of this queue, which goes on now.
            self._write_register(DOORBELLS + DOORBELL_SIZE * index, 2, index)
        super().sync()
        self._turn.end()

    def sleep(self) -> None:
        self._turn.begin()
        try:
            super().sleep()
        finally:
            self._turn.end()
        self._link.check()
        self._granter.revoke()

    def snapshot(self) -> Any:
        return {"device": super().snapshot(), "grants": self._granter.snapshot()}

    def restore(self, saved: Any) -> None:
        if not isinstance(saved, dict) or saved.keys() != {"device", "grants"}:
            raise DeviceError(
                self.name, "cannot restore this state: it is not that of a device with dma=granted"
            )
        super().restore(saved["device"])
        self._granter.restore(self.name, saved["grants"])

    def destroy(self) -> None:
        self._granter.reset()
        super().destroy()
