"""The network card (5.1): frames, offloads, merged buffers, and two cards on one cable."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import F_PACKED, F_VERSION_1, NEEDS_RESET, Driver, LocalRig

from devices.errors import DeviceError, UserError
from devices.registry import parse_options
from devices.virtio.cable import HEADER, LONGEST, SHORTEST
from devices.virtio.link import Forward, parse_forwards
from devices.virtio.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_HOST_TSO4,
    F_MRG_RXBUF,
    F_MTU,
    F_STATUS,
    GSO_TCPV4,
    MOST_BYTES,
    NEEDS_CSUM,
    RX,
    TX,
    USER_MTU,
    Net,
)
from devices.virtio.segment import SMALLEST, checksum, complete, segments

PLAIN = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
FRAME = bytes(range(64))
NEXT = b"the next frame"


CARDS: list[Card] = []


@pytest.fixture(autouse=True)
def close_cards() -> Iterator[None]:
    yield
    for made in CARDS:
        made.close()
    CARDS.clear()


class Card:
    """A driver of a card whose cable ends at `cable`.

    Args:
        link: "user", a stream of frames, or "pair:x", a jack in which one cable is.
        end: the card's end of a cable of packets that is there already.
    """

    def __init__(self, features: int = 0, link: str = "user", end: Any = None) -> None:
        self.stream = link == "user"
        self.jack: Any = None
        kind = socket.SOCK_STREAM if self.stream else socket.SOCK_SEQPACKET
        if end is None:
            end, self.cable = socket.socketpair(socket.AF_UNIX, kind)
            self.cable.setblocking(False)
        CARDS.append(self)
        end.setblocking(False)
        fd = end.fileno()
        if not self.stream:
            self.jack, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            inside.setblocking(False)
            self.inside, fd = inside, inside.fileno()
        self.end = end
        self.rig = LocalRig(Net, {"link": link}, {"link": fd})
        self.driver = Driver(self.rig)
        if not self.stream:
            self.plug(end)
        self.driver.start(F_VERSION_1 | features)
        self.driver.isr()
        self._heard = b""

    def plug(self, end: Any) -> None:
        """Put a cable in; this end is the card's from now on."""
        socket.send_fds(self.jack, [b"c"], [end.fileno()])
        end.close()
        self.poll()

    def close(self) -> None:
        self.rig.device.close()
        self.end.close()
        if self.jack is not None:
            self.jack.close()
            self.inside.close()

    def poll(self) -> None:
        """What an event loop does, until there is nothing more to read."""
        device = self.rig.device
        while True:
            waiter = select.poll()
            for fd in (*device.watched(), *device.full()):
                reads = select.POLLIN if fd in device.watched() else 0
                writes = select.POLLOUT if fd in device.full() else 0
                waiter.register(fd, reads | writes)
            ready = waiter.poll(0)
            for fd, _ in ready:
                device.ready(fd)
            self.rig.settle()
            if not ready:
                return

    def send(self, frame: bytes, header: bytes = PLAIN) -> None:
        """From the driver."""
        self.driver.queues[TX].ask([header, frame])

    def put(self, *frames: bytes) -> None:
        """Into the far end of the cable; with a jack each has its header."""
        for frame in frames:
            if self.stream:
                self.cable.sendall(struct.pack(">I", len(frame)) + frame)
            else:
                self.cable.send(frame)

    def get(self) -> bytes:
        """The next frame from the far end of the cable."""
        if not self.stream:
            return bytes(self.cable.recv(1 << 17))
        while len(self._heard) < 4 or len(self._heard) < 4 + self._size():
            self._heard += self.cable.recv(1 << 17)
        frame, self._heard = self._heard[4 : 4 + self._size()], self._heard[4 + self._size() :]
        return frame

    def _size(self) -> int:
        return int.from_bytes(self._heard[:4], "big")

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


@pytest.fixture(params=["user", "pair:x"])
def either(request: pytest.FixtureRequest) -> Iterator[Card]:
    made = Card(F_STATUS, request.param)
    yield made
    made.cable.close()


