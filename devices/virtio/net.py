"""Network device (5.1): frames between the guest and a cable, see `devices.virtio.cable`.

What the reader of a frame did not ask for is done here: checksums are completed, segments cut
(`devices.virtio.segment`). What the other end has no room for is dropped, for a network may lose
frames; only a stream (``link=user``) makes the driver wait instead.
Frames that arrived wait for the driver, up to `MOST_BYTES`; then the cable is left alone. The link
goes down with the cable.

A user-mode stack is no wire: it takes long frames, so the driver is told of `USER_MTU`
(VIRTIO_NET_F_MTU) and needs no segmentation. A pair or a tap gets frames as the driver made them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from devices.contract import DeviceHost
from devices.errors import OptionError
from devices.files import HostDetail, HostLink
from devices.virtio.cable import (
    HEADER,
    LONGEST,
    OFFLOAD_CSUM,
    OFFLOAD_ECN,
    OFFLOAD_TSO4,
    OFFLOAD_TSO6,
    PLAIN,
    SHORTEST,
    Cable,
    Cut,
    Jack,
    PacketCable,
    StreamCable,
)
from devices.virtio.chain import Chain, RingError
from devices.virtio.common import VirtioState
from devices.virtio.link import Link, LinkKind, parse_forwards
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.segment import complete, segments
from devices.virtio.transport import VirtioDevice

F_CSUM, F_GUEST_CSUM, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN = 1 << 7, 1 << 8, 1 << 9
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN = 1 << 11, 1 << 12, 1 << 13
F_MRG_RXBUF, F_STATUS = 1 << 15, 1 << 16
_REQUIRES = {
    F_GUEST_TSO4: F_GUEST_CSUM,
    F_GUEST_TSO6: F_GUEST_CSUM,
    F_GUEST_ECN: F_GUEST_TSO4 | F_GUEST_TSO6,
    F_HOST_TSO4: F_CSUM,
    F_HOST_TSO6: F_CSUM,
    F_HOST_ECN: F_HOST_TSO4 | F_HOST_TSO6,
}
"""5.1.3.1: one of the features on the right."""
_SEGMENTATION = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
_OF_LINKS = F_MTU | _SEGMENTATION
"""Features that depend on the kind of link."""
LINK_UP = 1
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80
_GSO_FEATURES = {GSO_TCPV4: F_GUEST_TSO4, GSO_TCPV6: F_GUEST_TSO6}
RX, TX = 0, 1

MOST_BYTES = 256 << 10
"""Of frames that wait for the driver; what is read at once may come on top of it."""
_MOST_AT_ONCE = 1 << 20
USER_MTU = 16000
"""passt takes 65520, but then downloads stop for 0.1 s again and again: it makes the window of its
own socket follow the guest's, and while that is less than a segment the sender only probes it.
Measured with Linux: 110 MiB/s with 9000 to 32000, 55 with 40000 and more, 35 with 4000."""
_OFFLOADS = {
    F_GUEST_CSUM: OFFLOAD_CSUM,
    F_GUEST_TSO4: OFFLOAD_TSO4,
    F_GUEST_TSO6: OFFLOAD_TSO6,
    F_GUEST_ECN: OFFLOAD_ECN,
}
_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu


@dataclass
class NetOptions:
    """A network card.

    Attributes:
        link: what it is connected to; empty: nothing.
        mac: its address.
        forward: with link=user: ports of the host that lead to the guest, as in tcp:8080:80, or
            tcp:ADDRESS:8080:80 (127.0.0.1 by default), or udp:...; with + between several.
    """

    link: Annotated[str, HostLink()] = ""
    mac: str = "52:54:00:12:34:56"
    forward: Annotated[str, HostDetail(of="link")] = ""

    def __post_init__(self) -> None:
        try:
            address = bytes.fromhex(self.mac.replace(":", ""))
        except ValueError:
            address = b""
        if len(address) != 6 or self.mac.count(":") != 5:
            raise OptionError(
                f"mac is six bytes in hexadecimal with ':' between, not {self.mac}", "mac"
            )
        if address[0] & 1:
            raise OptionError(f"mac {self.mac} is a group address", "mac")
        link = Link.parse(self.link)
        if parse_forwards(self.forward) and link.kind is not LinkKind.USER:
            raise OptionError("forward= is for link=user", "forward", "link")


@dataclass
class NetState(VirtioState):
    """`arrived`: frames with their header that wait for the driver; `link_up`: what it was told."""

    arrived: list[bytes] = field(default_factory=list)
    link_up: bool = False


class Net(VirtioDevice):
    model: ClassVar[str] = "net"
    summary: ClassVar[str] = "virtio network card"
    device_type: ClassVar[int] = 1
    class_code: ClassVar[int] = 0x020000  # Ethernet
    config_size: ClassVar[int] = _CONFIG.size
    queues = (Queue("receive", 256), Queue("transmit", 256))
    in_order: ClassVar[bool] = True
    Options = NetOptions
    State = NetState
    options: NetOptions
    state: NetState

    def __init__(self, host: DeviceHost, options: NetOptions | None = None) -> None:
        self._kind = Link.parse((options or NetOptions()).link).kind
        super().__init__(host, options)
        self._jack: Jack | None = None
        self._cable: Cable | None = None
        self._waiting = 0
        self.dropped = 0
        fd = host.fds.get("link")
        if fd is not None:
            if self._kind is LinkKind.USER:
                self._cable = StreamCable(fd)
            elif self._kind is LinkKind.TAP:
                self._cable = PacketCable(fd, tap=True)
            else:
                self._jack = Jack(fd)
        self.state.link_up = self._cable is not None

    def features(self) -> int:
        offered = F_CSUM | F_GUEST_CSUM | F_MAC | F_MRG_RXBUF | F_STATUS
        if self._kind is LinkKind.USER:
            offered |= F_MTU
        elif self._kind is not LinkKind.NONE:
            offered |= _SEGMENTATION
        return offered

    def accepts_features(self, features: int) -> bool:
        return all(
            not features & feature or features & needed for feature, needed in _REQUIRES.items()
        )

    def read_device_config(self) -> bytes:
        mac = bytes.fromhex(self.options.mac.replace(":", ""))
        mtu = USER_MTU if self._kind is LinkKind.USER else 0
        return _CONFIG.pack(mac, LINK_UP if self.state.link_up else 0, 1, mtu)

    # The cable.

    def _plug(self, cable: Cable | None) -> None:
        """This is the cable from now on; None: it is pulled out."""
        old, self._cable = self._cable, cable
        if old is not None and self._jack is not None:
            os.close(old.fd)  # it came through the jack, so it is ours
        self._tell_offloads()
        self._tell_link()
        if self.live:
            self.ring(self.virtqueues[TX])  # it may have waited for the old one

    def _tell_link(self) -> None:
        up = self._cable is not None
        if up != self.state.link_up:
            self.state.link_up = up
            self.config_changed()

    def _tell_offloads(self) -> None:
        if self._cable is not None:
            taken = (flag for feature, flag in _OFFLOADS.items() if self.negotiated(feature))
            self._cable.offload(sum(taken))

    def _cut(self, why: Cut) -> None:
        self.host.log(f"the link is down: {why}")
        self._plug(None)

    def device_started(self) -> None:
        self._tell_offloads()

    def device_reset(self) -> None:
        self._tell_offloads()

    def wake(self) -> None:
        # After a restore the cable is another one, or there is none.
        self._tell_offloads()
        self._tell_link()
        super().wake()

    def close(self) -> None:
        if self._jack is not None:
            if self._cable is not None:
                os.close(self._cable.fd)
            self._jack.close()
            self._jack = self._cable = None

    # From the guest.

    def serve(self, queue: VirtQueue) -> None:
        if queue.index == RX:
            self._deliver(queue)
            return
        while not self._full():
            if not self.may_serve():
                self.ring(queue)
                return
            chain = queue.pop()
            if chain is None:
                return
            self.handle(queue, chain)
            queue.complete(chain)

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if chain.size < HEADER.size:
            raise RingError("a frame without header")
        header = chain.read(HEADER.size)
        if chain.size > LONGEST:
            self.dropped += 1
        elif self._cable is not None:
            self._send(self._cable, header, chain.read())

    def _send(self, cable: Cable, header: bytes, frame: bytes) -> None:
        if self._kind is LinkKind.USER:
            flags, gso, _, _, start, offset, _ = HEADER.unpack(header)
            if gso != GSO_NONE or len(frame) < SHORTEST:  # not negotiated; no frame
                self.dropped += 1
                return
            if flags & NEEDS_CSUM:
                frame = complete(frame, start, offset)
        try:
            if not cable.send(header, frame):
                self.dropped += 1
        except Cut as why:
            self._cut(why)

    def full(self) -> Sequence[int]:
        return (self._cable.fd,) if self._cable is not None and self._full() else ()

    def _full(self) -> bool:
        return self._cable is not None and self._cable.full

    # To the guest.

    def watched(self) -> Sequence[int]:
        fds: list[int] = []
        if self._jack is not None and not self._jack.gone:
            fds.append(self._jack.fd)
        if self._cable is not None and self.live and self._has_room():
            fds.append(self._cable.fd)
        return fds

    def _has_room(self) -> bool:
        return self._waiting < MOST_BYTES

    def ready(self, fd: int) -> None:
        if self._jack is not None and fd == self._jack.fd:
            new = self._jack.take()
            if new is not None:
                self._plug(new)
            return
        cable = self._cable
        if cable is None:
            return
        try:
            if cable.full:
                cable.flush()
                if not cable.full and self.live:
                    self.ring(self.virtqueues[TX])
            if self._has_room():
                self._take_in(cable.receive())
        except Cut as why:
            self._cut(why)

    def _take_in(self, packets: Sequence[bytes]) -> None:
        for packet in packets:
            if HEADER.size + SHORTEST <= len(packet) <= HEADER.size + LONGEST:
                self.state.arrived.append(packet)
                self._waiting += len(packet)
            else:
                self.dropped += 1
        if self.state.arrived and self.live:
            self.ring(self.virtqueues[RX])

    def _deliver(self, queue: VirtQueue) -> None:
        arrived, done = self.state.arrived, 0
        while done < len(arrived):
            taken = self._for_driver(arrived[done])
            if taken is None:
                parts = self._cut_up(arrived[done])
                arrived[done : done + 1] = parts
                self.dropped += not parts
                continue
            if not self._put(queue, taken):
                break
            done += 1
        del arrived[:done]
        self._waiting = sum(map(len, arrived))

    def _for_driver(self, packet: bytes) -> bytes | None:
        """The frame as this driver takes it: the header says nothing that it did not agree to."""
        flags, gso, length, size, start, offset, _ = HEADER.unpack_from(packet)
        frame = packet[HEADER.size :]
        kind = gso & ~GSO_ECN
        if kind != GSO_NONE:
            feature = _GSO_FEATURES.get(kind, 0)
            ecn = not gso & GSO_ECN or self.negotiated(F_GUEST_ECN)
            if not (feature and self.negotiated(feature) and ecn and flags & NEEDS_CSUM):
                return None
        flags &= NEEDS_CSUM
        if flags and not self.negotiated(F_GUEST_CSUM):
            frame, flags = complete(frame, start, offset), 0
        if not flags:
            gso = length = size = start = offset = 0
        elif start + offset + 2 > len(frame):
            return None
        return HEADER.pack(flags, gso, length, size, start, offset, 1) + frame

    def _cut_up(self, packet: bytes) -> list[bytes]:
        """What a packet that the driver cannot take stands for; nothing if it makes no sense."""
        flags, gso, _, size, _, _, _ = HEADER.unpack_from(packet)
        if not (flags & NEEDS_CSUM and gso & ~GSO_ECN in _GSO_FEATURES):
            return []
        return [PLAIN + frame for frame in segments(packet[HEADER.size :], size)]

    def _put(self, queue: VirtQueue, packet: bytes) -> bool:
        """Into one buffer, or with MRG_RXBUF into as many as it takes; False if there are not
        enough of them yet."""
        merge = self.negotiated(F_MRG_RXBUF)
        before = queue.mark()
        chains: list[Chain] = []
        room = 0
        while room < len(packet):
            chain = queue.pop()
            if chain is None:
                queue.rewind(before)
                return False
            if chain.room < HEADER.size:
                raise RingError("a receive buffer is smaller than the header")
            if not merge and chain.room < len(packet):
                self.dropped += 1  # 5.1.6.3.1: the driver's buffers are too small
                queue.complete(chain)
                return True
            chains.append(chain)
            room += chain.room
        view = memoryview(packet)
        for chain in chains:
            view = view[chain.write(view) :]
        if len(chains) > 1:
            chains[0].write_at(10, len(chains).to_bytes(2, "little"))
        for chain in chains:
            queue.complete(chain)
        return True

    def validate(self, state: Any) -> None:
        if state.driver_features & _OF_LINKS & ~self.offered:
            raise ValueError(
                "the driver accepted a feature that a card with "
                f"link={self.options.link or 'none'} does not offer; "
                "it can go on with a link of the kind that it had"
            )
        super().validate(state)
        sizes = [len(packet) for packet in state.arrived]
        if sum(sizes) > MOST_BYTES + _MOST_AT_ONCE or any(
            not HEADER.size + SHORTEST <= size <= HEADER.size + LONGEST for size in sizes
        ):
            raise ValueError("more or longer frames than a link has")

    def restored(self) -> None:
        super().restored()
        self._waiting = sum(map(len, self.state.arrived))
