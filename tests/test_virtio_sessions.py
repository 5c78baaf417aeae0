"""Every virtio model in this process and in a jailed one: the same results, also with a snapshot
between every two requests and with requests in flight in it; and drivers gone mad."""

from __future__ import annotations

import itertools
import os
import random
import stat
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_virtio_hostile import SIZE, spoil
from virtio_driver import (
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    NEEDS_RESET,
    Driver,
    Request,
)
from virtio_echo import LATER, NOW
from virtio_rigs import Place
from virtio_sessions import SESSIONS, World, disk_request

from devices import registry
from devices.virtio import blk, console
from devices.virtio.transport import VirtioDevice

FORMATS = [
    pytest.param(F_INDIRECT | packed | event, id=f"{name}{'-event' if event else ''}")
    for (name, packed), event in itertools.product(
        (("split", 0), ("packed", F_PACKED)), (0, F_EVENT_IDX)
    )
]
SPLIT, SPLIT_EVENT, PACKED, PACKED_EVENT = FORMATS
EACH_FORMAT = pytest.mark.parametrize("features", FORMATS)
EACH_MODEL = pytest.mark.parametrize("model", SESSIONS)
HERE = Place(None)
chance_only = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def play(place: Place, model: str, features: int, saved: bool = False) -> list[Any]:
    """What the driver saw; with `saved`, another device goes on after every step."""
    world = World(place, model, features)
    seen = []
    for step in SESSIONS[model].play(world):
        seen.append(step)
        if saved:
            world.restore()
    assert not world.driver.status & NEEDS_RESET
    assert world.rig.logs == []
    return seen


@pytest.fixture(scope="module", autouse=True)
def close_here() -> Any:
    yield
    HERE.close()


@EACH_FORMAT
@EACH_MODEL
def test_the_same_in_a_jail(place: Place, model: str, features: int) -> None:
    seen = play(place, model, features)
    assert len(seen) > 4
    assert seen == play(HERE, model, features)
    if not features & F_EVENT_IDX:  # this driver leaves used_event alone
        assert seen == play(HERE, model, F_INDIRECT), "the ring's format means nothing"


# Each snapshot costs a jailed device a process, so there each format comes once.
@pytest.mark.parametrize(
    ("place", "features"),
    [
        pytest.param(where, *each.values, id=f"{where}-{each.id}")
        for where, formats in (
            ("in-process", FORMATS),
            ("jailed", (SPLIT_EVENT, PACKED)),
            ("granted", (SPLIT, PACKED_EVENT)),
        )
        for each in formats
    ],
    indirect=["place"],
)
@EACH_MODEL
def test_a_snapshot_between_every_two_requests(place: Place, model: str, features: int) -> None:
    assert play(place, model, features, saved=True) == play(HERE, model, features)


def test_every_virtio_model_has_a_session() -> None:
    models = [name for name in registry.MODELS if issubclass(registry.load(name), VirtioDevice)]
    assert set(models) < set(SESSIONS)


# Requests in flight.


class Busy:
    """Requests to one device, of which each must be answered once and rightly."""

    def __init__(self, place: Place, model: str, features: int) -> None:
        self.model = model
        self.world = World(place, model, features, finish_work=False)
        self.expected: list[tuple[int, Request, bytes]] = []
        """Queue, request, and what is to be in its room."""
        self.done: list[Request] = []
        self.disk = bytearray(1 << 17)
        self.log = b""
        self.number = 0

    def offer(self, chance: random.Random, kick: bool) -> None:
        """One more request, if there is room for it in the ring."""
        if len(self.expected) - len(self.done) >= 3:  # the ring has 16 places
            return
        self.number += 1
        queue, out, into, answer = self._request(chance)
        request = self.world.driver.queues[queue].send(out, into, kick=kick)
        self.expected.append((queue, request, answer))

    def _request(self, chance: random.Random) -> tuple[int, list[bytes], list[int], bytes]:
        text = b"%06d" % self.number
        if self.model == "virtio-echo":
            return chance.choice([NOW, LATER]), [text[:2], text[2:]], [4, 2], text[::-1]
        if self.model == "console":
            self.log += text
            return console.TX1, [text], [], b""
        sector = self.number % 200
        kind = chance.choice([blk.T_OUT, blk.T_FLUSH, blk.T_OUT, blk.T_WRITE_ZEROES])
        place = slice(sector * 512, sector * 512 + 512)
        if kind == blk.T_OUT:
            self.disk[place] = text.ljust(512, b"\1")
            return 0, disk_request(kind, sector, bytes(self.disk[place])), [1], b"\0"
        if kind == blk.T_WRITE_ZEROES:
            self.disk[place] = bytes(512)
            segment = sector.to_bytes(8, "little") + b"\1\0\0\0\1\0\0\0"
            return 0, disk_request(kind, 0, segment), [1], b"\0"
        return 0, disk_request(kind), [1], b"\0"

    def collect(self) -> None:
        for queue in self.world.driver.queues.values():
            for request in queue.collect():  # one that is unknown there is a KeyError
                assert all(request is not each for each in self.done)
                self.done.append(request)

    def finish(self) -> None:
        """All of them are answered, once, and did what they should, once."""
        for queue in self.world.driver.queues:
            self.world.driver.doorbell(queue)
        self.collect()
        for queue, request, answer in self.expected:
            self.world.finish(queue, request)
            assert request.data(self.world.ram) == answer
        if self.model == "blk":
            assert self.world.content("path") == bytes(self.disk)
        if self.model == "console":
            assert self.world.content("log").rstrip(b"\0") == self.log
        assert self.world.rig.logs == []


