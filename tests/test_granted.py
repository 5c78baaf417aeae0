"""``dma=granted``: what a device that was taken over sees of the guest, and what it can change."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from granted_rig import GrantedRig
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_rig import MachineRig
from virtio_driver import (
    BUFFERS,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    NEEDS_RESET,
    QUEUE_RESET,
    QUEUE_SELECT,
    QUEUE_SIZE,
    Driver,
)
from virtio_echo import LATER, NOW, VirtioEcho

from devices.errors import DeviceError, UserError
from devices.pci.contract import VIRTUAL_RESET
from devices.virtio.chain import Chain
from devices.virtio.granted import COUNT, GRANT_BYTES, USED, USED_AT
from devices.virtio.ring import VirtQueue
from proxy.jail import JailMode
from vmm.config import DeviceConfig, DmaMode, HostOptions, parse_device
from vmm.machine import Machine

SECRET = b"a secret of the guest's that is in no request"
TOLD = b"what the guest tells the device in a request"
FORMATS = [
    pytest.param(F_VERSION_1 | F_INDIRECT | packed | event, id=f"{name}{'-event' if event else ''}")
    for (name, packed), event in itertools.product(
        (("split", 0), ("packed", F_PACKED)), (0, F_EVENT_IDX)
    )
]


class TakenOver(VirtioEcho):
    """Carries out the text of a request as an attack on what it has mapped."""

    model: ClassVar[str] = "taken-over"

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        text = chain.read()
        if text.startswith(b"!"):
            ATTACKS[text[1:].decode()][0](self, queue, chain)
        else:
            chain.write(text[::-1])


def _entry(device: TakenOver, queue: VirtQueue, *entry: int, count: int | None = None) -> None:
    """Write a used entry, and a count of them, behind the ring's back."""
    granted = device._granted
    assert granted is not None
    part, place = granted.parts[queue.index], queue.state.next_used
    USED.pack_into(granted.view, part.used + USED.size * place, *entry)
    COUNT.pack_into(granted.view, part.base + USED_AT, place + 1 if count is None else count)
    queue.forget()  # the ring itself says nothing more of it,
    device.spend(1000)  # and nothing of other requests in this turn


def _twice(device: TakenOver, queue: VirtQueue, chain: Chain) -> None:
    queue.complete(chain)
    _entry(device, queue, chain.id, 0, 0, 0)


def _scribble(device: TakenOver, queue: VirtQueue, chain: Chain) -> None:
    assert device._granted is not None
    view = device._granted.view
    view[:] = b"\xaa" * len(view)


Attack = Callable[[TakenOver, VirtQueue, Chain], None]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "scribble": (_scribble, "used"),
    "absurd count": (lambda d, q, c: _entry(d, q, 0, 0, 0, 0, count=0xFFFF_FFFF), "used"),
    "count of more": (lambda d, q, c: _entry(d, q, c.id, 0, 0, 0, count=100), "used"),
    "absurd place": (lambda d, q, c: _entry(d, q, 0xFFFF_FFFF, 0, 0, 0), "not granted"),
    "place of nobody": (lambda d, q, c: _entry(d, q, c.id + 2, 0, 0, 0), "not granted"),
    "twice": (_twice, "not granted"),
    "written too much": (lambda d, q, c: _entry(d, q, c.id, c.room + 1, 0, 0), "with room for"),
    "written absurdly": (lambda d, q, c: _entry(d, q, c.id, 0xFFFF_FFFF, 0, 0), "with room for"),
    "written elsewhere": (
        lambda d, q, c: _entry(d, q, c.id, 0, c.room, c.room + 1),
        "with room for",
    ),
    "written far away": (
        lambda d, q, c: _entry(d, q, c.id, 0, 0x7FFF_FFFF, 0xFFFF_FFFF),
        "with room for",
    ),
}


