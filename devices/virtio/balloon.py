"""Memory balloon (5.5): the guest gives pages away, and they really go back to the host.

A page in the balloon is punched out of the file that guest memory is; it reads as zeros until the
guest writes to it again. The guest may take pages back without telling (MUST_TELL_HOST is not
offered), since that does no harm here. Free page reporting gives back what the guest does not use
without the balloon being asked for anything.

The option `pages` is the size wanted, also while it runs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from devices import host_io
from devices.contract import U32, DeviceHost
from devices.spans import PAGE_SHIFT
from devices.virtio.chain import Chain
from devices.virtio.common import VirtioState
from devices.virtio.ring import Queue, VirtQueue
from devices.virtio.transport import VirtioDevice

F_DEFLATE_ON_OOM, F_REPORTING = 1 << 2, 1 << 5
"""5.5.3. The reporting queue comes after those that exist only with features we do not offer, and
a driver numbers queues without gaps: it is the third (5.5.2)."""
INFLATE, DEFLATE, REPORTING = 0, 1, 2
PAGE = 1 << PAGE_SHIFT

_CONFIG = struct.Struct("<IIII")  # wanted, actual, free page hint, poison
_ACTUAL = 4
_MOST_PAGES = 1 << 16


@dataclass
class BalloonOptions:
    """A balloon.

    Attributes:
        pages: of 4 KiB, that the guest is asked to give away; can be changed while it runs.
    """

    pages: U32 = 0


@dataclass
class BalloonState(VirtioState):
    """`wanted`: pages that the guest is asked for; `actual`: that it says it gave."""

    wanted: U32 = 0
    actual: U32 = 0


class Balloon(VirtioDevice):
    model: ClassVar[str] = "balloon"
    summary: ClassVar[str] = "virtio memory balloon: pages=N are given back to the host"
    device_type: ClassVar[int] = 5
    config_size: ClassVar[int] = _CONFIG.size
    queues = (Queue("inflate", 128), Queue("deflate", 128), Queue("reporting", 128))
    in_order: ClassVar[bool] = True
    grantable: ClassVar[bool] = False
    """The pages that it gives back lie in no request."""
    Options = BalloonOptions
    State = BalloonState
    options: BalloonOptions
    state: BalloonState

    def __init__(self, host: DeviceHost, options: BalloonOptions | None = None) -> None:
        super().__init__(host, options)
        self.state.wanted = self.options.pages

    def features(self) -> int:
        return F_DEFLATE_ON_OOM | F_REPORTING

    def read_device_config(self) -> bytes:
        return _CONFIG.pack(self.state.wanted, self.state.actual, 0, 0)

    def write_device_config(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (_ACTUAL, 4):
            self.state.actual = value

    adjustable: ClassVar[frozenset[str]] = frozenset({"pages"})

    def adjust(self, **wanted: int) -> None:
        self.ask(wanted.get("pages", self.state.wanted))

    def ask(self, pages: int) -> None:
        """Ask the guest for a balloon of this many pages."""
        self.state.wanted = pages
        self.config_changed()

    def device_reset(self) -> None:
        self.state.actual = 0

    def handle(self, queue: VirtQueue, chain: Chain) -> None:
        if queue.index == INFLATE:
            numbers = chain.read(4 * _MOST_PAGES)
            self.spend(len(numbers) >> 10)
            for first, count in _runs(numbers):
                self._release(first << PAGE_SHIFT, count << PAGE_SHIFT)
        elif queue.index == REPORTING:
            for address, length in chain.spans():
                self._release(address, length)

    def _release(self, address: int, length: int) -> None:
        """5.5.6.1: a page that is not RAM is the driver's mistake."""
        end = (address + length) & -PAGE
        address = (address + PAGE - 1) & -PAGE
        if address >= end:
            return
        view = self.host.memory.window(address, end - address)
        if not host_io.release(view):
            view[:] = bytes(len(view))  # memory of another kind: at least the same content
        self.host.memory.mark(address, end - address)


def _runs(numbers: bytes) -> list[tuple[int, int]]:
    """Page numbers, little-endian, as (first, how many) of those in a row."""
    runs: list[tuple[int, int]] = []
    for (number,) in struct.iter_unpack("<I", numbers[: len(numbers) & ~3]):
        if runs and runs[-1][0] + runs[-1][1] == number:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        elif runs and number == runs[-1][0] - 1:  # Linux hands them out from the top
            runs[-1] = number, runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return runs