def test_frames_both_ways(card: Card) -> None:
    card.send(FRAME)
    assert card.get() == FRAME
    card.offer(2000, 2000)
    card.put(FRAME, NEXT)
    assert [(header[6], frame) for header, frame in card.received()] == [(1, FRAME), (1, NEXT)]


def test_frames_wait_for_buffers_and_survive_a_snapshot(card: Card) -> None:
    """Up to a limit; the rest stays on the cable and comes later, in order."""
    frames = [b"%06d" % n + bytes(4090) for n in range(2 * MOST_BYTES // 4096)]
    sent = 0
    while sent < len(frames):
        try:
            card.put(frames[sent])
        except BlockingIOError:
            break
        sent += 1
        card.poll()
    assert card.rig.device.watched() == []  # full
    card.rig.replace(card.rig.snapshot())
    seen: list[bytes] = []
    for _ in range(8):
        card.offer(*[5000] * 32)
        seen += [frame for _, frame in card.received()]
    # The frame that was half read goes with the stream, which a new device does not have.
    kept = MOST_BYTES // 4096
    assert seen[:kept] == frames[:kept]


def test_a_stream_in_pieces(card: Card) -> None:
    """However the bytes come: a frame is whole or it is not there yet."""
    frames = [random.Random(n).randbytes(SHORTEST + 331 * n) for n in range(8)]
    stream = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    card.offer(*[4000] * len(frames))
    seen: list[bytes] = []
    for place in range(0, len(stream), 97):
        card.cable.sendall(stream[place : place + 97])
        seen += [frame for _, frame in card.received()]
    assert seen == frames


@pytest.mark.parametrize("size", [0, SHORTEST - 1, LONGEST + 1, 0xFFFF_FFFF])
def test_a_stream_that_has_lost_its_mind(size: int) -> None:
    card = Card(F_STATUS)
    card.offer(2000)
    card.put(FRAME)
    card.cable.sendall(struct.pack(">I", size) + bytes(100))
    card.poll()
    assert card.rig.logs == [f"the link is down: the other end sent a frame of {size} bytes"]
    assert card.driver.config(6, 2) == 0
    assert card.rig.device.watched() == []
    card.send(FRAME)  # goes nowhere, and hurts nobody
    assert not card.driver.status & NEEDS_RESET
    card.close()


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_any_bytes_on_a_stream(data: bytes) -> None:
    card = Card()
    card.offer(*[700] * 30)
    card.cable.sendall(data)
    card.cable.close()
    card.poll()
    assert not card.driver.status & NEEDS_RESET
    assert not card.rig.device.state.link_up
    card.close()


def test_a_full_stream_makes_the_driver_wait(card: Card) -> None:
    """No frame is lost: those that do not fit stay in the ring."""
    queue = card.driver.queues[TX]
    frames = [b"%06d" % n + bytes(59994) for n in range(16)]
    requests = [queue.send([PLAIN, frame]) for frame in frames]
    card.poll()
    queue.collect()
    assert card.rig.device.full() != ()
    assert any(request.length is None for request in requests)
    seen = []
    for _ in frames:
        seen.append(card.get())
        card.poll()
    queue.collect()
    assert seen == frames
    assert all(request.length is not None for request in requests)
    assert card.rig.device.full() == ()
    assert card.rig.device.dropped == 0


def test_a_stream_that_ends_amid_a_frame(card: Card) -> None:
    for _ in range(16):
        card.driver.queues[TX].send([PLAIN, bytes(60000)])
    card.cable.close()
    card.poll()
    assert card.rig.device.full() == ()
    card.driver.queues[TX].collect()
    assert card.driver.queues[TX].in_flight == {}  # as on a wire that leads nowhere
    assert any("the link is down" in line for line in card.rig.logs)


def test_configuration(card: Card) -> None:
    mac = bytes(card.driver.config(n, 1) for n in range(6))
    assert mac == bytes.fromhex("525400123456")
    assert card.driver.offered() & F_MTU
    assert card.driver.config(10, 2) == USER_MTU


def test_only_a_stack_has_large_frames_and_only_a_wire_segments() -> None:
    pair = Driver(LocalRig(Net, {"link": "tap:x"}))
    assert pair.offered() & F_HOST_TSO4
    assert not pair.offered() & F_MTU
    none = Driver(LocalRig(Net))
    assert not none.offered() & (F_HOST_TSO4 | F_MTU)
    assert none.config(6, 2) == 0


@pytest.mark.parametrize("mac", ["", "52:54:00", "x", "01:00:00:00:00:00", "525400123456"])
def test_bad_addresses(mac: str) -> None:
    with pytest.raises(UserError, match="mac"):
        parse_options(Net, {"mac": mac})


@pytest.mark.parametrize(
    "link", ["users", "user:x", "pair", "pair:", "pair:a/b", "tap:", "tap:0123456789abcdef", "x:y"]
)
def test_bad_links(link: str) -> None:
    with pytest.raises(UserError, match="link"):
        parse_options(Net, {"link": link})


def test_forwards() -> None:
    assert parse_forwards("tcp:8080:80+udp:0.0.0.0:53:5353+tcp:[::1]:1:2") == [
        Forward("tcp", "127.0.0.1", 8080, 80),
        Forward("udp", "0.0.0.0", 53, 5353),
        Forward("tcp", "::1", 1, 2),
    ]


@pytest.mark.parametrize(
    "forward",
    ["80", "tcp:80", "tcp:0:80", "tcp:80:65536", "sctp:1:2", "tcp:host:1:2", "tcp:1:2+", "-t:1:2"],
)
def test_bad_forwards(forward: str) -> None:
    with pytest.raises(UserError, match="forward"):
        parse_options(Net, {"link": "user", "forward": forward})


def test_forwards_are_for_the_user_mode_stack() -> None:
    with pytest.raises(UserError, match="link=user"):
        parse_options(Net, {"link": "pair:x", "forward": "tcp:1:2"})


# The link.


def test_the_link_goes_down_with_the_peer(either: Card) -> None:
    assert either.driver.config(6, 2) == 1
    either.cable.close()
    either.poll()
    assert either.driver.isr() & 2
    assert either.driver.config(6, 2) == 0
    assert either.rig.logs == ["the link is down: the other end is gone"]
    either.send(FRAME)


def test_a_new_cable_brings_the_link_up() -> None:
    card = Card(F_STATUS, "pair:x")
    descriptors = len(os.listdir("/proc/self/fd"))
    for n in range(3):
        card.cable.close()
        card.poll()
        assert card.driver.config(6, 2) == 0
        card.driver.isr()
        end, card.cable = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.setblocking(False)
        card.plug(end)
        assert card.driver.isr() & 2
        assert card.driver.config(6, 2) == 1
        card.send(b"%d" % n + FRAME)
        assert card.cable.recv(2000) == PLAIN + b"%d" % n + FRAME
    end, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    card.plug(end)  # in the place of the one that is there
    assert card.cable.recv(1) == b""  # which is let go of
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    for each in (far, card.cable):
        each.close()
    card.close()


def test_a_jack_that_is_gone_is_left_alone() -> None:
    card = Card(F_STATUS, "pair:x")
    card.jack.close()
    card.poll()
    assert len(card.rig.device.watched()) == 1  # the cable
    card.cable.close()
    card.poll()
    assert card.rig.device.watched() == []
    card.close()


def test_the_link_after_a_restore_is_the_one_that_is_there_now() -> None:
    card = Card(F_STATUS, "pair:x")
    saved = card.rig.snapshot()
    assert saved["link_up"]
    other = Card(F_STATUS, "pair:x")
    other.cable.close()
    other.poll()
    other.rig.device.sleep()
    other.rig.device.restore(saved)
    other.rig.device.wake()
    assert other.driver.config(6, 2) == 0
    assert other.driver.isr() & 2  # the driver is told
    card.cable.close()
    for each in (card, other):
        each.close()


def test_a_full_cable_drops() -> None:
    card = Card(0, "pair:x")
    for _ in range(1000):
        card.send(bytes(1500))
    assert card.rig.device.dropped > 0
    assert card.get() == PLAIN + bytes(1500)
    card.close()


@pytest.mark.parametrize("out", [[b"x" * 11], [b"x"]])
def test_a_frame_without_header(card: Card, out: list[bytes]) -> None:
    card.driver.queues[TX].send(out)
    assert card.driver.status & NEEDS_RESET


@pytest.mark.parametrize("size", [1, SHORTEST - 1, LONGEST + 1, 200_000])
def test_frames_of_odd_sizes(card: Card, size: int) -> None:
    """Dropped: what a stack cannot take for a frame would cost it its stream."""
    card.send(bytes(size))
    card.send(FRAME)
    assert card.get() == FRAME
    assert card.rig.device.dropped == 1


@settings(deadline=None)
@given(header=st.binary(min_size=HEADER.size, max_size=HEADER.size), size=st.integers(14, 200))
def test_any_header_of_a_driver(header: bytes, size: int) -> None:
    for link in ("user", "pair:x"):
        card = Card(F_CSUM, link)
        card.send(bytes(size), header)
        card.send(FRAME)
        while card.get()[-len(FRAME) :] != FRAME:
            pass
        assert not card.driver.status & NEEDS_RESET
        card.cable.close()
        card.close()


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
        assert card.get() == expected
    card.send(NEXT, CSUM)
    assert card.get() == NEXT


@pytest.mark.parametrize("takes", [0, F_GUEST_CSUM])
def test_checksums_for_the_driver(takes: int) -> None:
    card = Card(takes, "pair:x")
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
        card = Card(packed | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4, "pair:x")
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
    card.put(bytes(500), NEXT)
    card.poll()
    card.driver.queues[RX].collect()
    assert small.length == 0
    assert large.written(card.rig.ram)[HEADER.size :] == NEXT
    assert card.rig.device.dropped == 1


@pytest.mark.parametrize("gso", [GSO_TCPV4, GSO_TCPV4 | 0x80, 3, 77])
def test_frames_that_make_no_sense_are_dropped(gso: int) -> None:
    card = Card(F_GUEST_CSUM, "pair:x")
    card.offer(2000)
    card.cable.send(HEADER.pack(NEEDS_CSUM, gso, 54, 100, 34, 16, 0) + bytes(300))
    card.cable.send(PLAIN + NEXT)
    assert [frame for _, frame in card.received()] == [NEXT]
    assert card.rig.device.dropped == 1


def large(data: bytes, version: int = 4, vlan: bool = False, flags: int = 0x99) -> bytes:
    """A TCP frame with `data`, its checksums not computed."""
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0xFFFF_FF00, 7, 8 << 4, flags, 100, 0x1234, 0)
    tcp += b"options-----"
    length = len(tcp) + len(data)
    if version == 4:
        ip = struct.pack(">BBHHHBBH", 0x46, 0, 0, 0xFFFE, 0x4000, 64, 6, 0xABCD)
        ip += bytes([10, 0, 0, 1, 10, 0, 0, 2]) + b"opts"
        kind = b"\x08\x00"
    else:
        ip = struct.pack(">IHBB", 6 << 28, length & 0xFFFF, 6, 64) + bytes(range(32))
        kind = b"\x86\xdd"
    return bytes(12) + (b"\x81\x00\x00\x05" if vlan else b"") + kind + ip + tcp + data


@given(
    data=st.binary(min_size=1, max_size=3000),
    size=st.integers(SMALLEST, 3100),
    version=st.sampled_from([4, 6]),
    vlan=st.booleans(),
)
def test_segments(data: bytes, size: int, version: int, vlan: bool) -> None:
    """Each is a frame that a receiver takes, and all of them are what one was (RFC 9293)."""
    found = segments(large(data, version, vlan), size)
    ip = 18 if vlan else 14
    tcp = ip + (24 if version == 4 else 40)
    body = tcp + 32
    assert b"".join(frame[body:] for frame in found) == data
    for number, frame in enumerate(found):
        last = number == len(found) - 1
        assert len(frame) - body == size or (last and 0 < len(frame) - body <= size)
        assert int.from_bytes(frame[tcp + 4 : tcp + 8], "big") == (
            0xFFFF_FF00 + number * size & 0xFFFF_FFFF
        )
        assert frame[tcp + 13] == 0x10 | (0x09 if last else 0) | (0x80 if number == 0 else 0)
        length = len(frame) - tcp
        if version == 4:
            total, identity = struct.unpack_from(">HH", frame, ip + 2)
            assert (total, identity) == (24 + length, 0xFFFE + number & 0xFFFF)
            assert checksum(frame[ip:tcp]) % 0xFFFF == 0
            addresses = frame[ip + 12 : ip + 20]
        else:
            assert struct.unpack_from(">H", frame, ip + 4) == (length,)
            addresses = frame[ip + 8 : ip + 40]
        assert checksum(addresses + struct.pack(">II", length, 6) + frame[tcp:]) % 0xFFFF == 0


@given(st.binary(max_size=200), st.integers(-1, 100), st.integers(0, 120))
def test_segments_of_anything(noise: bytes, size: int, place: int) -> None:
    frame = large(b"data" * 40)
    for odd in (noise, frame[:place], frame[:place] + noise, frame[:place] + noise + frame[place:]):
        for part in segments(odd, size):
            assert len(part) <= len(odd)


def test_a_driver_without_segmentation_gets_segments() -> None:
    card = Card(0, "pair:x")
    header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 70, 1000, 38, 16, 0)
    frame = large(bytes(2500))
    card.offer(*[2000] * 2)
    card.cable.send(header + frame)
    card.cable.send(PLAIN + NEXT)
    first = card.received()
    card.rig.replace(card.rig.snapshot())  # amid the segments
    card.offer(*[2000] * 3)
    seen = [each for _, each in first + card.received()]
    assert seen == [*segments(frame, 1000), NEXT]


