"""Network device (5.1): frames between the guest and a descriptor of the host.

The descriptor ``host.fds["link"]`` is not blocking, and each of its reads and writes is one frame:
a packet socket pair (SOCK_SEQPACKET, SOCK_DGRAM) or a tap. Two kinds of frames (`format`):

- ``plain``: an Ethernet frame without its checksum, as a tap or a user-mode network stack has it.
- ``virtio``: the same after struct virtio_net_hdr (12 bytes, 5.1.6), for the link between two
  machines: offloads go through, a checksum is never computed and a segment never cut.

What the reader of a frame did not ask for is done here: checksums are completed (`complete`); a
frame to be segmented that the driver cannot take is dropped, as is what the other side has no room
for: a network may lose frames. Frames that arrived wait for the driver, up to `MOST_FRAMES`; then
the descriptor is left alone. The link goes down when the peer is gone.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from devices.contract import DeviceHost
from devices.virtio.chain import Chain, RingError
from devices.virtio.common import VirtioState
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

F_CSUM, F_GUEST_CSUM, F_MAC = 1 << 0, 1 << 1, 1 << 5
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
LINK_UP = 1
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80
_GSO_FEATURES = {GSO_TCPV4: F_GUEST_TSO4, GSO_TCPV6: F_GUEST_TSO6}
RX, TX = 0, 1

HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers (5.1.6)."""
LONGEST = 65550
"""Bytes of a frame: what TSO can make (5.1.6.3.1), which no link without it reaches."""
MOST_FRAMES = 64
_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu


@dataclass
class NetOptions:
    """A network card.

    Attributes:
        mac: its address, ``52:54:00:xx:xx:xx`` or the like.
        format: of the frames on the link, see above.
    """

    mac: str = "52:54:00:12:34:56"
    format: Literal["plain", "virtio"] = "plain"

    def __post_init__(self) -> None:
        try:
            address = bytes.fromhex(self.mac.replace(":", ""))
        except ValueError:
            address = b""
        if len(address) != 6 or self.mac.count(":") != 5:
            raise ValueError(f"mac is six bytes in hexadecimal with ':' between, not {self.mac}")
        if address[0] & 1:
            raise ValueError(f"mac {self.mac} is a group address")


@dataclass
class NetState(VirtioState):
    """`arrived`: frames with their header that wait for the driver; `link_up`: the cable is in."""

    arrived: list[bytes] = field(default_factory=list)
    link_up: bool = True


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
        super().__init__(host, options)
        self._fd = host.fds.get("link")
        self.state.link_up = self._fd is not None
        self.dropped = 0

    def features(self) -> int:
        offered = F_CSUM | F_GUEST_CSUM | F_MAC | F_MRG_RXBUF | F_STATUS
        if self.options.format == "virtio":
            offered |= F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
            offered |= F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
        return offered

    def accepts_features(self, features: int) -> bool:
        return all(
            not features & feature or features & needed for feature, needed in _REQUIRES.items()
        )

    def read_device_config(self) -> bytes:
        mac = bytes.fromhex(self.options.mac.replace(":", ""))
        return _CONFIG.pack(mac, LINK_UP if self.state.link_up else 0, 1, 0)

    def set_link(self, up: bool) -> None:
        """Pull the cable out, or put it in."""
        if up != self.state.link_up:
            self.state.link_up = up
            self.config_changed()

    # From the guest.

    def serve(self, queue: VirtQueue) -> None:
        if queue.index == RX:
            self._deliver(queue)
        else:
            super().serve(queue)

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if chain.size < HEADER.size:
            raise RingError("a frame without header")
        header = chain.read(HEADER.size)
        if chain.size > LONGEST:
            self.dropped += 1
        elif self._fd is not None and self.state.link_up:
            self._send(self._fd, header, chain.read())

    def _send(self, fd: int, header: bytes, frame: bytes) -> None:
        if self.options.format == "plain":
            fields = HEADER.unpack(header)
            if fields[1] != GSO_NONE:  # not negotiated
                self.dropped += 1
                return
            if fields[0] & NEEDS_CSUM:
                frame = complete(frame, fields[4], fields[5])
            header = b""
        try:
            os.writev(fd, (header, frame))
        except BlockingIOError:
            self.dropped += 1  # the other side has no room
        except OSError:
            self.set_link(False)

    # To the guest.

    def watched(self) -> Sequence[int]:
        if self._fd is None or not (self.state.link_up and self.live):
            return ()
        return (self._fd,) if len(self.state.arrived) < MOST_FRAMES else ()

    def ready(self, fd: int) -> None:
        room = LONGEST + HEADER.size
        arrived = self.state.arrived
        while len(arrived) < MOST_FRAMES:
            try:
                data = os.read(fd, room + 1)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.set_link(False)
                break
            if self.options.format == "plain":
                data = bytes(HEADER.size) + data
            if HEADER.size < len(data) <= room:
                arrived.append(data)
            else:
                self.dropped += 1
        if arrived and self.live:
            self.ring(self.virtqueues[RX])

    def _deliver(self, queue: VirtQueue) -> None:
        arrived = self.state.arrived
        while arrived:
            packet = self._for_driver(arrived[0])
            if packet is None:
                self.dropped += 1
            elif not self._put(queue, packet):
                return
            del arrived[0]

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
        super().validate(state)
        sizes = [len(packet) for packet in state.arrived]
        if len(sizes) > MOST_FRAMES or any(
            not HEADER.size < size <= LONGEST + HEADER.size for size in sizes
        ):
            raise ValueError("more or longer frames than a link has")


def complete(frame: bytes, start: int, offset: int) -> bytes:
    """`frame` with the checksum at ``start + offset`` computed over all from `start` (RFC 1071).

    The checksum's place holds the sum of the pseudo-header already (5.1.6.2.1). A frame that is
    too short for it stays as it is.
    """
    place = start + offset
    if place + 2 > len(frame):
        return frame
    covered = frame[start:]
    # The sum of 16-bit words with end-around carry is the number itself modulo 2**16 - 1.
    total = int.from_bytes(covered + bytes(len(covered) & 1), "big") % 0xFFFF
    value = (0xFFFF - total) or 0xFFFF  # a computed zero is sent as all ones
    return frame[:place] + value.to_bytes(2, "big") + frame[place + 2 :]
