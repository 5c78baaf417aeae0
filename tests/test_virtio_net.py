"""The network card (5.1): frames, offloads, merged buffers, and two cards on one cable."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_driver import F_PACKED, F_VERSION_1, NEEDS_RESET, Driver, LocalRig

from devices.errors import UserError
from devices.registry import parse_options
from devices.virtio.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_HOST_TSO4,
    F_MRG_RXBUF,
    F_STATUS,
    GSO_TCPV4,
    HEADER,
    MOST_FRAMES,
    NEEDS_CSUM,
    RX,
    TX,
    Net,
    complete,
)

PLAIN = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
FRAME = bytes(range(64))


class Card:
    """A driver of a card whose cable ends at `cable`."""

    def __init__(self, features: int = 0, format: str = "plain", end: Any = None) -> None:
        if end is None:
            end, self.cable = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.cable.setblocking(False)
        end.setblocking(False)
        self.end = end
        self.rig = LocalRig(Net, {"format": format}, {"link": end.fileno()})
        self.driver = Driver(self.rig)
        self.driver.start(F_VERSION_1 | features)

    def poll(self) -> None:
        """What an event loop does."""
        for fd in self.rig.device.watched():
            self.rig.device.ready(fd)
        self.rig.settle()

    def send(self, frame: bytes, header: bytes = PLAIN) -> None:
        self.driver.queues[TX].ask([header, frame])

    def offer(self, *rooms: int) -> list[Any]:
        return [self.driver.queues[RX].send([], [room]) for room in rooms]

    def received(self) -> list[tuple[tuple[int, ...], bytes]]:
        """Header and frame of each, of buffers that hold a frame each."""
        self.poll()
        done = [request.written(self.rig.ram) for request in self.driver.queues[RX].collect()]
        return [(HEADER.unpack_from(data), data[HEADER.size :]) for data in done if data]


@pytest.fixture(params=[0, F_PACKED], ids=["split", "packed"])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    made = Card(request.param)
    yield made
    made.cable.close()
    made.end.close()


def test_frames_both_ways(card: Card) -> None:
    card.send(FRAME)
    assert card.cable.recv(2000) == FRAME
    card.offer(2000, 2000)
    card.cable.send(b"one")
    card.cable.send(b"two")
    assert [(header[6], frame) for header, frame in card.received()] == [(1, b"one"), (1, b"two")]


def test_frames_wait_for_buffers_and_survive_a_snapshot(card: Card) -> None:
    frames = [b"%d" % n for n in range(MOST_FRAMES + 6)]
    for frame in frames:
        card.cable.send(frame)
    card.poll()
    assert card.rig.device.watched() == ()  # full: the rest waits on the cable
    card.rig.replace(card.rig.snapshot())
    card.offer(*[100] * 100)
    card.rig.settle()
    seen = [frame for _, frame in card.received()]
    card.poll()
    seen += [frame for _, frame in card.received()]
    assert seen == frames


def test_configuration(card: Card) -> None:
    mac = bytes(card.driver.config(n, 1) for n in range(6))
    assert mac == bytes.fromhex("525400123456")


@pytest.mark.parametrize("mac", ["", "52:54:00", "x", "01:00:00:00:00:00", "525400123456"])
def test_bad_addresses(mac: str) -> None:
    with pytest.raises(UserError, match="mac"):
        parse_options(Net, {"mac": mac})


def test_the_link_goes_down_with_the_peer(card: Card) -> None:
    card.driver.start(F_VERSION_1 | F_STATUS)
    assert card.driver.config(6, 2) == 1
    card.cable.close()
    card.poll()
    assert card.driver.isr() & 2
    assert card.driver.config(6, 2) == 0
    assert card.rig.device.watched() == ()
    card.send(FRAME)
    assert card.rig.logs == []
    card.rig.device.set_link(True)
    assert card.driver.config(6, 2) == 1


def test_a_full_cable_drops(card: Card) -> None:
    for _ in range(1000):
        card.send(bytes(1500))
    assert card.rig.device.dropped > 0
    assert card.cable.recv(2000) == bytes(1500)


@pytest.mark.parametrize("out", [[b"x" * 11], [b""[:0] or b"x"]])
def test_a_frame_without_header(card: Card, out: list[bytes]) -> None:
    card.driver.queues[TX].send(out)
    assert card.driver.status & NEEDS_RESET


# Checksums.


@given(data=st.binary(min_size=20, max_size=2000), start=st.integers(0, 17), odd=st.booleans())
def test_checksum(data: bytes, start: int, odd: bool) -> None:
    """Whoever sums up what was covered finds all ones (RFC 1071)."""
    data = data[: len(data) - (len(data) & 1 ^ odd)]
    done = complete(data, start, 2)
    covered = done[start:] + bytes((len(done) - start) & 1)
    total = sum(struct.unpack(f">{len(covered) // 2}H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    # The place held a partial sum, which counts as well: take it out again.
    held = int.from_bytes(data[start + 2 : start + 4], "big")
    expected = (total + 0xFFFF - held) % 0xFFFF
    assert (expected - (0xFFFF - held)) % 0xFFFF == total % 0xFFFF
    assert done[: start + 2] == data[: start + 2]
    assert done[start + 4 :] == data[start + 4 :]


def udp(payload: bytes) -> tuple[bytes, bytes]:
    """A frame with the pseudo-header's sum in place of the checksum; and the checksum."""
    source, target = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    length = 8 + len(payload)
    pseudo = source + target + struct.pack(">BBH", 0, 17, length)
    partial = fold(sum(struct.unpack(">6H", pseudo)))
    start = bytes(34) + struct.pack(">HHHH", 1, 2, length, partial) + payload
    whole = pseudo + struct.pack(">HHHH", 1, 2, length, 0) + payload + bytes(length & 1)
    value = 0xFFFF - fold(sum(struct.unpack(f">{len(whole) // 2}H", whole)))
    return start, struct.pack(">H", value or 0xFFFF)


def fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


CSUM = HEADER.pack(NEEDS_CSUM, 0, 0, 0, 34, 6, 0)


def test_checksums_are_completed_for_a_plain_link(card: Card) -> None:
    card.driver.start(F_VERSION_1 | F_CSUM)
    for length in (0, 1, 7, 1000):
        frame, checksum = udp(random.Random(length).randbytes(length))
        card.send(frame, CSUM)
        expected = frame[:40] + checksum + frame[42:]
        assert card.cable.recv(2000) == expected
    card.send(b"short", CSUM)
    assert card.cable.recv(2000) == b"short"


@pytest.mark.parametrize("takes", [0, F_GUEST_CSUM])
def test_checksums_for_the_driver(takes: int) -> None:
    card = Card(takes, "virtio")
    card.offer(2000)
    frame, checksum = udp(b"payload")
    card.cable.send(CSUM + frame)
    ((header, seen),) = card.received()
    if takes:
        assert (header[0], header[4:6], seen) == (NEEDS_CSUM, (34, 6), frame)
    else:
        assert (header[0], seen) == (0, frame[:40] + checksum + frame[42:])


# Large frames.


def test_merged_buffers() -> None:
    """5.1.6.4: as many buffers as it takes, and their number in the first."""
    for packed in (0, F_PACKED):
        card = Card(packed | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4, "virtio")
        frame = random.Random(1).randbytes(20000)
        header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0)
        card.offer(*[4096] * 3)
        card.cable.send(header + frame)
        assert card.received() == []  # not enough yet: none of them is used
        card.rig.replace(card.rig.snapshot())
        card.offer(*[4096] * 3)
        card.poll()
        done = [r.written(card.rig.ram) for r in card.driver.queues[RX].collect()]
        assert b"".join(done)[HEADER.size :] == frame
        assert HEADER.unpack_from(done[0])[6] == len(done) == 5
        assert HEADER.unpack_from(done[0])[:6] == HEADER.unpack(header)[:6]


def test_without_merging_a_frame_fits_or_is_dropped() -> None:
    card = Card(F_GUEST_CSUM)
    small, large = card.offer(100, 2000)
    card.cable.send(bytes(500))
    card.cable.send(b"fits")
    card.poll()
    card.driver.queues[RX].collect()
    assert small.length == 0
    assert large.written(card.rig.ram)[HEADER.size :] == b"fits"
    assert card.rig.device.dropped == 1


@pytest.mark.parametrize("gso", [GSO_TCPV4, GSO_TCPV4 | 0x80, 3, 77])
def test_segments_that_the_driver_cannot_take_are_dropped(gso: int) -> None:
    card = Card(F_GUEST_CSUM, "virtio")
    card.offer(2000)
    card.cable.send(HEADER.pack(NEEDS_CSUM, gso, 54, 100, 34, 16, 0) + bytes(300))
    card.cable.send(PLAIN + b"next")
    assert [frame for _, frame in card.received()] == [b"next"]


def test_features_that_need_others() -> None:
    driver = Driver(LocalRig(Net, {"format": "virtio"}))
    assert not driver.negotiate(F_VERSION_1 | F_GUEST_TSO4)
    assert not driver.negotiate(F_VERSION_1 | F_HOST_TSO4)
    assert driver.negotiate(F_VERSION_1 | F_HOST_TSO4 | F_CSUM)


@given(st.lists(st.binary(max_size=80), max_size=20))
def test_any_message_on_the_link(messages: list[bytes]) -> None:
    """The peer is another machine: believed in nothing."""
    card = Card(F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4, "virtio")
    card.offer(*[64] * 60)
    for message in filter(None, messages):
        card.cable.send(message)
    card.poll()
    for request in card.driver.queues[RX].collect():
        flags, *_, start, offset, _ = HEADER.unpack_from(request.data(card.rig.ram))
        assert flags in (0, NEEDS_CSUM)
        assert not flags or start + offset + 2 <= 80
    assert not card.driver.status & NEEDS_RESET
    card.cable.close()
    card.end.close()


def test_two_cards_on_one_cable() -> None:
    left_end, right_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    features = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_GUEST_TSO4 | F_MRG_RXBUF
    left, right = (Card(features, "virtio", end) for end in (left_end, right_end))
    right.offer(*[4096] * 20)
    header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0)
    frame = os.urandom(30000)
    left.driver.queues[TX].ask([header, frame])
    right.poll()
    done = [r.written(right.rig.ram) for r in right.driver.queues[RX].collect()]
    assert b"".join(done)[HEADER.size :] == frame
    for end in (left_end, right_end):
        end.close()
