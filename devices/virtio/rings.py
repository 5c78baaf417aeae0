"""The ring that was negotiated."""

from __future__ import annotations

from devices.dma import GuestMemory
from devices.virtio.features import Feature
from devices.virtio.packed import PackedRing
from devices.virtio.queue import SplitRing
from devices.virtio.ring import QueueState


def open_ring(state: QueueState, memory: GuestMemory, features: int) -> SplitRing | PackedRing:
    """The ring of `state` in guest memory, in the format that the driver's `features` say.

    Raises:
        RingError, DmaFault: the driver put it where no ring can be.
    """
    kind = PackedRing if features & Feature.RING_PACKED else SplitRing
    indirect, event_idx = features & Feature.INDIRECT_DESC, features & Feature.EVENT_IDX
    return kind(state, memory, bool(indirect), bool(event_idx))