@EACH_FORMAT
@pytest.mark.parametrize("model", ["virtio-echo", "blk", "console"])
def test_in_flight_in_a_snapshot(place: Place, model: str, features: int) -> None:
    """One that was taken and not given back, one that waits in the ring, and one of which the
    device has not heard; nobody rings a doorbell afterwards."""
    chance = random.Random(5)
    for _ in range(3):
        busy = Busy(place, model, features)
        for _ in range(2):
            busy.offer(chance, kick=True)
        busy.offer(chance, kick=False)
        busy.world.rig.replace(busy.world.rig.snapshot())
        for queue, request, _ in busy.expected:
            busy.world.finish(queue, request)
        busy.finish()


@EACH_FORMAT
@pytest.mark.parametrize("model", ["virtio-echo", "blk", "console"])
def test_none_is_lost_and_none_is_done_twice(place: Place, model: str, features: int) -> None:
    """Any order of requests, doorbells, snapshots and looking."""

    # Each snapshot costs a jailed device a process.
    @settings(chance_only, max_examples=8 if place.jailed else 40)
    @given(seed=st.integers(0, 1 << 32))
    def check(seed: int) -> None:
        work_by_chance(place, model, features, random.Random(seed))

    check()


def work_by_chance(place: Place, model: str, features: int, chance: random.Random) -> None:
    busy = Busy(place, model, features)
    for _ in range(chance.randrange(4, 30)):
        action = chance.random()
        if action < 0.5:
            busy.offer(chance, kick=action < 0.4)
        elif action < 0.65:
            busy.collect()
        elif action < 0.75:
            busy.world.driver.doorbell(chance.choice(list(busy.world.driver.queues)))
        elif action < 0.85:
            busy.world.rig.settle()
        elif action < 0.95:
            busy.world.rig.replace(busy.world.rig.snapshot())
    busy.finish()
    place.close()


# Chains by chance.

pieces = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
rooms = st.lists(st.integers(1, 40), max_size=6)


@EACH_FORMAT
@chance_only
@given(
    requests=st.lists(
        st.tuples(pieces, rooms, st.booleans(), st.booleans()).filter(lambda r: r[0] or r[1]),
        max_size=30,
    ),
    size=st.sampled_from([16, 64, 128]),
)
def test_any_chain_comes_through(place: Place, features: int, requests: Any, size: int) -> None:
    """Every cut into descriptors, direct and indirect, at every place of the ring."""
    driver = Driver(place.the("virtio-echo"))
    driver.start(F_VERSION_1 | features, size)
    for out, into, indirect, later in requests:
        sent = b"".join(out)
        request = driver.queues[LATER if later else NOW].ask(out, into, indirect=indirect)
        expected = sent[::-1][: sum(into)]
        assert request.length == len(expected)
        assert request.data(driver.ram) == expected.ljust(sum(into), b"\0")
    assert driver.rig.logs == []


# Drivers gone mad.


def rave(chance: random.Random, world: World) -> None:
    """Random rings, registers and doorbells, between bits of a real driver's work."""
    driver, rig = world.driver, world.rig
    features = F_VERSION_1 | F_RING_RESET | chance.choice([0, F_PACKED, F_EVENT_IDX, F_INDIRECT])
    size = driver.structures[1][2]
    for _ in range(80):
        action = chance.random()
        if action < 0.1:
            driver.start(features | driver.offered() & chance.choice([0, 0xFF_FFFD]), SIZE)
        elif action < 0.3 and driver.queues and driver.status & DRIVER_OK:
            queue = chance.choice(list(driver.queues.values()))
            spoil(chance, driver, queue)
            driver.doorbell(queue.index)
        elif action < 0.5:
            width = chance.choice([1, 2, 4, 8])
            offset = chance.randrange(size + 8) // width * width
            value = chance.choice([0, 1, 2, 0xF, 0xFFFF, 0x30_0000, chance.randrange(1 << 64)])
            driver.set(offset, width, value & ((1 << 8 * width) - 1))
        elif action < 0.6:
            rig.write(
                0, 0x2000 + chance.randrange(64), 1 << chance.randrange(4), chance.getrandbits(8)
            )
        elif action < 0.7:
            rig.write(0, 0x3000 + 4 * chance.randrange(8), 2, chance.randrange(1 << 16))
        elif action < 0.8:
            rig.write_config(chance.choice([1, *range(16, 48)]), chance.randrange(1 << 32))
        else:
            rig.read(
                chance.choice([0, 0, 1]), chance.randrange(0x1000 - 8), chance.choice([1, 2, 4, 8])
            )
        if chance.random() < 0.2:
            rig.settle()


@EACH_MODEL
@chance_only
@given(seed=st.integers(0, 1 << 32))
def test_a_driver_gone_mad(place: Place, model: str, seed: int) -> None:
    """The device neither dies nor hangs nor breaks the protocol, and works after a reset."""
    chance = random.Random(seed)
    world = place.kept(model, lambda: World(place, model, F_INDIRECT))
    rave(chance, world)
    driver, rig = world.driver, world.rig
    # What a driver does that finds a function in any state.
    rig.write_config(1, 6, 2)
    rig.write_config(driver.msix_capability // 4, 0, 2, 2)
    queue, out, into = SESSIONS[model].alive
    for packed in (0, F_PACKED):
        driver.start(F_VERSION_1 | packed, SIZE)
        for _ in range(SIZE + 1):
            assert driver.queues[queue].ask(out, into).length == sum(into)
        assert not driver.status & NEEDS_RESET
    assert not rig.failures
    for fd in world.files.values():
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.truncate(fd, 1 << 17)  # a log that has grown
    if model == "net":
        world.cable.setblocking(False)
        with suppress(BlockingIOError):
            while world.cable.recv(1 << 16):
                pass