def test_features_that_need_others() -> None:
    driver = Driver(LocalRig(Net, {"link": "pair:x"}))
    assert not driver.negotiate(F_VERSION_1 | F_GUEST_TSO4)
    assert not driver.negotiate(F_VERSION_1 | F_HOST_TSO4)
    assert driver.negotiate(F_VERSION_1 | F_HOST_TSO4 | F_CSUM)


@pytest.mark.parametrize(
    ("old", "features", "new"),
    [
        ("pair:x", F_CSUM | F_HOST_TSO4, "user"),
        ("pair:x", F_GUEST_CSUM | F_GUEST_TSO6, ""),
        ("user", F_MTU, "pair:x"),
    ],
)
def test_a_link_that_lacks_what_the_driver_took(old: str, features: int, new: str) -> None:
    driver = Driver(LocalRig(Net, {"link": old}))
    assert driver.negotiate(F_VERSION_1 | features)
    saved = driver.rig.snapshot()
    other = LocalRig(Net, {"link": new})
    other.device.sleep()
    with pytest.raises(DeviceError, match=f"with link={new or 'none'} does not offer; .* the kind"):
        other.device.restore(saved)
    same = LocalRig(Net, {"link": old})
    same.device.sleep()
    same.device.restore(saved)


@given(st.lists(st.binary(max_size=80), max_size=20))
@settings(deadline=None)
def test_any_message_on_the_link(messages: list[bytes]) -> None:
    """The peer is another machine: believed in nothing."""
    card = Card(F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4, "pair:x")
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
    card.close()


def test_two_cards_on_one_cable() -> None:
    left_end, right_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    features = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_GUEST_TSO4 | F_MRG_RXBUF
    left, right = (Card(features, "pair:x", end) for end in (left_end, right_end))
    right.offer(*[4096] * 20)
    header = HEADER.pack(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0)
    frame = os.urandom(30000)
    left.driver.queues[TX].ask([header, frame])
    right.poll()
    done = [r.written(right.rig.ram) for r in right.driver.queues[RX].collect()]
    assert b"".join(done)[HEADER.size :] == frame
    for card in (left, right):
        card.close()
