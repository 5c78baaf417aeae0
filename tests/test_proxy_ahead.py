"""Reading ahead: a drive's data port costs little, and the guest sees no difference."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import ata_rig as ata
import pytest
from ata_rig import AtaRig, Cable, pattern
from proxy_helpers import Recorder
from test_ata_suspend import ProxiedRig

from devices.ata.registers import COUNT, DATA, DEVICE, SECTOR, STATUS_COMMAND
from devices.bus import ALL_ONES, BusType
from devices.contract import Device, Region
from proxy.ahead import RUN
from proxy.device import ProxyDevice
from proxy.warden import Warden

SECTORS = 64


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


class Both:
    """A controller in this process and one in its own, used alike."""

    def __init__(self, stack: ExitStack) -> None:
        self.plain, self.proxied = AtaRig(SECTORS, SECTORS), ProxiedRig(stack, SECTORS, SECTORS)
        stack.callback(self.plain.close)
        for rig in (self.plain, self.proxied.inner):
            rig.fill(pattern(SECTORS))
            rig.fill(pattern(SECTORS, seed=1), 1)

    def access(self, region: int, offset: int, size: int) -> int:
        value = self.plain.access(region, offset, size)
        assert self.proxied.access(region, offset, size) == value
        assert self.lines() == self.lines(self.plain)
        return value

    def store(self, region: int, offset: int, size: int, value: int) -> None:
        self.plain.store(region, offset, size, value)
        self.proxied.store(region, offset, size, value)

    def settle(self) -> None:
        self.plain.settle()
        self.proxied.settle()

    def lines(self, rig: Any = None) -> list[bool]:
        if rig is not None:
            return [rig.line(channel) for channel in range(2)]
        self.proxied.device.drain()
        return [self.proxied.host.lines.get(channel, False) for channel in range(2)]

    def snapshot(self) -> Any:
        """Of both, which must be equal; they go on."""
        saved = self.plain.snapshot()
        self.plain.device.wake()
        self.proxied.device.sleep()
        assert self.proxied.device.snapshot() == saved
        self.proxied.device.restore(saved)
        self.proxied.device.wake()
        return saved


@pytest.fixture
def both(stack: ExitStack) -> Both:
    return Both(stack)


@pytest.mark.parametrize("size", [2, 4])
def test_a_sector_costs_a_few_messages(stack: ExitStack, size: int) -> None:
    rig = ProxiedRig(stack, SECTORS)
    rig.inner.fill(pattern(SECTORS))
    cable = Cable(rig)
    before = rig.device.stats()
    for sector in range(8):
        cable.give(ata.READ, sector, 1)
        assert cable.take(size) == pattern(SECTORS)[sector * SECTOR : (sector + 1) * SECTOR]
    after = rig.device.stats()
    accesses = (after.tube_accesses + after.lane_accesses) - (
        before.tube_accesses + before.lane_accesses
    )
    assert accesses < 8 * 25, "there are 256 words in a sector"


def test_a_block_that_is_longer_than_what_is_given_at_once(both: Both) -> None:
    cable = Cable(both)
    assert not cable.ask(ata.SET_MULTIPLE, 0, 16) & 1
    cable.give(ata.READ_MULTIPLE, 3, 40)
    assert cable.take() == pattern(SECTORS)[3 * SECTOR : 43 * SECTOR]
    both.snapshot()


@pytest.mark.parametrize("read", [1, RUN, RUN + 1, 100, 253, 254, 255, 256])
def test_a_snapshot_has_no_trace_of_it(both: Both, read: int) -> None:
    cable = Cable(both)
    cable.give(ata.READ, 5, 2)
    for _ in range(read):
        cable.get(DATA, 2)
    saved = both.snapshot()
    drive = saved["channels"][0]["drives"][0]
    assert drive["position"] == 2 * read % SECTOR
    rest = cable.block(2, SECTOR - 2 * read % SECTOR) if read % 256 else b""
    assert rest + cable.take() == pattern(SECTORS)[5 * SECTOR + 2 * read : 7 * SECTOR]


OTHERS = (
    lambda cable: cable.status(),
    lambda cable: cable.alternate(),
    lambda cable: cable.get(COUNT),
    lambda cable: cable.get(DATA, 1),
    lambda cable: cable.put(DATA, 0x55, 2),
    lambda cable: cable.put(DEVICE, 0xF0),
    lambda cable: cable.put(STATUS_COMMAND, ata.IDENTIFY),
    lambda cable: cable.control(4),
    lambda cable: cable.control(0),
    lambda cable: cable.master(2),
    lambda cable: cable.set_master(2, 6),
)


def test_whatever_comes_between_is_in_order(both: Both) -> None:
    """Runs of reads of all lengths and widths, on both channels, broken by anything else."""
    chance = random.Random(11)
    cables = Cable(both), Cable(both, 1)
    for _ in range(400):
        cable = chance.choice(cables[:1] * 4 + cables)
        action = chance.random()
        if action < 0.25:
            code = chance.choice([ata.READ, ata.READ_MULTIPLE, ata.IDENTIFY, ata.READ_EXT])
            cable.give(code, chance.randrange(SECTORS + 2), chance.randrange(1, 4))
        elif action < 0.75:
            size = chance.choice([2, 2, 2, 4])
            for _ in range(chance.choice([1, 3, RUN, RUN + 1, 30, 127, 128, 256, 300])):
                cable.get(DATA, chance.choice([size] * 30 + [1, 2, 4]))
        elif action < 0.8:
            both.snapshot()
        elif action < 0.85:
            for device in (both.plain.device, both.proxied.device):
                device.write_config(1, 0, bytes((ata.IO_AND_MASTER, 0)))
        else:
            chance.choice(OTHERS)(cable)
    assert both.proxied.device.failed is None
    both.snapshot()


# What a device may answer.


@dataclass
class PortState:
    next: int = 0


class Control:
    """Reads as the next word, which a write sets."""

    def __init__(self, port: Port) -> None:
        self.port = port

    def read(self, offset: int, size: int) -> int:
        return self.port.next

    def write(self, offset: int, size: int, value: int) -> None:
        self.port.next = value


class Port(Device):
    """Words 0, 1, 2, ... at its port."""

    model: ClassVar[str] = "port"
    State = PortState
    state: PortState

    @property
    def next(self) -> int:
        return self.state.next

    @next.setter
    def next(self, value: int) -> None:
        self.state.next = value

    def regions(self) -> tuple[Region, ...]:
        control = Region("control", BusType.PIO, 8, 0x308)
        return Region("data", BusType.PIO, 8, 0x300, ahead=True), control

    def handlers(self) -> tuple[Any, ...]:
        return self, Control(self)

    def read(self, offset: int, size: int) -> int:
        if offset:
            return self.next
        self.next += size // 2
        return self.next - size // 2

    def ahead(self, region: int) -> bytes:
        words = range(self.next, self.next + 100)
        return b"".join(word.to_bytes(2, "little") for word in words)

    def take_ahead(self, region: int, count: int) -> None:
        self.next += count // 2


class Nothing(Port):
    def ahead(self, region: int) -> bytes:
        return b""


class Odd(Port):
    def ahead(self, region: int) -> bytes:
        return super().ahead(region)[:3]


class Much(Port):
    def ahead(self, region: int) -> bytes:
        words = range(self.next, self.next + 5000)
        return b"".join(word.to_bytes(2, "little") for word in words)


class DiesThen(Port):
    def ahead(self, region: int) -> bytes:
        os._exit(3)


class HangsThen(Port):
    def ahead(self, region: int) -> bytes:
        while True:
            pass


class DiesWhenTold(Port):
    def take_ahead(self, region: int, count: int) -> None:
        raise RuntimeError("told of it")


KINDS = (Port, Nothing, Odd, Much, DiesThen, HangsThen, DiesWhenTold)


@pytest.fixture(scope="module")
def warden() -> Iterator[Warden]:
    with Warden([*KINDS]) as made:
        yield made


def words(warden: Warden, kind: type[Port], count: int, deadline: float = 20) -> tuple[Any, ...]:
    """The words that a guest reads, what the device counted, and why it failed."""
    events = Recorder()
    child = warden.spawn("port", "echo", {}, factory=KINDS.index(kind))
    with ProxyDevice(child, events, deadline=deadline) as device:
        handler, _ = device.handlers()
        seen = [handler.read(0, 2) for _ in range(count)]
        counted = handler.read(2, 2)
        return seen, counted, str(device.failed or "")


@pytest.mark.parametrize("kind", [Port, Nothing, Odd, Much])
def test_whatever_is_given_it_is_read_in_order(warden: Warden, kind: type[Port]) -> None:
    assert words(warden, kind, 3000) == (list(range(3000)), 3000, "")


@pytest.mark.parametrize(
    ("kind", "reason", "good"),
    [
        (DiesThen, "exit", RUN),
        (HangsThen, "did not answer within 0.5 s", RUN),
        (DiesWhenTold, "told of it", 104),
    ],
)
def test_one_that_fails_over_it_is_named(
    warden: Warden, kind: type[Port], reason: str, good: int
) -> None:
    seen, counted, failure = words(warden, kind, 120, 0.5)
    assert seen[:good] == list(range(good))
    assert set(seen[good:]) == {ALL_ONES[2]}
    assert counted == ALL_ONES[2]
    assert reason in failure
    assert "TakeAhead" in failure


def test_all_that_is_asked_comes_after_what_was_read(warden: Warden) -> None:
    """Whatever it is: each of these would tell a device that has not heard what was taken."""
    child = warden.spawn("port", "echo", {}, factory=0)
    with ProxyDevice(child, Recorder(), deadline=20) as device:
        data, control = device.handlers()
        position = 0

        def read(count: int) -> None:
            nonlocal position
            for _ in range(count):
                assert data.read(0, 2) == position
                position += 1

        read(20)
        assert control.read(0, 2) == 20
        read(20)
        assert data.read(2, 2) == 40
        read(20)
        control.write(0, 2, 100)
        position = 100
        read(20)
        assert data.read(0, 1) == 120
        assert data.read(0, 4) == 120
        position = 122
        read(20)
        device.sync()
        read(20)
        device.sleep()
        assert device.snapshot() == {"next": 162}
        device.restore({"next": 7})
        device.wake()
        position = 7
        read(20)


def test_one_that_dies_meanwhile_gives_no_more(warden: Warden) -> None:
    events = Recorder()
    child = warden.spawn("port", "echo", {}, factory=0)
    with ProxyDevice(child, events, deadline=20) as device:
        handler, _ = device.handlers()
        assert [handler.read(0, 2) for _ in range(10)] == list(range(10))
        device.fail("found out")
        assert handler.read(0, 2) == ALL_ONES[2]
