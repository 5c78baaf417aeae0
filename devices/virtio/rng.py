"""Entropy device (5.4): the smallest virtio device, and the one to read first.

Its only queue takes buffers and fills them with random bytes. It may fill less than a buffer has
room for (5.4.6.1), so that no request takes long.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import ClassVar

from devices.virtio.chain import Chain
from devices.virtio.common import VirtioState
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

_MOST = 4096
"""Bytes for one request."""
_BLOCK = 64


@dataclass
class RngOptions:
    """An entropy source.

    Attributes:
        seed: a number that makes the bytes repeatable, and useless as secrets; none by default.
    """

    seed: int | None = None


@dataclass
class RngState(VirtioState):
    """`blocks`: how many blocks were made from the seed so far."""

    blocks: int = 0


class Rng(VirtioDevice):
    model: ClassVar[str] = "rng"
    summary: ClassVar[str] = "virtio entropy source"
    device_type: ClassVar[int] = 4
    queues = (Queue("requests", 64),)
    in_order: ClassVar[bool] = True
    Options = RngOptions
    State = RngState
    options: RngOptions
    state: RngState

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        chain.write(self._random(min(chain.room, _MOST)))

    def _random(self, length: int) -> bytes:
        seed = self.options.seed
        if seed is None:
            return os.urandom(length)
        # A block cipher in counter mode, so to speak; what is left of the last block is dropped.
        blocks = [
            hashlib.blake2b(b"%d %d" % (seed, self.state.blocks + number)).digest()
            for number in range(-(-length // _BLOCK))
        ]
        self.state.blocks += len(blocks)
        return b"".join(blocks)[:length]

    def validate(self, state: RngState) -> None:
        super().validate(state)
        if not 0 <= state.blocks < 1 << 63:
            raise ValueError("an impossible number of blocks")
