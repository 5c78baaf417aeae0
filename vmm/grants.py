"""The machine's side of `devices.virtio.granted`: which bytes of the guest a device gets to see.

A `Granter` follows what the *guest* writes to the registers of one virtio device, so it knows the
rings without asking the device. Before the device's turn (`begin`) it takes what is available from
them, with the same checks as a device that has guest memory, and copies into the area what can be
read; after the turn (`end`) it takes what the device says it has used.

What a device that was taken over can reach follows from four rules:

- It maps the area and nothing else of the guest.
- Into the area goes what the guest made available in an enabled queue, while the driver is ready
  and the function is a bus master; what was there before in a room does not go in.
- Out of it comes what belongs to a grant that is not used yet: the entry names a place, the place
  names the chain that *we* took and checked, and lengths are cut off by its room. A place that
  holds no grant is the device's failure, and so is one that is used twice.
- Nothing is copied back for a queue that the guest has reset, nor while it is no bus master.

It has no say in how the guest's ring is read or where a byte goes. Where its registers are it has
said before it saw anything of the guest; that and the sizes of its queues are told to the guest as
they were then, so that guest and machine speak of the same registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from devices.contract import U8, U32, checked_state
from devices.dma import DmaMemory
from devices.errors import DeviceError
from devices.virtio.common import COMMON_SIZE, CommonConfig, TransportState, check_state
from devices.virtio.features import LIVE, NO_VECTOR, Feature, Status
from devices.virtio.granted import area_parts
from devices.virtio.ring import Queue, QueueState, Ring, VirtQueue
from devices.virtio.rings import open_ring
from devices.virtio.transport import REGISTERS_BAR
from vmm.granted_queue import GrantedQueue

_EVERY_FEATURE = (1 << 64) - 1
_BAR, _OFFSET, _LENGTH, _DATA = 1, 2, 3, 4
"""Dwords of the window (4.1.4.9)."""
_OURS = frozenset({*range(0x18, 0x1A), *range(0x1C, 0x1E), *range(0x20, 0x38)})
"""Bytes of the common configuration that we know: size, enable and areas of the selected queue."""


@dataclass
class GrantState(TransportState):
    """What is kept of one device beside its own state.

    Attributes:
        bar, offset, length: of the window in configuration space (4.1.4.9).
        places: for each queue how many requests were granted and used, see `granted`.
        mistakes: for each queue what the driver did wrong, after which nothing is granted.
    """

    bar: U8 = 0
    offset: U32 = 0
    length: U32 = 0
    places: list[U32] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


class Granter:
    """All queues of one device.

    Args:
        memory: the guest's; `end` tells what was written.
        area: what the device maps too.
        sizes: the largest size of each queue.
        may_master: whether the guest lets the device do DMA now.
    """

    def __init__(
        self,
        memory: DmaMemory,
        area: memoryview,
        sizes: Sequence[int],
        may_master: Callable[[], bool],
    ) -> None:
        self._memory = memory
        self._may_master = may_master
        self.state = GrantState()
        self.virtqueues = tuple(
            VirtQueue(index, Queue("", size), self._open) for index, size in enumerate(sizes)
        )
        self.state.queues[:] = [queue.state for queue in self.virtqueues]
        parts, _ = area_parts(sizes)
        self._queues = tuple(
            GrantedQueue(queue, area, part)
            for queue, part in zip(self.virtqueues, parts, strict=True)
        )
        self._common = CommonConfig(self, NO_VECTOR)

    def _open(self, state: QueueState) -> Ring:
        return open_ring(state, self._memory, self.state.driver_features)

    # `devices.virtio.common.Owner`. The device judges features; what it refuses it does not use.

    @property
    def offered(self) -> int:
        return _EVERY_FEATURE

    def accepts(self, features: int) -> bool:
        return bool(features & Feature.VERSION_1)

    def started(self) -> None:
        """DRIVER_OK."""

    def reset(self) -> None:
        """The guest resets the device (2.4.1)."""
        for queue in self.virtqueues:
            queue.reset()
        state = self.state
        state.status = state.driver_features = 0
        state.driver_feature_select = state.queue_select = 0
        self._follow()

    def _follow(self) -> None:
        for each in self._queues:
            each.follow()

    # What the guest does to the registers.

    def written(self, offset: int, size: int, value: int) -> None:
        """The guest writes to the registers; before the device hears of it."""
        if offset + size <= COMMON_SIZE:
            self._common.write(offset, size, value)
            self._follow()

    def read(self, offset: int, size: int, value: int) -> int:
        """What the guest reads there, where the device says `value`.

        The size of a queue that the driver does not set is ours to tell, for it is by that size
        that we read its ring.
        """
        if offset >= COMMON_SIZE:
            return value
        ours = self._common.read(offset, size)
        for byte in range(size):
            if offset + byte in _OURS:
                mask = 0xFF << 8 * byte
                value = value & ~mask | ours & mask
        return value

    # Turns.

    @property
    def live(self) -> bool:
        """Whether the device may do DMA for its driver."""
        return self.state.status & LIVE == Status.DRIVER_OK and self._may_master()

    def begin(self) -> None:
        """The device's turn begins: grant what is available."""
        if self.live:
            for each in self._queues:
                if each.queue.state.enabled:
                    each.begin()

    def end(self) -> str:
        """It is over: take what was used; what the device did wrong, or ""."""
        if not self.live:
            return ""
        wrong = ""
        for each in self._queues:
            if each.queue.state.enabled:
                wrong = wrong or each.end()
        self._memory.flush()
        return wrong

    def again(self) -> list[int]:
        """Queues of which more can be granted now than when the turn began."""
        return [each.queue.index for each in self._queues if each.again]

    def revoke(self) -> None:
        """The device sleeps: it has no request in flight, so none of its grants counts."""
        for each in self._queues:
            each.revoke()

    # The window in configuration space.

    def window_written(self, register: int, offset: int, data: bytes) -> None:
        """The guest writes to a dword of the window's capability, from its byte `offset`."""
        state = self.state
        if register == _DATA:
            if offset == 0 and self._window_is_ours() and len(data) >= state.length:
                value = int.from_bytes(data[: state.length], "little")
                self.written(state.offset, state.length, value)
        elif register == _BAR:
            if offset == 0:
                state.bar = data[0]
        elif register in (_OFFSET, _LENGTH):
            name = "offset" if register == _OFFSET else "length"
            old = bytearray(getattr(state, name).to_bytes(4, "little"))
            old[offset : offset + len(data)] = data
            setattr(state, name, int.from_bytes(old, "little"))

    def window_read(self, register: int, value: int) -> int:
        """What the guest reads there, where the device says `value`."""
        state = self.state
        if register == _DATA and self._window_is_ours():
            return self.read(state.offset, state.length, value)
        return value

    def _window_is_ours(self) -> bool:
        return self.state.bar == REGISTERS_BAR and self.state.length in (1, 2, 4)

    # State.

    def snapshot(self) -> Any:
        """What `restore` needs, as plain values; after `revoke`."""
        self.state.places = [each.used for each in self._queues]
        self.state.mistakes = [each.mistake for each in self._queues]
        return msgspec.to_builtins(self.state)

    def restore(self, name: str, saved: Any) -> None:
        """Go on where a snapshot was taken.

        Raises:
            DeviceError: it cannot be the state of grants to this device; nothing was changed.
        """
        state = checked_state(name, saved, GrantState)
        try:
            check_state(state, self.virtqueues, _EVERY_FEATURE, NO_VECTOR)
            if not len(state.places) == len(state.mistakes) == len(self._queues):
                raise ValueError(f"this device has {len(self._queues)} queues")
            for place, queue in zip(state.places, state.queues, strict=True):
                if place >= 2 * queue.size:
                    raise ValueError("a place that its queue does not have")
        except ValueError as error:
            raise DeviceError(name, f"cannot restore this state: {error}") from error
        self.state = state
        for each, queue, place, mistake in zip(
            self._queues, state.queues, state.places, state.mistakes, strict=True
        ):
            each.queue.forget()
            each.queue.state = queue
            each.load(place, mistake)
