"""What each rare command does to the device model of a child; accesses are in the loop itself."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, TypeGuard

from devices.bus import ALL_ONES, BusDevice
from devices.contract import Adjustable, Device, ReadsAhead, TakesGrants, TakesInput
from devices.errors import DeviceError
from devices.pci.contract import ConfigWriteResult
from proxy import messages as m
from proxy.host import ChildHost


def shape_of(device: Device) -> m.Shape:
    """What a device looks like from outside.

    The machine makes it of a model that it built itself and compares it with what a child says.
    """
    bars = tuple(device.bars()) if hasattr(device, "bars") else ()
    return m.Shape(
        regions=tuple(device.regions()),
        is_pci=hasattr(device, "read_config"),
        bars=bars,
        takes_input=isinstance(device, TakesInput),
        dma=device.dma,
        virtqueues=device.queue_sizes() if _takes_grants(device) else (),
    )


def _takes_grants(device: Device) -> TypeGuard[TakesGrants]:
    return device.grantable and isinstance(device, TakesGrants)


class _Gone:
    """What answers for a device that was destroyed."""

    def read(self, offset: int, size: int, /) -> int:
        return ALL_ONES[size]

    def write(self, offset: int, size: int, value: int, /) -> None:
        pass


class Commands:
    """One device model, driven by commands.

    A refusable command that the model fails at is refused; any other exception of the model goes
    through and ends the process.

    Args:
        device: the model; let go of when it is destroyed.
        host: its host.
        has_lane: whether this child can poll a shared page.

    Attributes:
        readers: the read function of each region. The list stays the same object when the
            device is destroyed, only its entries change.
        writers: as `readers`, for writes.
    """

    def __init__(self, device: Device, host: ChildHost, has_lane: bool) -> None:
        self._device: Any = device
        self._host = host
        self._has_lane = has_lane
        self._closed = False
        self._mapping: int | None = None
        self._turns = host.turns
        self._turns.attach(device)
        handlers: list[BusDevice] = list(device.handlers())
        self.readers = [each.read for each in handlers]
        if device.dma:
            self.readers = [self._turns.reader(read) for read in self.readers]
        self.writers = [each.write for each in handlers]
        self._table: dict[type[m.Message], Callable[[Any], m.Message | None]] = {
            m.Activate: self._activate,
            m.TakeAhead: self._take_ahead,
            m.ReadConfig: self._read_config,
            m.WriteConfig: self._write_config,
            m.InitPciConfigMapping: self._map_config,
            m.ReadVirtualConfig: self._read_virtual,
            m.WriteVirtualConfig: self._write_virtual,
            m.DestroyDevice: self._destroy,
            m.Shutdown: self._shutdown,
            m.GetRanges: self._get_ranges,
            m.Snapshot: self._snapshot,
            m.Restore: self._restore,
            m.Sleep: self._sleep,
            m.Wake: self._wake,
            m.Sync: self._sync,
            m.MapGuestMemory: self._map_memory,
            m.MapGrants: self._map_grants,
            m.Input: self._input,
            m.Adjust: self._adjust,
        }

    def carry_out(self, command: m.Message, fd: int | None) -> m.Message | None:
        """Do it; the answer, or None for posted commands. `fd` stays with the caller."""
        self._mapping = fd
        try:
            return self._table[type(command)](command)
        except Exception as error:
            if not command.refusable:
                raise
            reason = error.reason if isinstance(error, DeviceError) else None
            return m.Refused(reason or f"{type(error).__name__}: {error}")
        finally:
            # The machine's vCPU waits for the answer, so this was a turn.
            self._turns.memory.flush()

    def close_device(self) -> None:
        """Let the device clean up, once."""
        if self._closed:
            return
        self._closed = True
        gone = _Gone()
        self.readers[:] = [gone.read] * len(self.readers)
        self.writers[:] = [gone.write] * len(self.writers)
        try:
            self._device.close()
        except Exception as error:
            self._host.log(f"clean-up failed: {type(error).__name__}: {error}")
        self._device = None
        self._turns.attach(None)
        self._turns.memory.map([])
        self._host.flush()

    def _activate(self, _: m.Activate) -> m.Message:
        return m.Activated(shape_of(self._device), self._has_lane)

    def _take_ahead(self, command: m.TakeAhead) -> m.Message:
        if not isinstance(self._device, ReadsAhead):
            return m.Ahead(b"")
        if command.taken:
            self._device.take_ahead(command.region, command.taken)
        data = self._device.ahead(command.region) if command.wanted else b""
        return m.Ahead(data[: m.MAX_BYTES])

    def _read_config(self, command: m.ReadConfig) -> m.Message:
        value = ALL_ONES[4] if self._closed else self._device.read_config(command.register)
        return m.ReadConfigResult(value)

    def _write_config(self, command: m.WriteConfig) -> m.Message:
        if self._closed:
            return m.WriteConfigResult(ConfigWriteResult())
        data = command.data[: command.length]
        return m.WriteConfigResult(
            self._device.write_config(command.register, command.offset, data)
        )

    def _map_config(self, command: m.InitPciConfigMapping) -> m.Message:
        keep = getattr(self._device, "map_config", None)
        if keep is None or self._mapping is None:
            return m.MappingResult(False)
        # mmap keeps its own duplicate of the descriptor; this one is closed by the caller.
        memory = mmap.mmap(self._mapping, command.base + command.length)
        return m.MappingResult(bool(keep(memoryview(memory), command.base, command.length)))

    def _map_memory(self, command: m.MapGuestMemory) -> m.Message:
        assert self._mapping is not None
        fd, mapped = self._mapping, []
        for region in command.regions:
            mapping = mmap.mmap(fd, region.size, offset=region.offset)
            mapped.append((region.start, memoryview(mapping)))
        self._turns.memory.map(mapped)
        return m.Ok()

    def _map_grants(self, command: m.MapGrants) -> m.Message:
        assert self._mapping is not None
        if _takes_grants(self._device):
            self._device.map_grants(memoryview(mmap.mmap(self._mapping, command.length)))
        return m.Ok()

    def _sync(self, _: m.Sync) -> m.Message:
        self._turns.take()
        return m.Ok()

    def _read_virtual(self, command: m.ReadVirtualConfig) -> m.Message:
        value = 0 if self._closed else self._device.read_virtual_config(command.register)
        return m.ReadVirtualConfigResult(value)

    def _write_virtual(self, command: m.WriteVirtualConfig) -> m.Message:
        if not self._closed:
            self._device.write_virtual_config(command.register, command.value)
        return m.Ok()

    def _destroy(self, _: m.DestroyDevice) -> None:
        self.close_device()

    def _shutdown(self, _: m.Shutdown) -> m.Message:
        self.close_device()
        return m.Ok()

    def _get_ranges(self, _: m.GetRanges) -> m.Message:
        if self._closed:
            return m.Ranges(())
        current = getattr(self._device, "current_ranges", None)
        if current is not None:
            claimed = [m.ClaimedRange(each.region, bus, each.range) for bus, each in current()]
            return m.Ranges(tuple(claimed))
        found = []
        for index, region in enumerate(self._device.regions()):
            place = region.range()
            if place is not None:
                found.append(m.ClaimedRange(index, region.bus, place))
        return m.Ranges(tuple(found))

    def _snapshot(self, _: m.Snapshot) -> m.Message:
        self._host.flush()
        return m.SnapshotResult(self._device.snapshot())

    def _restore(self, command: m.Restore) -> m.Message:
        self._device.restore(command.state)
        return m.Ok()

    def _sleep(self, _: m.Sleep) -> m.Message:
        self._device.sleep()
        self._host.flush()
        return m.Ok()

    def _wake(self, _: m.Wake) -> m.Message:
        self._device.wake()
        return m.Ok()

    def _input(self, command: m.Input) -> m.Message:
        if self._closed or not isinstance(self._device, TakesInput):
            return m.InputResult(0)
        return m.InputResult(self._device.receive(command.data))

    def _adjust(self, command: m.Adjust) -> m.Message:
        if isinstance(self._device, Adjustable):
            self._device.adjust(**command.options)
        return m.Ok()
