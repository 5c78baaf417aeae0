"""The ring that was negotiated."""

from __future__ import annotations

from devices.dma import GuestMemory
from devices.virtio.features import Feature
from devices.virtio.packed import PackedRing
from devices.virtio.queue import SplitRing
from devices.virtio.ring import QueueState

_PACKED, _INDIRECT, _EVENT_IDX = (  # plain numbers: & of a flag is slow
    int(Feature.RING_PACKED),
    int(Feature.INDIRECT_DESC),
    int(Feature.EVENT_IDX),
)


def open_ring(state: QueueState, memory: GuestMemory, features: int) -> SplitRing | PackedRing:
    """The ring of `state` in guest memory, in the format that the driver's `features` say.

    Raises:
        RingError, DmaFault: the driver put it where no ring can be.
    """
    kind = PackedRing if features & _PACKED else SplitRing
    return kind(state, memory, bool(features & _INDIRECT), bool(features & _EVENT_IDX))
