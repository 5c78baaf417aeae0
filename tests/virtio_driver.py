"""A virtio driver of the tests' own, in Python and without a CPU.

It finds its way by the device's capabilities as a real driver does (4.1.4), so it works on any
`Rig`: a model in this process, or a proxy of one. Queues exist in both formats, with chained or
indirect descriptors, and can be told to break any rule by writing the rings directly.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fakes import FakeHost

from devices.contract import Device
from devices.pci.capability import CapabilityId
from devices.registry import parse_options

RAM_SIZE = 4 << 20
RING_AREA = 0x10_0000
"""Where queues go; requests go above `BUFFERS`."""
BUFFERS = 0x20_0000

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
F_PACKED, F_IN_ORDER, F_RING_RESET = 1 << 34, 1 << 35, 1 << 40
NO_VECTOR = 0xFFFF

(DEVICE_SELECT, DEVICE_FEATURE, DRIVER_SELECT, DRIVER_FEATURE) = (0, 4, 8, 12)
CONFIG_VECTOR, NUM_QUEUES, STATUS, GENERATION = 0x10, 0x12, 0x14, 0x15
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, NOTIFY_OFF = 0x16, 0x18, 0x1A, 0x1C, 0x1E
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE, QUEUE_RESET = 0x20, 0x28, 0x30, 0x3A


class Rig(Protocol):
    """A device and the machine around it."""

    ram: Any

    def read(self, bar: int, offset: int, size: int) -> int: ...
    def write(self, bar: int, offset: int, size: int, value: int) -> None: ...
    def read_config(self, register: int) -> int: ...
    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None: ...
    def settle(self) -> None: ...
    @property
    def irq(self) -> bool: ...
    @property
    def messages(self) -> list[tuple[int, int]]: ...
    @property
    def logs(self) -> list[str]: ...
    def snapshot(self) -> Any: ...
    def replace(self, saved: Any) -> None: ...


class LocalRig:
    """A model in this process, with turns and work as the machine gives them."""

    def __init__(
        self,
        kind: type[Device],
        options: Mapping[str, Any] | None = None,
        fds: Mapping[str, int] | None = None,
        ram: int = RAM_SIZE,
    ) -> None:
        self._kind, self._options, self._fds = kind, options or {}, fds
        self.ram: Any = mmap.mmap(-1, ram)
        self._build()

    def _build(self) -> None:
        self.host = FakeHost(self._fds)
        self.host.turns.memory.map([(0, memoryview(self.ram))])
        self.device: Any = self._kind(self.host, parse_options(self._kind, self._options))
        self.host.turns.attach(self.device)

    def _handler(self, bar: int) -> tuple[Any, bool]:
        region = next(info.region for info in self.device.bars() if info.bar == bar)
        return self.device.handlers()[region], self.device.regions()[region].synced

    def read(self, bar: int, offset: int, size: int) -> int:
        return self.host.turns.reader(self._handler(bar)[0].read)(offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        handler, synced = self._handler(bar)
        if synced:
            self.host.turns.write(handler.write, offset, size, value)
        else:
            handler.write(offset, size, value)

    def read_config(self, register: int) -> int:
        value: int = self.device.read_config(register)
        return value

    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None:
        self.device.write_config(register, offset, value.to_bytes(size, "little"))

    def settle(self) -> None:
        """Until the device wants nothing any more."""
        while True:
            wanted = self.host.count("want_turn")
            if self.host.turns.work_wanted:
                self.host.turns.work()
            self.host.turns.take()
            if self.host.count("want_turn") == wanted and not self.host.turns.work_wanted:
                return

    @property
    def irq(self) -> bool:
        return self.host.irq

    @property
    def messages(self) -> list[tuple[int, int]]:
        return [call[1:] for call in self.host.calls if call[0] == "send_msi"]

    @property
    def logs(self) -> list[str]:
        return [call[1] for call in self.host.calls if call[0] == "log"]

    def snapshot(self) -> Any:
        self.device.sleep()
        self.host.turns.memory.flush()
        return self.device.snapshot()

    def replace(self, saved: Any) -> None:
        """Go on in another device, built anew and restored."""
        self.device.close()
        self._build()
        self.device.sleep()
        self.device.restore(saved)
        self.device.wake()
        self.settle()


@dataclass
class Request:
    """What became of a request."""

    places: list[tuple[int, int]]
    length: int | None = None

    def data(self, ram: Any) -> bytes:
        """All of its writable bytes."""
        return b"".join(bytes(ram[a : a + n]) for a, n in self.places)

    def written(self, ram: Any) -> bytes:
        """The first `length` of them."""
        assert self.length is not None
        return self.data(ram)[: self.length]


class Driver:
    """Drives one device."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ram = rig.ram
        self._free_rings, self._free = RING_AREA, BUFFERS
        self.structures: dict[int, tuple[int, int, int]] = {}
        self.multiplier = 0
        self.window = 0
        self.msix_capability = 0
        self._find_structures()
        self.queues: dict[int, DriverQueue] = {}
        self.features = 0
        self.bus_master(True)

    def _find_structures(self) -> None:
        """4.1.4: walk the capability list; the first of each kind counts."""
        place = self.rig.read_config(0x34 // 4) & 0xFF
        while place:
            first = [self.rig.read_config(place // 4 + n) for n in range(4)]
            identity, kind = first[0] & 0xFF, first[0] >> 24
            if identity == CapabilityId.MSI_X:
                self.msix_capability = place
            elif identity == CapabilityId.VENDOR_SPECIFIC:
                if kind == 5:
                    self.window = place
                else:
                    self.structures.setdefault(kind, (first[1] & 0xFF, first[2], first[3]))
                if kind == 2:
                    self.multiplier = self.rig.read_config(place // 4 + 4)
            place = first[0] >> 8 & 0xFF

    def bus_master(self, on: bool) -> None:
        command = self.rig.read_config(1) & 0xFFFF & ~4
        self.rig.write_config(1, command | 2 | (4 if on else 0), 2)

    # Registers.

    def get(self, offset: int, size: int) -> int:
        bar, start, _ = self.structures[1]
        return self.rig.read(bar, start + offset, size)

    def set(self, offset: int, size: int, value: int) -> None:
        bar, start, _ = self.structures[1]
        self.rig.write(bar, start + offset, size, value)

    def isr(self) -> int:
        bar, start, _ = self.structures[3]
        return self.rig.read(bar, start, 1)

    def config(self, offset: int, size: int) -> int:
        bar, start, _ = self.structures[4]
        return self.rig.read(bar, start + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        bar, start, _ = self.structures[4]
        self.rig.write(bar, start + offset, size, value)

    @property
    def status(self) -> int:
        return self.get(STATUS, 1)

    def offered(self) -> int:
        value = 0
        for select in range(2):
            self.set(DEVICE_SELECT, 4, select)
            value |= self.get(DEVICE_FEATURE, 4) << 32 * select
        return value

    def reset(self) -> None:
        self.set(STATUS, 1, 0)
        assert self.status == 0
        self.queues.clear()
        self._free_rings, self._free = RING_AREA, BUFFERS

    def negotiate(self, features: int) -> bool:
        """3.1.1, up to FEATURES_OK; whether the device took them."""
        self.reset()
        self.set(STATUS, 1, ACKNOWLEDGE)
        self.set(STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.features = features
        for select in range(2):
            self.set(DRIVER_SELECT, 4, select)
            self.set(DRIVER_FEATURE, 4, features >> 32 * select & 0xFFFF_FFFF)
        self.set(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def start(self, features: int = F_VERSION_1, size: int | None = None) -> None:
        """All of 3.1.1, with every queue."""
        assert self.negotiate(features), f"the device refused {features:#x}"
        for index in range(self.get(NUM_QUEUES, 2)):
            self.queue(index, size)
        self.ready()

    def ready(self) -> None:
        self.set(STATUS, 1, self.status | DRIVER_OK)

    def queue(self, index: int, size: int | None = None) -> DriverQueue:
        """Set up a queue."""
        self.set(QUEUE_SELECT, 2, index)
        if size is not None:
            self.set(QUEUE_SIZE, 2, min(size, self.get(QUEUE_SIZE, 2)))
        size = self.get(QUEUE_SIZE, 2)
        kind = PackedQueue if self.features & F_PACKED else SplitQueue
        made = kind(self, index, size)
        for offset, area in zip((QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE), made.areas, strict=True):
            self.set(offset, 8, area)
        self.set(QUEUE_ENABLE, 2, 1)
        self.queues[index] = made
        return made

    def doorbell(self, index: int) -> None:
        bar, start, _ = self.structures[2]
        self.set(QUEUE_SELECT, 2, index)
        offset = self.get(NOTIFY_OFF, 2) * self.multiplier
        self.rig.write(bar, start + offset, 2, index)

    def enable_msix(self) -> None:
        """Every vector n unmasked, with address 0xFEE00000 and data n; config has vector 0."""
        capability = self.msix_capability // 4
        count = (self.rig.read_config(capability) >> 16 & 0x7FF) + 1
        table = self.rig.read_config(capability + 1)
        self.rig.write_config(capability, 0x8000, 2, 2)
        for vector in range(count):
            for part, value in enumerate((0xFEE0_0000, 0, vector, 0)):
                self.rig.write(table & 7, (table & ~7) + 16 * vector + 4 * part, 4, value)

    # Memory.

    def ring_memory(self, size: int, align: int = 16) -> int:
        place = (self._free_rings + align - 1) & -align
        self._free_rings = place + size
        assert self._free_rings <= BUFFERS
        self.ram[place : place + size] = bytes(size)
        return place

    def memory(self, size: int) -> int:
        """For a request; old requests are overwritten when it runs out."""
        if self._free + size > len(self.ram):
            self._free = BUFFERS
        place = self._free
        self._free += size
        assert self._free <= len(self.ram)
        return place


@dataclass
class DriverQueue:
    """A queue as the driver keeps it; subclasses know the format."""

    driver: Driver
    index: int
    size: int
    areas: tuple[int, int, int] = (0, 0, 0)
    in_flight: dict[int, Request] = field(default_factory=dict)

    def send(
        self,
        out: Sequence[bytes] = (),
        into: Sequence[int] = (),
        *,
        indirect: bool = False,
        kick: bool = True,
    ) -> Request:
        """One request: pieces to read, and lengths of pieces to write."""
        ram = self.driver.ram
        parts = []
        for piece in out:
            place = self.driver.memory(len(piece))
            ram[place : place + len(piece)] = piece
            parts.append((place, len(piece), 0))
        places = [(self.driver.memory(length), length) for length in into]
        for place, length in places:
            ram[place : place + length] = bytes(length)
        parts += [(place, length, WRITE) for place, length in places]
        request = Request(places)
        if indirect:
            table = self.driver.memory(16 * len(parts))
            ram[table : table + 16 * len(parts)] = self.table(parts)
            parts = [(table, 16 * len(parts), INDIRECT)]
        self.in_flight[self.offer(parts)] = request
        if kick:
            self.kick()
        return request

    def ask(self, out: Sequence[bytes] = (), into: Sequence[int] = (), **how: Any) -> Request:
        """One request, until it is done."""
        request = self.send(out, into, **how)
        self.driver.rig.settle()
        self.collect()
        assert request.length is not None, "the device did not answer"
        return request

    def kick(self) -> None:
        if self.wants_kick():
            self.driver.doorbell(self.index)

    def collect(self) -> list[Request]:
        """What was given back since the last time."""
        done = []
        while (found := self.used()) is not None:
            token, length = found
            request = self.in_flight.pop(token)
            request.length = length
            done.append(request)
        return done

    def table(self, parts: Sequence[tuple[int, int, int]]) -> bytes:
        raise NotImplementedError

    def offer(self, parts: Sequence[tuple[int, int, int]]) -> int:
        raise NotImplementedError

    def used(self) -> tuple[int, int] | None:
        raise NotImplementedError

    def wants_kick(self) -> bool:
        raise NotImplementedError


class SplitQueue(DriverQueue):
    """2.7."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        super().__init__(driver, index, size)
        self.areas = (
            driver.ring_memory(16 * size),
            driver.ring_memory(6 + 2 * size),
            driver.ring_memory(6 + 8 * size),
        )
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.next_avail = self.next_used = self.kicked = 0

    def put(self, place: int, form: str, *values: int) -> None:
        struct.pack_into(form, self.driver.ram, place, *values)

    def get(self, place: int, form: str = "<H") -> int:
        value: int = struct.unpack_from(form, self.driver.ram, place)[0]
        return value

    def table(self, parts: Sequence[tuple[int, int, int]]) -> bytes:
        last = len(parts) - 1
        return b"".join(
            struct.pack("<QIHH", a, n, f | (NEXT if i < last else 0), i + 1 if i < last else 0)
            for i, (a, n, f) in enumerate(parts)
        )

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        self.put(self.areas[0] + 16 * index, "<QIHH", address, length, flags, following)

    def offer(self, parts: Sequence[tuple[int, int, int]]) -> int:
        taken = [self.free.pop() for _ in parts]
        for number, (place, length, flags) in enumerate(parts):
            more = number + 1 < len(parts)
            following = taken[number + 1] if more else 0
            self.descriptor(taken[number], place, length, flags | (NEXT if more else 0), following)
        self.chains[taken[0]] = taken
        self.make_available(taken[0])
        return taken[0]

    def make_available(self, head: int) -> None:
        self.put(self.areas[1] + 4 + 2 * (self.next_avail % self.size), "<H", head)
        self.set_index(self.next_avail + 1)

    def set_index(self, value: int) -> None:
        self.next_avail = value & 0xFFFF
        self.put(self.areas[1] + 2, "<H", self.next_avail)

    def used(self) -> tuple[int, int] | None:
        if self.get(self.areas[2] + 2) == self.next_used:
            return None
        place = self.areas[2] + 4 + 8 * (self.next_used % self.size)
        head, length = struct.unpack_from("<II", self.driver.ram, place)
        self.next_used = (self.next_used + 1) & 0xFFFF
        self.free += self.chains.pop(head)
        return head, length

    def wants_kick(self) -> bool:
        old, self.kicked = self.kicked, self.next_avail
        if self.driver.features & F_EVENT_IDX:
            event = self.get(self.areas[2] + 4 + 8 * self.size)
            return (self.next_avail - event - 1) & 0xFFFF < (self.next_avail - old) & 0xFFFF
        return not self.get(self.areas[2]) & 1

    def suppress(self, *, flag: int | None = None, event: int | None = None) -> None:
        """2.7.7: which used buffer notifications it wants."""
        if flag is not None:
            self.put(self.areas[1], "<H", flag)
        if event is not None:
            self.put(self.areas[1] + 4 + 2 * self.size, "<H", event & 0xFFFF)


class PackedQueue(DriverQueue):
    """2.8."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        super().__init__(driver, index, size)
        self.areas = (driver.ring_memory(16 * size), driver.ring_memory(4), driver.ring_memory(4))
        self.ids = list(range(size))
        self.counts: dict[int, int] = {}
        self.next_avail = self.next_used = self.added = 0
        self.avail_wrap = self.used_wrap = True

    def table(self, parts: Sequence[tuple[int, int, int]]) -> bytes:
        return b"".join(struct.pack("<QIHH", a, n, 0, f) for a, n, f in parts)

    def descriptor(self, position: int, address: int, length: int, id: int, flags: int) -> None:
        place = self.areas[0] + 16 * position
        struct.pack_into("<QIHH", self.driver.ram, place, address, length, id, flags)

    def offer(self, parts: Sequence[tuple[int, int, int]]) -> int:
        token = self.ids.pop()
        self.counts[token] = len(parts)
        for number, (place, length, kind) in enumerate(parts):
            flags = kind | (NEXT if number + 1 < len(parts) else 0)
            flags |= AVAIL if self.avail_wrap else USED
            self.descriptor(self.next_avail, place, length, token, flags)
            self.next_avail += 1
            if self.next_avail == self.size:
                self.next_avail, self.avail_wrap = 0, not self.avail_wrap
        self.added += len(parts)
        return token

    def used(self) -> tuple[int, int] | None:
        place = self.areas[0] + 16 * self.next_used
        _, length, token, flags = struct.unpack_from("<QIHH", self.driver.ram, place)
        if bool(flags & AVAIL) != self.used_wrap or bool(flags & USED) != self.used_wrap:
            return None
        self.next_used += self.counts.pop(token)
        if self.next_used >= self.size:
            self.next_used, self.used_wrap = self.next_used - self.size, not self.used_wrap
        self.ids.append(token)
        return token, length if flags & WRITE else 0

    def wants_kick(self) -> bool:
        added, self.added = self.added, 0
        where, flags = struct.unpack_from("<HH", self.driver.ram, self.areas[2])
        if flags != 2:
            return flags == 0
        event = where & 0x7FFF
        if bool(where >> 15) != self.avail_wrap:
            event -= self.size
        return (self.next_avail - event - 1) & 0xFFFF < added

    def suppress(self, *, flag: int, event: int = 0) -> None:
        """2.8.10: which used buffer notifications it wants; `event` with its wrap counter."""
        struct.pack_into("<HH", self.driver.ram, self.areas[1], event, flag)
