"""What a card does for a driver without segmentation offload: cut a large TCP frame, sum up.

A frame to be segmented has the headers of the first segment and the data of all (5.1.6.2); its
checksum field holds the sum of a pseudo-header, which means nothing for the parts.
"""

from __future__ import annotations

import struct

VLAN = b"\x81\x00"
IPV4, IPV6 = b"\x08\x00", b"\x86\xdd"
TCP = 6
FIN_PSH, CWR = 0x09, 0x80
"""Flags of TCP that only the last segment has, and that only the first has (RFC 9293, 3168)."""
SMALLEST = 48
"""Bytes of a segment, as Linux has it: less only makes work."""
_CHECKSUM = 16
"""Where the checksum lies in a TCP header."""


def complete(frame: bytes, start: int, offset: int) -> bytes:
    """`frame` with the checksum at ``start + offset`` computed over all from `start` (RFC 1071).

    The checksum's place holds the sum of the pseudo-header already (5.1.6.2.1). A frame that is
    too short for it stays as it is.
    """
    place = start + offset
    if place + 2 > len(frame):
        return frame
    return frame[:place] + checksum(frame[start:]).to_bytes(2, "big") + frame[place + 2 :]


def checksum(covered: bytes) -> int:
    """The Internet checksum (RFC 1071) of bytes, of which an odd one is padded with zero.

    Of the two forms of zero it is all ones, because 0 is no checksum in UDP.
    """
    # The sum of 16-bit words with end-around carry is the number itself modulo 2**16 - 1.
    return 0xFFFF - int.from_bytes(covered + bytes(len(covered) & 1), "big") % 0xFFFF


def segments(frame: bytes, size: int) -> list[bytes]:
    """The frames that a TCP frame stands for, each with up to `size` bytes of data and summed up.

    Args:
        frame: Ethernet, perhaps with a VLAN tag, then IPv4 or IPv6, then TCP.
        size: at least `SMALLEST`.

    Returns:
        None of them if it is nothing of the kind.
    """
    layer3 = 18 if frame[12:14] == VLAN else 14
    kind = frame[layer3 - 2 : layer3]
    if kind == IPV4 and len(frame) > layer3 + 20:
        layer4 = layer3 + 4 * (frame[layer3] & 15)
        protocol, addresses = frame[layer3 + 9], frame[layer3 + 12 : layer3 + 20]
        good = frame[layer3] >> 4 == 4 and layer4 >= layer3 + 20
    elif kind == IPV6 and len(frame) > layer3 + 40:
        layer4 = layer3 + 40
        protocol, addresses = frame[layer3 + 6], frame[layer3 + 8 : layer3 + 40]
        good = frame[layer3] >> 4 == 6
    else:
        return []
    if not good or protocol != TCP or len(frame) < layer4 + 20:
        return []
    data = layer4 + 4 * (frame[layer4 + 12] >> 4)
    if data < layer4 + 20 or len(frame) <= data or size < SMALLEST:
        return []
    found: list[bytes] = []
    for place in range(data, len(frame), size):
        part = frame[place : place + size]
        last = place + size >= len(frame)
        header = _ip_header(frame[layer3:layer4], len(found), data - layer4 + len(part))
        tcp = bytearray(frame[layer4:data])
        (sequence,) = struct.unpack_from(">I", tcp, 4)
        struct.pack_into(">I", tcp, 4, (sequence + place - data) & 0xFFFF_FFFF)
        tcp[13] &= ~((0 if last else FIN_PSH) | (CWR if found else 0))
        tcp[_CHECKSUM : _CHECKSUM + 2] = bytes(2)
        whole = bytes(tcp) + part
        pseudo = addresses + struct.pack(">II", len(whole), TCP)
        struct.pack_into(">H", tcp, _CHECKSUM, checksum(pseudo + whole))
        found.append(frame[:layer3] + header + bytes(tcp) + part)
    return found


def _ip_header(first: bytes, number: int, length: int) -> bytes:
    """That of segment `number` with `length` bytes after it."""
    header = bytearray(first)
    if first[0] >> 4 == 6:
        struct.pack_into(">H", header, 4, length)
        return bytes(header)
    (identity,) = struct.unpack_from(">H", header, 4)
    struct.pack_into(">H", header, 2, len(header) + length)
    struct.pack_into(">H", header, 4, (identity + number) & 0xFFFF)
    struct.pack_into(">H", header, 10, 0)
    struct.pack_into(">H", header, 10, checksum(bytes(header)))
    return bytes(header)
