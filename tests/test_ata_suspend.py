"""The ATA controller through snapshots, in a process of its own, and under hostile guests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import ata_rig as ata
import pytest
from ata_rig import AtaRig, Cable, pattern
from device_contract import Upcalls
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.ata.registers import (
    BSY,
    COUNT,
    DATA,
    DEVICE,
    DRQ,
    ERR,
    READY,
    SECTOR,
    SRST,
    STATUS_COMMAND,
)
from devices.errors import DeviceError
from proxy.device import ProxyDevice
from proxy.warden import Warden

SECTORS = 64


class Moving(AtaRig):
    """A controller that is saved and restored into a new one before each access."""

    def access(self, region: int, offset: int, size: int) -> int:
        self.replace(self.snapshot())
        return super().access(region, offset, size)

    def store(self, region: int, offset: int, size: int, value: int) -> None:
        self.replace(self.snapshot())
        super().store(region, offset, size, value)


def use(cable: Cable) -> list[Any]:
    """Every kind of transfer; what the guest saw of it."""
    seen: list[Any] = []
    cable.ask(ata.SET_MULTIPLE, 0, 2)
    for code, sector, count in (
        (ata.READ, 3, 1),
        (ata.READ_MULTIPLE, 7, 3),
        (ata.WRITE, 9, 1),
        (ata.WRITE_MULTIPLE_EXT, 20, 3),
        (ata.READ, SECTORS - 1, 2),
        (ata.IDENTIFY, 0, 0),
        (ata.FLUSH, 0, 0),
    ):
        seen.append(cable.ask(code, sector, count))
        for index in range(count):
            if cable.alternate() & DRQ and "WRITE" in ata.COMMANDS[code].name:
                cable.feed(pattern(1, seed=index), size=4)
        seen += [cable.take(4), cable.error(), cable.registers(), cable.status()]
    return seen


def test_a_snapshot_between_any_two_accesses() -> None:
    """Of a transfer, too: nothing is lost, and nothing is done twice."""
    plain, moving = AtaRig(SECTORS), Moving(SECTORS)
    for rig in (plain, moving):
        rig.fill(pattern(SECTORS))
    assert use(Cable(moving)) == use(Cable(plain))
    assert moving.image() == plain.image()
    assert moving.line() == plain.line()
    for rig in (plain, moving):
        rig.close()


def test_the_line_after_a_restore() -> None:
    rig = AtaRig(SECTORS, 0, SECTORS)
    Cable(rig, 1).give(ata.SEEK)
    saved = rig.snapshot()
    rig.replace(saved)
    assert (rig.line(0), rig.line(1)) == (False, True)
    Cable(rig, 1).status()
    assert not rig.line(1)
    rig.close()


def spoil(path: str, value: Any) -> Callable[[Any], None]:
    def spoiled(state: Any) -> None:
        *way, last = path.split(".")
        for step in way:
            state = state[int(step) if step.isdigit() else step]
        state[last] = value

    return spoiled


DRIVE = "channels.0.drives.0"


@pytest.mark.parametrize(
    "change",
    [
        spoil(f"{DRIVE}.capacity", SECTORS + 1),
        spoil(f"{DRIVE}.heads", 0),
        spoil(f"{DRIVE}.heads", 17),
        spoil(f"{DRIVE}.sectors", 0),
        spoil(f"{DRIVE}.multiple", 3),
        spoil(f"{DRIVE}.phase", "out"),
        spoil(f"{DRIVE}.phase", "dma-in"),
        spoil(f"{DRIVE}.phase", "flush"),
        spoil(f"{DRIVE}.phase", "idle"),
        spoil(f"{DRIVE}.command", 0x99),
        spoil(f"{DRIVE}.command", ata.READ_MULTIPLE),
        spoil(f"{DRIVE}.position", SECTOR),
        spoil(f"{DRIVE}.position", -1),
        spoil(f"{DRIVE}.buffer", ""),
        spoil(f"{DRIVE}.buffer", "AAAA"),
        spoil(f"{DRIVE}.left", SECTORS),
        spoil(f"{DRIVE}.sector", -1),
        spoil(f"{DRIVE}.status", READY | BSY),
        spoil("channels.0.drives.1.count", 1),
        spoil("channels.0.control", 1),
        spoil("channels.0.control", SRST),
        spoil("channels.0.selected", 2),
        spoil("channels", []),
        spoil("channels.0.drives", []),
        spoil("bus_masters", []),
        spoil("bus_masters.0.command", 2),
        spoil("bus_masters.0.status", 8),
        spoil("bus_masters.0.table", 2),
        spoil("bus_masters.0.left", 65537),
        spoil("bus_masters.0.address", -1),
    ],
)
def test_states_that_cannot_be(change: Callable[[Any], None]) -> None:
    rig = AtaRig(SECTORS)
    Cable(rig).give(ata.READ, 0, 2)
    saved = rig.snapshot()
    rig.device.wake()
    change(saved)
    rig.device.sleep()
    with pytest.raises(DeviceError, match="cannot restore"):
        rig.device.restore(saved)
    rig.device.wake()
    assert Cable(rig).status() == READY | DRQ, "nothing was changed"
    rig.close()


# The same in a process of its own.


class ProxiedRig:
    """As `AtaRig`, with the controller in a jailed process; without DMA."""

    def __init__(self, stack: ExitStack, *sectors: int) -> None:
        self.inner = AtaRig(*sectors)  # its images are used, not its device
        stack.callback(self.inner.close)
        warden = Warden()
        stack.callback(warden.close)
        upcalls = Upcalls()
        self.host = upcalls.host
        options = dict.fromkeys(self.inner.fds, "image")
        child = warden.spawn("ata", "ata", options, fds=self.inner.fds)
        self.device = stack.enter_context(ProxyDevice(child, upcalls))
        self.device.write_config(1, 0, bytes((ata.IO_AND_MASTER, 0)))

    def access(self, region: int, offset: int, size: int) -> int:
        return self.device.handlers()[region].read(offset, size)

    def store(self, region: int, offset: int, size: int, value: int) -> None:
        self.device.handlers()[region].write(offset, size, value)

    def settle(self) -> None:
        """A flush is done once no command waits: the machine's barrier."""
        self.device.sleep()
        self.device.wake()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_in_a_process_of_its_own_it_is_the_same(stack: ExitStack) -> None:
    plain, proxied = AtaRig(SECTORS), ProxiedRig(stack, SECTORS)
    for rig in (plain, proxied.inner):
        rig.fill(pattern(SECTORS))
    assert use(Cable(proxied)) == use(Cable(plain))
    assert proxied.inner.image() == plain.image()
    assert proxied.device.failed is None
    plain.close()


