"""`ProxyDevice`: a device whose model lives in a process of its own."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from devices.bus import ALL_ONES, BusDevice, BusType, Range
from devices.contract import Region
from devices.errors import DeviceError, DeviceFailure
from devices.pci.contract import CONFIG_REGISTERS, BarInfo, ConfigWriteResult, RegionRange
from proxy import lane as lanes
from proxy import messages as m
from proxy.accesses import Accesses
from proxy.ahead import read_ahead
from proxy.child_interface import ChildInterface
from proxy.events import ProxyEvents
from proxy.link import Link
from proxy.machine_lane import MachineLane
from proxy.placement import Placement
from proxy.session import SPONTANEOUS, State
from proxy.shape import ClaimedRange, MemoryRegion, Shape, wrong_shape

DEADLINE = 5.0
"""Seconds that the machine waits for any answer of a child."""
DRAIN_AT_ONCE = 256
"""Upcalls that one `drain` handles at most."""
_CONFIG_BYTES = 4 * CONFIG_REGISTERS


@dataclass(frozen=True)
class ProxyStats:
    """Counts since activation."""

    tube_accesses: int
    lane_accesses: int
    lane_openings: int
    upcalls: int
    dropped_writes: int


@dataclass(frozen=True)
class GuestRam:
    """Guest memory that a device may map.

    Attributes:
        fd: memfd that cannot shrink; stays with the caller.
        regions: what of it is RAM.
    """

    fd: int
    regions: tuple[MemoryRegion, ...]


class ProxyDevice:
    """One device process, seen from the machine.

    Accesses (`handlers`, `read_config` and the other methods of `PciConfig`) never raise for what
    the child does. The methods that change its life (`sleep`, `wake`, `snapshot`, `restore`,
    `get_ranges`, `receive`) raise `DeviceFailure` if it fails and `DeviceError` if it refuses.

    Args:
        child: becomes this device; taken over.
        events: told of upcalls and of the failure.
        expected: the shape that the model declares; None takes what the child says, within reason.
        deadline: seconds that any wait on the child may take.
        placement: the machine's CPUs; None leaves the child anywhere and the lane closed.
        memory: guest memory, for a device that does DMA; None gives it none.
        synced: wait until the device has carried out each write, whatever region it is to.
        map_config: let a PCI function keep its registers where reads of them need no message.

    Raises:
        Misuse: the child interface was used before.
        DeviceFailure: it cannot be activated (another holder did that before?), or is not of
            the expected shape.
    """

    granted_bytes = 0
    """Of the area that it maps instead of guest memory, if it gets grants."""

    def __init__(
        self,
        child: ChildInterface,
        events: ProxyEvents,
        *,
        expected: Shape | None = None,
        deadline: float = DEADLINE,
        placement: Placement | None = None,
        memory: GuestRam | None = None,
        synced: bool = False,
        map_config: bool = True,
    ) -> None:
        self._closed = True
        child.take()
        self.name = child.name
        self.pid = child.pid
        self.jail_report = child.jail_report
        self._child = child
        self._link = link = Link(child, events, deadline)
        self._config: memoryview | None = None
        try:
            answer = link.ask(m.Activate())
            assert isinstance(answer, m.Activated)
            self.shape = answer.shape
            wrong = wrong_shape(answer.shape, expected)
            if wrong:
                link.fail(f"broke the protocol: {wrong}", "Activate")
                link.check()
            self.lane = MachineLane(link, child.lane if answer.lane else -1, placement)
            self._accesses = Accesses(link, answer.shape, self.lane, synced=synced)
            _tie(link, self.lane, self._accesses)
            read_ahead(link, answer.shape.regions, self._accesses.handlers)
            self.maps_memory = memory is not None and self.shape.dma
            """Whether it got guest memory."""
            if memory is not None and self.maps_memory:
                link.ask(m.MapGuestMemory(memory.regions), (memory.fd,))
            if map_config and self.shape.is_pci:
                self._map_config()
        except BaseException:
            child.kill()
            link.close()
            raise
        link.on_failed = events.failed
        self._closed = False

    # What it is.

    @property
    def failed(self) -> DeviceFailure | None:
        """Why it failed, or None."""
        return self._link.failed

    @property
    def is_pci(self) -> bool:
        return self.shape.is_pci

    @property
    def takes_input(self) -> bool:
        return self.shape.takes_input

    @property
    def state(self) -> State:
        return self._link.session.state

    @property
    def doorbell(self) -> int:
        """Readable when upcalls wait that no exchange will meet: call `drain`. Owned by this."""
        return self._child.doorbell

    @property
    def pidfd(self) -> int:
        """Readable when the process has ended: call `check`. Owned by this."""
        return self._child.pidfd

    def regions(self) -> tuple[Region, ...]:
        return self.shape.regions

    def handlers(self) -> tuple[BusDevice, ...]:
        """One bus device for each region; `base` of each may be told where it is mapped."""
        return self._accesses.handlers

    def stats(self) -> ProxyStats:
        tube, shared = self._accesses.counts()
        link = self._link
        return ProxyStats(tube, shared, self.lane.openings, link.upcalls, link.dropped_writes)

    # PciConfig.

    def bars(self) -> tuple[BarInfo, ...]:
        return self.shape.bars

    def read_config(self, register: int) -> int:
        """The dword at `register`; from shared memory unless a posted write is on its way."""
        config = self._config
        if config is not None and self._accesses.settled():
            return config[register]
        answer = self._access(m.ReadConfig(register))
        return answer.value if isinstance(answer, m.ReadConfigResult) else ALL_ONES[4]

    def write_config(self, register: int, offset: int, data: bytes) -> ConfigWriteResult:
        """Write a config register; a failed device changes nothing on the buses."""
        command = m.WriteConfig(offset, len(data), register, data.ljust(4, b"\0"))
        answer = self._access(command)
        if not isinstance(answer, m.WriteConfigResult):
            self._link.dropped_writes += 1
            return ConfigWriteResult()
        wrong = self._wrong_result(answer.result)
        if wrong:
            self._link.fail(f"broke the protocol: {wrong}", "WriteConfig")
            return ConfigWriteResult()
        return answer.result

    def read_virtual_config(self, register: int) -> int:
        answer = self._access(m.ReadVirtualConfig(register))
        return answer.value if isinstance(answer, m.ReadVirtualConfigResult) else ALL_ONES[4]

    def write_virtual_config(self, register: int, value: int) -> None:
        if self._access(m.WriteVirtualConfig(register, value)) is None:
            self._link.dropped_writes += 1

    # Its life.

    def sleep(self) -> None:
        """Stop it; when this returns, all its upcalls so far have been handled. Idempotent."""
        self.lane.close()
        self._link.ask(m.Sleep())
        self._accesses.gate(False)

    def wake(self) -> None:
        """Let it go on. Idempotent."""
        self._link.ask(m.Wake())
        self._accesses.gate(True)

    def snapshot(self) -> Any:
        """Its state as plain values."""
        answer = self._link.ask(m.Snapshot())
        assert isinstance(answer, m.SnapshotResult)
        return answer.state

    def restore(self, saved: Any) -> None:
        """Take up a state that `snapshot` gave."""
        command = m.Restore(saved)
        try:
            self._link.ask(command)
        except ValueError as error:
            raise DeviceError(self.name, f"cannot restore this state: {error}") from error

    def get_ranges(self) -> list[ClaimedRange]:
        """All ranges that it claims at the moment."""
        answer = self._link.ask(m.GetRanges())
        assert isinstance(answer, m.Ranges)
        for claimed in answer.ranges:
            wrong = self._wrong_range(claimed.region, claimed.bus, claimed.range)
            if wrong or len(answer.ranges) > len(self.shape.regions):
                self._link.fail(f"broke the protocol: {wrong or 'too many ranges'}", "GetRanges")
                self._link.check()
        return list(answer.ranges)

    def receive(self, data: bytes) -> int:
        """Offer it bytes from the outside world; how many leading ones it took."""
        taken = 0
        while taken < len(data):
            part = data[taken : taken + m.MAX_BYTES]
            answer = self._link.ask(m.Input(part))
            assert isinstance(answer, m.InputResult)
            if answer.accepted > len(part):
                self._link.fail("broke the protocol: took more input than there was", "Input")
                self._link.check()
            taken += answer.accepted
            if answer.accepted < len(part):
                break
        return taken

    def adjust(self, **wanted: Any) -> None:
        """Give options other values while it runs; their names and values are known to be right."""
        self._link.ask(m.Adjust(wanted))

    def sync(self) -> None:
        """Give the device the turn that it wants; not for the middle of an access.

        When this returns, all posted writes were done, too, and what it said was heard. Like an
        access, it never raises for what the child does.
        """
        self._access(m.Sync())

    def watch_writes(self, posted: Callable[[], None]) -> None:
        """Have `posted` called, in the middle of the access, when `look_after` has work again."""
        self._link.on_posted = posted

    def give_up_when(self, wanted: Callable[[], bool]) -> None:
        """While a wait for the child goes on, `wanted` is asked whether to give up the device."""
        self._link.given_up = wanted

    def look_after(self) -> None:
        """See that what was posted gets done: one that hangs in a write fails, as in a read.

        Waits for the child, at most the deadline, and only if it owes something. After this the
        next posted write is told once (`watch_writes`). Not for the middle of an access.
        """
        if self._accesses.look() and self._link.session.state in SPONTANEOUS:
            self.sync()

    def drain(self) -> bool:
        """Handle waiting upcalls, at most `DRAIN_AT_ONCE`; whether more may wait."""
        return self._link.drain(DRAIN_AT_ONCE)

    def check(self) -> bool:
        """See whether the process still runs; its end is a failure, which is told as usual."""
        if self._link.failed is None and not self._closed and self._child.wait_end(0):
            self._link.fail("", "")
        return self._link.failed is None

    def fail(self, reason: str) -> None:
        """The machine found it out in something that this room cannot judge: it has failed."""
        self._link.fail(reason, "")

    def destroy(self) -> None:
        """Hot-unplug: the device is gone, its process is there until `shutdown`."""
        self.lane.close()
        self._config = None
        self._link.post(m.DestroyDevice())
        self._accesses.gate(True)

    def shutdown(self) -> None:
        """Let the device clean up, end its process and give up all descriptors. Idempotent.

        Never raises for what the child does; one that does not end in time is killed.
        """
        if self._closed:
            return
        self._closed = True
        link = self._link
        try:
            self.lane.close()
            link.ask(m.Shutdown())
            if not self._child.wait_end(link.deadline):
                link.fail("did not end after Shutdown", "Shutdown")
        except DeviceError:
            pass  # told as an event already
        finally:
            if self._config is not None:
                self._config.release()
                self._config = None
            self.lane.unmap()
            link.close()

    def __enter__(self) -> ProxyDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not self._closed:
            self.shutdown()

    # Inside.

    def _access(self, command: m.Message) -> m.Message | None:
        """Ask for the guest; None if the device has failed."""
        try:
            return self._link.ask(command)
        except DeviceFailure:
            return None

    def _map_config(self) -> None:
        fd = lanes.create_sealed(f"config-{self.name}", _CONFIG_BYTES)
        try:
            memory = mmap.mmap(fd, _CONFIG_BYTES)
            answer = self._link.ask(m.InitPciConfigMapping(0, _CONFIG_BYTES), (fd,))
        finally:
            os.close(fd)
        if isinstance(answer, m.MappingResult) and answer.mapped:
            self._config = memoryview(memory).cast("I")

    def _wrong_result(self, result: ConfigWriteResult) -> str:
        groups: tuple[tuple[BusType, list[RegionRange]], ...] = (
            (BusType.MMIO, result.mmio_remove),
            (BusType.MMIO, result.mmio_add),
            (BusType.PIO, result.io_remove),
            (BusType.PIO, result.io_add),
        )
        for bus, moves in groups:
            if len(moves) > len(self.shape.bars):
                return "too many ranges"
            for region, place in moves:
                wrong = self._wrong_range(region, bus, place)
                if wrong:
                    return wrong
        return "removed other devices" if result.removed_pci_devices else ""

    def _wrong_range(self, region: int, bus: BusType, place: Range) -> str:
        """Why this cannot be where a region is; "" if it can."""
        if not 0 <= region < len(self.shape.regions):
            return f"region {region}, which it does not have"
        declared = self.shape.regions[region]
        if declared.bus is not bus or declared.length != place.length:
            return f"{bus} {place} for region '{declared.name}', which is not its size or bus"
        return ""


def _tie(link: Link, shared: MachineLane, accesses: Accesses) -> None:
    """Let the lane and the accesses follow the link.

    The proxy itself stays out of every cycle of references: dropping it must end its child before
    the collector closes the tube.
    """

    def sent() -> None:
        accesses.settle()
        shared.asked()

    def stopped() -> None:
        shared.abandon()
        accesses.gate(True)  # a closed tube refuses for itself

    link.on_sent, link.on_stopped = sent, stopped
