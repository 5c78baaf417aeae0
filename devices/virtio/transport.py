"""`VirtioDevice`: the base of every virtio device, over the PCI modern transport (virtio 1.2, 4.1).

A device says what it is, which queues it has, and handles requests; rings, registers, interrupts,
errors of the driver, suspend and state are done here. The smallest one is whole::

    class Rng(VirtioDevice):
        device_type = 4
        queues = (Queue("requests", 64),)

        def handle(self, queue: VirtQueue, chain: Chain) -> None:
            chain.write(os.urandom(chain.room))

A request is given back when `handle` returns, unless it set `chain.held`; then the device calls
`queue.complete(chain)` in a later turn. A queue that waits for the device, not for the driver (of
received packets), overrides `serve` and takes from it with `queue.pop`.

BAR 0, 16 KiB of memory; every write is synced, for a doorbell is a turn (see `devices.dma`):

====== ================================================================
offset what
====== ================================================================
0x0000 common configuration, see `devices.virtio.common`
0x1000 ISR status, one byte; reading clears it (4.1.4.5)
0x2000 device configuration
0x3000 doorbells: 4 bytes for each queue, in order (4.1.4.4)
====== ================================================================

BAR 1, 4 KiB of memory: MSI-X table at 0, pending bits at 0x800. Without MSI-X, INTA#.

**Whatever the driver does wrong** with a ring sets NEEDS_RESET (2.1.2), tells the driver by a
configuration interrupt, and is logged with the device, the queue and the mistake. Nothing more is
served until it resets the device. What `handle` raises otherwise is a bug of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from devices.bus import BusDevice, BusType
from devices.contract import DeviceHost, Region
from devices.dma import DmaFault
from devices.pci.capability import CapabilityId
from devices.pci.config import Header
from devices.pci.contract import BarInfo
from devices.pci.function import PciFunction
from devices.pci.msix import MsixLayout
from devices.pci.registers import Field
from devices.virtio.chain import Chain, RingError
from devices.virtio.common import COMMON_SIZE, CommonConfig, VirtioState, check_state
from devices.virtio.features import LIVE, NO_VECTOR, TRANSPORT, Feature, Status
from devices.virtio.granted import GrantedMemory, GrantedRing
from devices.virtio.ring import Queue, QueueState, Ring, VirtQueue
from devices.virtio.rings import open_ring
from devices.virtio.structures import (
    COMMON_CFG,
    DEVICE_CFG,
    ISR_CFG,
    NOTIFY_CFG,
    pci_window,
    structure,
)

VENDOR_ID = 0x1AF4
FIRST_DEVICE_ID = 0x1040
"""4.1.2: the PCI device id is this plus the virtio device type."""

REGISTERS_BAR, MSIX_BAR = 0, 1
ISR, DEVICE_CONFIG, DOORBELLS, REGISTERS_SIZE = 0x1000, 0x2000, 0x3000, 0x4000
DOORBELL_SIZE = 4
ISR_QUEUE, ISR_CONFIG = 1, 2

_REQUESTS_PER_TURN = 256
"""A driver that keeps adding gets the CPU back after so many."""


class VirtioDevice(PciFunction):
    """A virtio device; see the module's text for how to write one."""

    dma: ClassVar[bool] = True
    grantable: ClassVar[bool] = True
    State: ClassVar[type] = VirtioState
    state: VirtioState

    device_type: ClassVar[int]
    """Chapter 5."""
    class_code: ClassVar[int] = 0xFF0000
    """Of PCI; 0xFF0000 is "none of the defined"."""
    queues: Sequence[Queue] = ()
    """A property where it depends on options."""
    config_size: ClassVar[int] = 0
    """Bytes of the device configuration; 0 for none."""
    in_order: ClassVar[bool] = False
    """It gives requests back in the order it got them in (2.7.9)."""

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        super().__init__(host, options)
        self.virtqueues: Sequence[VirtQueue] = tuple(
            VirtQueue(index, declared, partial(self._open_ring, index))
            for index, declared in enumerate(self.queues)
        )
        self.state.queues[:] = [queue.state for queue in self.virtqueues]
        self._granted: GrantedMemory | None = None
        self._offered = int(TRANSPORT | self.features() | (Feature.IN_ORDER * self.in_order))
        self._common = CommonConfig(self, self.msix.vectors)
        self._rung: set[int] = set()
        self._left = 0
        window = self.config.capability(CapabilityId.VENDOR_SPECIFIC)
        assert window is not None
        self._window = window // 4
        self._bars_by_number: dict[int, tuple[int, BusDevice]] = {
            info.bar: (info.size, self._handler(info.bar)) for info in self._bars
        }

    # What a device says and does.

    def features(self) -> int:
        """The feature bits of its own that it offers."""
        return 0

    def accepts_features(self, features: int) -> bool:
        """Whether its own features, a subset of those offered, go together (2.2.2)."""
        return True

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        """Carry out one request; within a turn."""
        raise NotImplementedError

    def serve(self, queue: VirtQueue) -> None:
        """There may be requests in `queue`; within a turn."""
        while self.may_serve():
            chain = queue.pop()
            if chain is None:
                return
            self.handle(queue, chain)
            if not chain.held:
                queue.complete(chain)
        self.ring(queue)

    def may_serve(self) -> bool:
        """Count one more request of this turn; False if the guest should run first."""
        self._left -= 1
        return self._left >= 0

    def spend(self, requests: int) -> None:
        """Count a large request as so many more."""
        self._left -= requests

    def ring(self, queue: VirtQueue) -> None:
        """Look at `queue` in the next turn."""
        self._rung.add(queue.index)
        self.host.want_turn()

    def read_device_config(self) -> bytes:
        """The device configuration as it is now, `config_size` bytes."""
        return bytes(self.config_size)

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes to it."""

    def config_changed(self) -> None:
        """Say that the device configuration has another content now (2.5)."""
        self.state.config_changed = True
        if self.state.status & Status.DRIVER_OK:
            self._interrupt_config()

    def device_started(self) -> None:
        """The driver is ready: DRIVER_OK."""

    def device_reset(self) -> None:
        """The device is being reset: forget what the driver said."""

    @property
    def live(self) -> bool:
        """Whether requests may be served."""
        return self.state.status & LIVE == Status.DRIVER_OK and self.may_master()

    def negotiated(self, feature: int) -> bool:
        return self.state.driver_features & int(feature) != 0  # a flag's own & is slow

    # Turns.

    def turn(self) -> None:
        rung = sorted(self._rung)
        self._rung.clear()
        self._left = _REQUESTS_PER_TURN
        for index in rung:
            if not self.live:
                break
            self.guarded(self.virtqueues[index], partial(self.serve, self.virtqueues[index]))
        self.end_turn()

    def guarded(self, queue: VirtQueue, touch: Callable[[], None]) -> None:
        """Call `touch`, which uses the ring; the driver's mistakes end in NEEDS_RESET."""
        try:
            touch()
        except (RingError, DmaFault) as error:
            self._needs_reset(f"queue {queue.index} ({queue.name}): {error}")

    def end_turn(self) -> None:
        """Notify the driver of what was given back."""
        for queue in self.virtqueues:
            if queue.close():
                self._interrupt_queue(queue)

    def _open_ring(self, index: int, state: QueueState) -> Ring:
        if self._granted is not None:
            return GrantedRing(state, self._granted, index)
        return open_ring(state, self.host.memory, self.state.driver_features)

    def queue_sizes(self) -> tuple[int, ...]:
        return tuple(queue.most for queue in self.virtqueues)

    def map_grants(self, area: memoryview) -> None:
        self._granted = GrantedMemory(area, self.queue_sizes())

    def _needs_reset(self, what: str) -> None:
        self.host.log(f"the driver must reset the device: {what}")
        for queue in self.virtqueues:
            queue.forget()
        self.state.status |= int(Status.NEEDS_RESET)
        self.config_changed()

    def _ring_all(self) -> None:
        """Look at every doorbell once more."""
        if self.live:
            for queue in self.virtqueues:
                if queue.state.enabled:
                    self.ring(queue)

    # Interrupts (4.1.5.3, 4.1.5.4).

    def _interrupt_queue(self, queue: VirtQueue) -> None:
        if not self.msix.enabled:
            self.state.isr |= ISR_QUEUE
            self._follow_isr()
        elif queue.state.vector != NO_VECTOR:
            self.msix.trigger(queue.state.vector)

    def _interrupt_config(self) -> None:
        self.state.isr |= ISR_CONFIG
        if not self.msix.enabled:
            self._follow_isr()
        elif self.state.config_vector != NO_VECTOR:
            self.msix.trigger(self.state.config_vector)

    def _follow_isr(self) -> None:
        self.set_intx(bool(self.state.isr) and not self.msix.enabled)

    # `devices.virtio.common.Owner`.

    @property
    def offered(self) -> int:
        return self._offered

    def accepts(self, features: int) -> bool:
        """6.1: what does without VERSION_1 is a legacy driver, which we do not serve."""
        return bool(features & Feature.VERSION_1) and self.accepts_features(features)

    def started(self) -> None:
        self.device_started()
        self._ring_all()

    def reset(self) -> None:
        """2.4.1, 4.1.4.3.1: all but the PCI side is as after power-on."""
        for queue in self.virtqueues:
            queue.reset()
        state = self.state
        state.status = state.driver_features = state.isr = 0
        state.device_feature_select = state.driver_feature_select = state.queue_select = 0
        state.config_vector = NO_VECTOR
        self._rung.clear()
        self.device_reset()
        self._follow_isr()

    # BAR 0.

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if bar != REGISTERS_BAR:
            return
        if offset >= DOORBELLS:
            index = (offset - DOORBELLS) // DOORBELL_SIZE
            if index < len(self.virtqueues):
                self._rung.add(index)
                self.host.want_turn()
        elif offset + size <= COMMON_SIZE:
            self._common.write(offset, size, value)
        elif offset >= DEVICE_CONFIG and offset + size <= DEVICE_CONFIG + self.config_size:
            self.write_device_config(offset - DEVICE_CONFIG, size, value)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """What no register answers for reads as zero."""
        if bar != REGISTERS_BAR:
            return 0
        if offset == ISR:
            value = self.state.isr
            self.state.isr = 0
            self._follow_isr()
            return value
        if offset < ISR:
            return self._common.read(offset, size)
        if DEVICE_CONFIG <= offset < DEVICE_CONFIG + self.config_size:
            if self.state.config_changed:
                # 4.1.4.3.1: counting changes themselves could go round unseen.
                self.state.config_changed = False
                self.state.generation = (self.state.generation + 1) & 0xFF
            start = offset - DEVICE_CONFIG
            return int.from_bytes(self.read_device_config()[start : start + size], "little")
        return 0

    # PCI.

    def header(self) -> Header:
        kinds = [
            structure(COMMON_CFG, REGISTERS_BAR, 0, COMMON_SIZE),
            structure(ISR_CFG, REGISTERS_BAR, ISR, 1),
            structure(
                NOTIFY_CFG,
                REGISTERS_BAR,
                DOORBELLS,
                DOORBELL_SIZE * len(self.queues),
                Field("notify_off_multiplier", 16, 4, DOORBELL_SIZE),
            ),
        ]
        if self.config_size:
            kinds.append(structure(DEVICE_CFG, REGISTERS_BAR, DEVICE_CONFIG, self.config_size))
        return Header(
            VENDOR_ID,
            FIRST_DEVICE_ID + self.device_type,
            self.class_code,
            revision=1,
            subsystem_vendor_id=VENDOR_ID,
            subsystem_id=FIRST_DEVICE_ID + self.device_type,
            interrupt_pin=1,
            bars=(
                BarInfo(REGISTERS_BAR, 0, BusType.MMIO, REGISTERS_SIZE),
                BarInfo(MSIX_BAR, 1, BusType.MMIO, 0x1000),
            ),
            # The window is first, so that `config.capability` finds it.
            capabilities=(pci_window(), *kinds),
            msix=MsixLayout(MSIX_BAR, 0, 0x800, len(self.queues) + 1),
        )

    def regions(self) -> tuple[Region, ...]:
        registers, msix = super().regions()
        return dataclasses.replace(registers, synced=True), msix

    def map_config(self, view: memoryview, base: int, length: int) -> bool:
        """Not: a read through the window has effects."""
        return False

    def config_written(self, register: int) -> None:
        if register == self._window + 4:
            self._through_window(write=True)
        self._follow_isr()
        if register == 1:
            self._ring_all()  # the function may have become a bus master

    def read_config(self, register: int) -> int:
        if register == self._window + 4:
            self._through_window(write=False)
        return super().read_config(register)

    def _through_window(self, write: bool) -> None:
        """4.1.4.9: an access to a BAR by way of the configuration space."""
        values, window = self.config.values, self._window
        bar, offset, length = values[window + 1] & 0xFF, values[window + 2], values[window + 3]
        size, handler = self._bars_by_number.get(bar, (0, None))
        if handler is None or length not in (1, 2, 4) or offset % length or offset + length > size:
            return
        mask = (1 << 8 * length) - 1
        if write:
            handler.write(offset, length, values[window + 4] & mask)
        else:
            self.config.update(window + 4, mask, handler.read(offset, length))

    # Suspend and state.

    def wake(self) -> None:
        super().wake()
        self._ring_all()

    def validate(self, state: Any) -> None:
        check_state(state, self.virtqueues, self.offered, self.msix.vectors)

    def restored(self) -> None:
        self._rung.clear()
        for queue, saved in zip(self.virtqueues, self.state.queues, strict=True):
            queue.forget()
            queue.state = saved
