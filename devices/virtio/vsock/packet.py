"""Packets of a virtio socket device (5.10.6): a header, and after it the data of RW."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

HOST_CID = 2
STREAM = 1
"""5.10.6.1: the only type of socket here."""
_LAYOUT = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = _LAYOUT.size


class Op(enum.IntEnum):
    """5.10.6: what a packet says."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


NO_MORE_RECEIVED, NO_MORE_SENT = 1, 2
"""Flags of SHUTDOWN (5.10.6.6): what the sender of it will not do any more."""


class Header(NamedTuple):
    """struct virtio_vsock_hdr. `buf_alloc`: the room that its sender has in all; `fwd_cnt`: bytes
    that have left it, since the connection began (5.10.6.3)."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Of exactly `HEADER_SIZE` bytes."""
        return cls(*_LAYOUT.unpack(data))

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self)