# Guests that know no rules.

ports = st.one_of(
    st.tuples(st.just("get"), st.integers(0, 7), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("put"), st.integers(0, 6), st.integers(0, 255)),
    st.tuples(st.just("data"), st.integers(1, 300), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("feed"), st.integers(1, 300), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("command"), st.sampled_from(sorted(ata.COMMANDS)), st.integers(0, 2)),
    st.tuples(st.just("command"), st.integers(0, 255), st.integers(0, 2)),
    st.tuples(st.just("control"), st.integers(0, 255), st.just(0)),
    st.tuples(st.just("master"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("config"), st.sampled_from([1, 16]), st.integers(0, 0xFFFF)),
    st.tuples(st.just("move"), st.just(0), st.just(0)),
)


def step(rig: AtaRig, cable: Cable, what: str, one: int, two: int) -> None:
    match what:
        case "get":
            value = cable.get(one, min(two, 8 - one))
            assert 0 <= value < 1 << 32
        case "put":
            cable.put(one, two)
        case "data":
            for _ in range(one):
                cable.get(DATA, two)
        case "feed":
            for number in range(one):
                cable.put(DATA, number & 0xFF, two)
        case "command":
            cable.put(COUNT, two)
            cable.put(STATUS_COMMAND, one)
        case "control":
            cable.control(one)
        case "master":
            cable.set_master(one, two)
        case "config":
            rig.write_config(one, two | (1 if one == 1 else 0), 2)
        case "move":
            rig.replace(rig.snapshot())


@given(st.lists(ports, max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_whatever_a_guest_does_it_can_begin_anew(
    program: list[tuple[str, int, int]], second: bool
) -> None:
    rig = AtaRig(SECTORS, SECTORS if second else 0, ram=1 << 16)
    cable = Cable(rig)
    for each in program:
        step(rig, cable, *each)
    rig.settle()
    assert len(rig.image()) == SECTORS * SECTOR
    for number in range(2):
        rig.write_config(16 + number, 0x8000_8000 if number == 0 else 0)
    rig.write_config(1, ata.IO_AND_MASTER, 2)
    cable.set_master(0, 0)
    cable.control(SRST)
    cable.control(0)
    cable.put(DEVICE, 0)
    rig.fill(pattern(SECTORS))
    cable.give(ata.READ, 7, 1)
    assert cable.take() == pattern(SECTORS)[7 * SECTOR : 8 * SECTOR]
    assert not cable.status() & (BSY | ERR)
    rig.close()


FLUSHING = (ata.FLUSH, ata.FLUSH_EXT, ata.STANDBY, 0xE2, ata.SLEEP, ata.SET_FEATURES)
"""How long they take is not the same in a process."""


def test_a_long_random_guest_is_the_same_in_a_process(stack: ExitStack) -> None:
    chance = random.Random(5)
    plain, proxied = AtaRig(SECTORS, SECTORS), ProxiedRig(stack, SECTORS, SECTORS)
    codes = sorted(set(ata.COMMANDS) - set(FLUSHING))
    for _ in range(5000):
        region, offset = chance.randint(1, 4), chance.randrange(8)
        value = chance.choice([0, 1, chance.randrange(256)])
        if region % 2 == 0:
            offset, value = 0, chance.choice([0, 0, value])
        elif offset == STATUS_COMMAND:
            value = chance.choice(codes)
        size = chance.choice([2, 4]) if offset == DATA and region % 2 else 1
        if chance.random() < 0.5:
            assert plain.access(region, offset, size) == proxied.access(region, offset, size)
        else:
            plain.store(region, offset, size, value)
            proxied.store(region, offset, size, value)
    assert proxied.device.failed is None
    for number in range(2):
        assert plain.image(number) == proxied.inner.image(number)
    plain.close()