class Granted:
    """A machine with a device that was taken over, and its driver."""

    def __init__(self, features: int = F_VERSION_1, **how: Any) -> None:
        self.rig = MachineRig(TakenOver, **{"dma": "granted", **how})
        self.driver = Driver(self.rig)
        self.driver.start(features, 16)
        self.queue = self.driver.queues[NOW]

    def __enter__(self) -> Granted:
        return self

    def __exit__(self, *error: Any) -> None:
        self.rig.__exit__(*error)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("packed", [0, F_PACKED], ids=["split", "packed"])
def test_a_lie_is_the_devices_failure(packed: int, name: str) -> None:
    with Granted(F_VERSION_1 | packed) as granted:
        rig, queue = granted.rig, granted.queue
        assert queue.ask([b"abc"], [3]).written(rig.ram) == b"cba"
        assert rig.proxy.failed is None
        queue.send([b"!" + name.encode()], [8], kick=False)
        queue.send([b"another, too"], [8], kick=False)
        before = bytes(rig.ram)
        queue.kick()
        rig.settle()
        assert rig.proxy.failed is not None
        text = str(rig.proxy.failed)
        assert "broke the protocol" in text
        assert ATTACKS[name][1] in text
        used = 16 * queue.size if packed else 4 + 8 * queue.size  # an honest one may come first
        assert _differ(before, rig.ram, [(queue.areas[0 if packed else 2], used)]) == []


def _differ(before: bytes, after: Any, but: list[tuple[int, int]]) -> list[int]:
    """Where memory has changed outside of these ranges."""
    now, was = bytearray(after), bytearray(before)
    for start, length in but:
        now[start : start + length] = was[start : start + length] = bytes(length)
    return (
        [] if now == was else [n for n, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]
    )


