"""The common configuration structure (4.1.4.3): the registers that every virtio device has.

====== ===== ====================== =================================================
offset width name                   writable
====== ===== ====================== =================================================
0x00   4     device_feature_select  yes
0x04   4     device_feature         no
0x08   4     driver_feature_select  yes
0x0C   4     driver_feature         until FEATURES_OK
0x10   2     config_msix_vector     yes
0x12   2     num_queues             no
0x14   1     device_status          yes; 0 resets the device
0x15   1     config_generation      no
0x16   2     queue_select           yes
0x18   2     queue_size             until the queue is enabled
0x1A   2     queue_msix_vector      yes
0x1C   2     queue_enable           1 only
0x1E   2     queue_notify_off       no
0x20   8     queue_desc             until the queue is enabled; either half, too
0x28   8     queue_driver           the same
0x30   8     queue_device           the same
0x38   2     queue_notif_config_data no: that feature is not offered
0x3A   2     queue_reset            1 only, with RING_RESET
====== ===== ====================== =================================================

Reads of any size are fine. A write counts if it is of a register's own width (4.1.3.1); any other
is ignored, as are those of a queue that does not exist.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from devices.contract import U8, U16, U32
from devices.pci.function import PciState
from devices.virtio.features import DRIVER_BITS, NO_VECTOR, Feature, Status
from devices.virtio.ring import QueueState, VirtQueue

_LAYOUT = struct.Struct("<IIIIHHBBHHHHHQQQHH")
COMMON_SIZE = _LAYOUT.size
_QUEUE_PART = 0x18
_HALF = 0xFFFF_FFFF


@dataclass
class TransportState:
    """What the driver has set up, in these registers.

    Attributes:
        config_changed: the device's configuration has changed since the driver last read of it.
    """

    status: U8 = 0
    device_feature_select: U32 = 0
    driver_feature_select: U32 = 0
    driver_features: int = 0
    config_vector: U16 = NO_VECTOR
    queue_select: U16 = 0
    isr: U8 = 0
    generation: U8 = 0
    config_changed: bool = False
    queues: list[QueueState] = field(default_factory=list)


@dataclass
class VirtioState(TransportState, PciState):
    """What every virtio device keeps; models extend it."""


class Owner(Protocol):
    """The device, as its registers see it."""

    @property
    def virtqueues(self) -> Sequence[VirtQueue]: ...
    @property
    def state(self) -> TransportState: ...
    @property
    def offered(self) -> int: ...
    def accepts(self, features: int) -> bool: ...
    def started(self) -> None: ...
    def reset(self) -> None: ...


class CommonConfig:
    """The registers of one device.

    Args:
        owner: told of a reset and of DRIVER_OK.
        vectors: how many MSI-X vectors there are.
    """

    def __init__(self, owner: Owner, vectors: int) -> None:
        self._owner = owner
        self._vectors = vectors
        wide = {
            (base + half, size): (name, 8 * half, (1 << 8 * size) - 1)
            for base, name in ((0x20, "desc"), (0x28, "driver"), (0x30, "device"))
            for half, size in ((0, 8), (0, 4), (4, 4))
        }
        self._areas = wide
        self._writers: dict[tuple[int, int], Callable[[int], None]] = {
            (0x00, 4): self._select_device_features,
            (0x08, 4): self._select_driver_features,
            (0x0C, 4): self._write_features,
            (0x10, 2): self._write_config_vector,
            (0x14, 1): self._write_status,
            (0x16, 2): self._select_queue,
            (0x18, 2): self._write_size,
            (0x1A, 2): self._write_vector,
            (0x1C, 2): self._enable,
            (0x3A, 2): self._reset_queue,
        }

    def read(self, offset: int, size: int) -> int:
        state, owner = self._owner.state, self._owner
        queue = self._queue()
        of_queue = (0, 0, 0, 0, 0, 0, 0)
        if queue is not None:
            q = queue.state
            of_queue = (q.size, q.vector, q.enabled, queue.index, q.desc, q.driver, q.device)
        image = _LAYOUT.pack(
            state.device_feature_select,
            _word(owner.offered, state.device_feature_select),
            state.driver_feature_select,
            _word(state.driver_features, state.driver_feature_select),
            state.config_vector,
            len(owner.virtqueues),
            state.status,
            state.generation,
            state.queue_select,
            *of_queue,
            0,
            0,  # a queue reset is over at once
        )
        return int.from_bytes(image[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        writer = self._writers.get((offset, size))
        if writer is not None:
            writer(value)
            return
        area = self._areas.get((offset, size))
        queue = self._queue()
        if area is not None and queue is not None and not queue.state.enabled:
            name, shift, mask = area
            old = getattr(queue.state, name)
            setattr(queue.state, name, (old & ~(mask << shift)) | value << shift)

    def _queue(self) -> VirtQueue | None:
        queues, index = self._owner.virtqueues, self._owner.state.queue_select
        return queues[index] if index < len(queues) else None

    # The device.

    def _select_device_features(self, value: int) -> None:
        self._owner.state.device_feature_select = value

    def _select_driver_features(self, value: int) -> None:
        self._owner.state.driver_feature_select = value

    def _write_features(self, value: int) -> None:
        state = self._owner.state
        select = state.driver_feature_select
        # 3.1.1: nothing changes after FEATURES_OK. What was not offered reads as 0 (4.1.4.3.1).
        if select < 2 and not state.status & Status.FEATURES_OK:
            kept = state.driver_features & ~(_HALF << 32 * select)
            state.driver_features = kept | (value << 32 * select & self._owner.offered)

    def _write_config_vector(self, value: int) -> None:
        self._owner.state.config_vector = self._vector(value)

    def _vector(self, value: int) -> int:
        """4.1.5.1.2: what cannot be mapped reads back as NO_VECTOR."""
        return value if value < self._vectors else NO_VECTOR

    def _write_status(self, value: int) -> None:
        owner, state = self._owner, self._owner.state
        if not value:
            owner.reset()
            return
        before = state.status
        status = before | (value & DRIVER_BITS)
        if status & ~before & Status.FEATURES_OK and not owner.accepts(state.driver_features):
            status &= ~Status.FEATURES_OK
        if not status & Status.FEATURES_OK:
            status &= ~Status.DRIVER_OK
        state.status = int(status)
        if status & ~before & Status.DRIVER_OK:
            owner.started()

    # The selected queue.

    def _select_queue(self, value: int) -> None:
        self._owner.state.queue_select = value

    def _write_size(self, value: int) -> None:
        queue = self._queue()
        if queue is None or queue.state.enabled or not 1 <= value <= queue.most:
            return
        # Only a packed ring has other sizes than powers of two (2.7, 2.8.10.1).
        packed = self._owner.state.driver_features & Feature.RING_PACKED
        if packed or not value & (value - 1):
            queue.state.size = value

    def _write_vector(self, value: int) -> None:
        queue = self._queue()
        if queue is not None:
            queue.state.vector = self._vector(value)

    def _enable(self, value: int) -> None:
        queue = self._queue()
        if queue is not None and value == 1:
            queue.state.enabled = True

    def _reset_queue(self, value: int) -> None:
        queue = self._queue()
        negotiated = self._owner.state.driver_features & Feature.RING_RESET
        if queue is not None and value == 1 and negotiated:
            queue.reset()


def check_state(
    state: TransportState, queues: Sequence[VirtQueue], offered: int, most: int
) -> None:
    """See whether `state` can be that of a device with these queues, features and vectors.

    Raises:
        ValueError: it cannot.
    """
    if len(state.queues) != len(queues):
        raise ValueError(f"this device has {len(queues)} queues")
    if state.driver_features & ~offered or state.driver_features < 0:
        raise ValueError("the driver accepted a feature that this device does not offer")
    if state.isr & ~3:
        raise ValueError("the ISR status has two bits")
    if state.status & ~(DRIVER_BITS | Status.NEEDS_RESET):
        raise ValueError("the device status has a bit that does not exist")
    if state.status & Status.DRIVER_OK and not state.status & Status.FEATURES_OK:
        raise ValueError("the driver is ready without having negotiated features")
    packed = bool(state.driver_features & Feature.RING_PACKED)
    for vector in (state.config_vector, *(queue.vector for queue in state.queues)):
        if vector != NO_VECTOR and vector >= most:
            raise ValueError(f"there is no MSI-X vector {vector}")
    for queue, saved in zip(queues, state.queues, strict=True):
        saved.check(queue.most)
        if not packed and saved.size & (saved.size - 1):
            raise ValueError("the size of a split queue is a power of two")
        if packed and max(saved.next_avail, saved.next_used) >= saved.size:
            raise ValueError("a packed queue's position lies outside")


def _word(features: int, select: int) -> int:
    return features >> 32 * select & _HALF if select < 2 else 0