def _finds(pid: int, text: bytes) -> bool:
    """Whether `text` is anywhere in the memory of a process."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            begin, end = (int(part, 16) for part in span.split("-"))
            with suppress(OSError, OverflowError):  # pages of the kernel's own
                memory.seek(begin)
                if "r" in rights and text in memory.read(end - begin):
                    return True
    return False


@pytest.mark.parametrize("dma", ["granted", "shared"])
def test_it_finds_no_byte_but_those_of_its_requests(dma: str) -> None:
    """All that its process maps is searched, from outside; shared shows that this can fail.

    Into a jail an ordinary user cannot look; what is mapped there is the same without one.
    """
    jail = JailMode.OFF if os.geteuid() else JailMode.AUTO
    with Granted(dma=dma, host=HostOptions(jail=jail)) as granted:
        ram, queue = granted.rig.ram, granted.queue
        secret = SECRET[::-1]  # this test is in the process, too
        told = bytes(reversed(TOLD))
        place = granted.driver.memory(4096)
        ram[place : place + len(secret)] = secret
        # What is in a room before the device writes there is secret, too.
        request = queue.send([told], [200], kick=False)
        room = request.places[0][0] + 100
        ram[room : room + len(secret)] = secret
        queue.kick()
        granted.rig.settle()
        queue.collect()
        assert request.written(ram) == TOLD
        assert _finds(granted.rig.proxy.pid, told)
        assert _finds(granted.rig.proxy.pid, secret) == (dma == "shared")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 32),
    features=st.sampled_from([0, F_PACKED, F_EVENT_IDX, F_PACKED | F_EVENT_IDX]),
)
def test_whatever_it_scribbles_stays_in_its_rooms(seed: int, features: int) -> None:
    chance = random.Random(seed)
    rig = GrantedRig(VirtioEcho, ram=BUFFERS + (1 << 16))  # all of it is compared in each round
    driver = Driver(rig)
    driver.start(F_VERSION_1 | F_INDIRECT | features, 16)
    allowed = []
    for queue in driver.queues.values():
        allowed += [(queue.areas[0], 16 * queue.size)] if features & F_PACKED else []
        allowed += [(queue.areas[2], 4 if features & F_PACKED else 6 + 8 * queue.size)]
    for _ in range(12):
        queue = chance.choice(list(driver.queues.values()))
        if len(queue.in_flight) < 3:
            into = [chance.randrange(1, 40) for _ in range(chance.randrange(3))]
            request = queue.send([b"x"], into, indirect=chance.random() < 0.5, kick=False)
            allowed += request.places
        before = bytes(rig.ram)
        rig.granter.begin()
        for part in rig.device._granted.parts:
            for _ in range(chance.randrange(4)):
                at = chance.choice(
                    [part.base + 4 * chance.randrange(64), part.used + 4 * chance.randrange(32)]
                )
                small = chance.choice([0, 1, 2, 3, chance.randrange(16), chance.randrange(1 << 32)])
                COUNT.pack_into(rig.area, at, small)
            COUNT.pack_into(rig.area, part.base + USED_AT, chance.randrange(5))
        rig.granter.end()
        assert _differ(before, rig.ram, allowed) == []


# What is granted, and when.


@pytest.mark.parametrize("features", FORMATS)
def test_no_bus_master_no_grants(features: int) -> None:
    with Granted(features) as granted:
        driver, queue, rig = granted.driver, granted.queue, granted.rig
        later = driver.queues[LATER]
        queue.ask([b"ab"], [2])
        driver.bus_master(False)
        request = queue.send([TOLD], [len(TOLD)])
        before = bytes(rig.ram)
        driver.doorbell(NOW)
        rig.settle()
        assert bytes(rig.ram) == before
        granter = rig.proxy._granter
        assert all(not each._grants for each in granter._queues)
        driver.bus_master(True)
        rig.settle()
        queue.collect()
        assert request.written(rig.ram) == TOLD[::-1]
        assert later.ask([b"xy"], [2]).written(rig.ram) == b"yx"


@pytest.mark.parametrize("features", FORMATS)
def test_nothing_is_written_back_after_a_reset(features: int) -> None:
    """A device that completes what it had before the driver reset its queue, or all of it."""
    for again in (_start_again, _reset_queue):
        rig = GrantedRig(VirtioEcho)
        driver = Driver(rig)
        driver.start(features | F_RING_RESET, 8)
        request = driver.queues[LATER].send([b"abc"], [3])
        (chain,) = rig.device.held
        again(driver, features | F_RING_RESET)
        part = rig.device._granted.parts[LATER]
        chain.write(b"xyz")
        USED.pack_into(rig.area, part.used, chain.id, 3, 0, 0)
        COUNT.pack_into(rig.area, part.base + USED_AT, 1)
        before = bytes(rig.ram)
        assert rig.granter.live
        rig.granter.begin()
        assert "used 1 requests of the 0" in rig.granter.end()
        assert bytes(rig.ram) == before
        assert request.data(rig.ram) == bytes(3)


@pytest.mark.parametrize("features", FORMATS)
def test_a_reset_of_its_bus_takes_everything_back(features: int) -> None:
    """PCI-to-PCI Bridge 1.2, 3.2.5.17: the guest resets what is behind a bridge, and the rings."""
    with Granted(features) as granted:
        rig = granted.rig
        granted.queue.ask([TOLD], [len(TOLD)])
        granter = rig.proxy._granter
        assert granter.live
        granted.queue.send([TOLD], [len(TOLD)])  # without a doorbell
        rig.proxy.write_virtual_config(VIRTUAL_RESET, 1)
        before = bytes(rig.ram)
        rig.settle()
        assert not granter.live
        assert all(not each._grants for each in granter._queues)
        assert bytes(rig.ram) == before


def _start_again(driver: Driver, features: int) -> None:
    driver.start(features, 8)


def _reset_queue(driver: Driver, features: int) -> None:
    driver.set(QUEUE_SELECT, 2, LATER)
    driver.set(QUEUE_RESET, 2, 1)
    driver.queue(LATER, 8)


@pytest.mark.parametrize("features", FORMATS)
def test_more_than_there_is_room_for_comes_bit_by_bit(features: int) -> None:
    """Requests of 3 MiB, two of which fit at a time, on a queue and on one that holds them."""
    with Granted(features) as granted:
        rig, driver = granted.rig, granted.driver
        length = 3 << 20
        place = driver.memory(length)
        rig.ram[place : place + length] = b"z" * length
        for queue in driver.queues.values():
            for number in range(7):
                target = driver.memory(16)
                rig.ram[target : target + 1] = bytes([number])
                token = queue.offer([(place, length, 0), (target + 1, 4, 2)])
                queue.in_flight[token] = _Done([(target + 1, 4)])
            queue.kick()
            rig.settle()
            done = queue.collect()
            assert [each.written(rig.ram) for each in done] == [b"zzzz"] * 7
        assert rig.logs == []


def _Done(places: list[tuple[int, int]]) -> Any:
    from virtio_driver import Request

    return Request(places)


def test_a_request_that_is_too_long_needs_a_reset() -> None:
    with Granted() as granted:
        queue, rig = granted.queue, granted.rig
        queue.ask([b"ab"], [2])
        half = GRANT_BYTES // 2
        queue.offer([(0x20_0000, half, 0), (0x20_0000, half, 0), (0x30_0000, 1, 2)])
        granted.driver.doorbell(NOW)
        rig.settle()
        assert granted.driver.status & NEEDS_RESET
        assert f"{GRANT_BYTES} can be granted" in rig.logs[0]
        granted.driver.start(F_VERSION_1, 16)
        assert granted.driver.queues[NOW].ask([b"ab"], [2]).written(rig.ram) == b"ba"


def test_the_size_of_a_queue_is_the_machines() -> None:
    """One that tells the driver another size than it said at first is not believed."""

    class Shrinks(TakenOver):
        def read_bar(self, bar: int, offset: int, size: int) -> int:
            value = super().read_bar(bar, offset, size)
            return 4 if (bar, offset, size) == (0, QUEUE_SIZE, 2) else value

    with MachineRig(Shrinks, dma="granted") as rig:
        driver = Driver(rig)
        driver.negotiate(F_VERSION_1)
        assert driver.queue(NOW).size == 128
        assert driver.queue(LATER, 16).size == 16


def test_its_registers_stay_where_they_were() -> None:
    """A guest that looks anew does not find another kind of device, or a ring in other places."""

    class Moves(TakenOver):
        lies = False

        def write_device_config(self, offset: int, size: int, value: int) -> None:
            self.lies = True

        def read_config(self, register: int) -> int:
            return 0x1234_5678 if self.lies else super().read_config(register)

    with MachineRig(Moves, dma="granted") as rig:
        driver = Driver(rig)
        header = [rig.read_config(n) for n in range(16)]
        driver.set_config(0, 4, 1)
        assert rig.read_config(6) == 0x1234_5678
        again = Driver.__new__(Driver)
        again.rig, again.structures = rig, {}
        again.window = again.msix_capability = again.multiplier = 0
        again._find_structures()
        assert again.structures == driver.structures
        assert (again.window, again.multiplier) == (driver.window, driver.multiplier)
        for register, bits in {0: -1, 2: -1, 3: 0xFF_0000, 11: -1, 13: 0xFF}.items():
            assert rig.read_config(register) & bits == header[register] & bits


@pytest.mark.parametrize("features", FORMATS)
def test_through_the_window(features: int) -> None:
    """4.1.4.9: a driver that never touches a BAR."""

    class Windowed(Driver):
        def set(self, offset: int, size: int, value: int) -> None:
            self._point(offset, min(size, 4))
            data = self.window // 4 + 4
            self.rig.write_config(data, value & 0xFFFF_FFFF, min(size, 4))
            if size == 8:
                self._point(offset + 4, 4)
                self.rig.write_config(data, value >> 32)

        def get(self, offset: int, size: int) -> int:
            self._point(offset, size)
            return self.rig.read_config(self.window // 4 + 4) & (1 << 8 * size) - 1

        def _point(self, offset: int, size: int) -> None:
            window = self.window // 4
            self.rig.write_config(window + 1, 0, 1)
            self.rig.write_config(window + 2, offset)
            self.rig.write_config(window + 3, size)

        def doorbell(self, index: int) -> None:
            _, start, _ = self.structures[2]
            self.set(start + 4 * index, 2, index)

    with MachineRig(VirtioEcho, dma="granted") as rig:
        driver = Windowed(rig)
        driver.start(features, 16)
        for queue in driver.queues.values():
            assert queue.ask([b"abc"], [2]).written(rig.ram) == b"cb"


@pytest.mark.parametrize("features", FORMATS)
def test_a_snapshot_goes_on_where_it_was(features: int) -> None:
    with MachineRig(VirtioEcho, dma="granted") as rig:
        driver = Driver(rig)
        driver.start(features, 8)
        queue = driver.queues[LATER]
        for number in range(20):  # the ring has 8 places
            text = b"%d" % number
            request = queue.send([text], [8], kick=number % 3 == 0)
            rig.replace(rig.snapshot())
            driver.ram = rig.ram
            rig.settle()
            if not number % 3:
                assert queue.in_flight == {} or queue.collect()
            if request.length is None:
                driver.doorbell(LATER)
                rig.settle()
                queue.collect()
            assert request.written(rig.ram) == text[::-1]
        assert rig.machine.config.devices[0].dma is DmaMode.GRANTED
        assert rig.logs == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("grants", "queues", 0, "size"), 0),
        (("grants", "queues", 0, "size"), 3),
        (("grants", "queues", 0, "desc"), 1 << 64),
        (("grants", "places"), []),
        (("grants", "places", 1), 32),
        (("grants", "mistakes"), []),
        (("grants", "bar"), 256),
        (("grants",), None),
        (("grants",), {}),
        (("device",), {}),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_is_refused(path: tuple[Any, ...], value: Any) -> None:
    with Granted() as granted:
        proxy = granted.rig.proxy
        proxy.sleep()
        saved = proxy.snapshot()
        proxy.restore(saved)
        part = saved
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        with pytest.raises(DeviceError, match="cannot restore"):
            proxy.restore(saved)
        with pytest.raises(DeviceError, match="dma=granted"):
            proxy.restore(saved["device"])


class Claims(VirtioEcho):
    """Says that it wrote pages whenever its configuration is written to."""

    model: ClassVar[str] = "claims"

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        self.host.wrote_pages(1, 2)


@pytest.mark.parametrize(
    ("dma", "master", "believed"),
    [("shared", True, True), ("shared", False, False), ("granted", True, False)],
)
def test_who_is_believed_to_have_written_pages(
    dma: str, master: bool, believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MachineRig(Claims, dma=dma) as rig:
        driver = Driver(rig)
        driver.bus_master(master)
        dropped: list[tuple[int, int]] = []
        monkeypatch.setattr(rig.parts.cpu, "invalidate_pages", dropped.extend)
        driver.set_config(0, 4, 1)
        assert dropped == ([(1, 2)] if believed else [])
        assert rig.parts.wiring.lost_writes == (not believed)
        assert bool(rig.logs) != believed
        assert rig.proxy.failed is None


# How it is asked for.


def test_the_option() -> None:
    assert parse_device("rng,dma=granted", []) == DeviceConfig("rng", "rng", dma=DmaMode.GRANTED)
    assert parse_device("rng,dma=shared", []).dma is DmaMode.SHARED
    assert DeviceConfig("rng", "rng", dma="granted").dma is DmaMode.GRANTED  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rng,dma=some", "dma is one of shared, granted"),
        ("echo,dma=granted", "no more of guest memory than"),
        ("balloon,dma=granted", "no more of guest memory than"),
        ("rng,dma=granted,isolation=none", "a process of its own"),
    ],
)
def test_what_cannot_be_granted(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_device(text, [])


@pytest.mark.parametrize("by_function", [False, True])
def test_a_model_of_ones_own_that_needs_memory(by_function: bool) -> None:
    from dma_device import DmaProbe

    with Machine(memory="16M", devices=()) as machine:
        kind: Any = partial(DmaProbe) if by_function else DmaProbe
        machine.add_device(kind, "probe", dma="granted")
        with pytest.raises(UserError, match="device 'probe': dma=granted is for devices"):
            machine.build()


def test_it_maps_no_guest_memory() -> None:
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("rng", "rng", dma="granted")
        (proxy,) = machine.parts.proxies
        assert not proxy.maps_memory
        assert proxy.granted_bytes > GRANT_BYTES
