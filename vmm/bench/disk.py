"""A disk's requests with guest memory shared and with grants: what ``dma=granted`` costs.

The guest's CPU does not run: a driver of our own writes requests into guest memory and rings the
doorbell through the bus. So a figure is the device's turn alone, from the doorbell to completion.
"""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Self

from devices.bus import BusType
from devices.virtio.features import Feature, Status
from devices.virtio.transport import DOORBELLS
from vmm import post
from vmm.config import DeviceConfig, DmaMode
from vmm.machine import Machine

IMAGE = 64 << 20
BLOCK = 4096
STREAM = 128 << 10
AT_ONCE = 4
"""Requests of `STREAM` bytes for each doorbell, as Linux reads ahead."""

_QUEUE_SIZE = 64
_DESC, _AVAIL, _USED = 0x10000, 0x11000, 0x12000
_HEADERS, _STATUSES, _DATA = 0x13000, 0x14000, 0x100000
_NEXT, _WRITE = 1, 2
_COMMAND, _BAR0 = 1, 4
_MEMORY_AND_MASTER = 6


class Disk:
    """One disk and its driver."""

    def __init__(self, image: Path, dma: DmaMode) -> None:
        options = {"path": str(image), "readonly": True}
        disk = DeviceConfig("disk", "blk", options, dma=dma)
        self._machine = machine = Machine(memory="16M", devices=(disk,))
        try:
            self._start()
        except BaseException:
            machine.close()
            raise

    def _start(self) -> None:
        parts = self._machine.parts
        post.set_up_pci(parts)
        slot = parts.wiring.attached["disk"].slot
        assert slot is not None
        number = slot.number
        parts.pci.write_config(number, _COMMAND, 0, bytes((_MEMORY_AND_MASTER,)))
        self._base = parts.pci.read_config(number, _BAR0) & ~0xF
        self._write = parts.buses[BusType.MMIO].write
        self._memory = parts.memory
        ready = Status.ACKNOWLEDGE | Status.DRIVER
        features = int(Feature.VERSION_1)
        for offset, size, value in (
            (0x14, 1, ready),
            (0x08, 4, 1),
            (0x0C, 4, features >> 32),
            (0x14, 1, ready | Status.FEATURES_OK),
            (0x18, 2, _QUEUE_SIZE),
            (0x20, 8, _DESC),
            (0x28, 8, _AVAIL),
            (0x30, 8, _USED),
            (0x1C, 2, 1),
            (0x14, 1, ready | Status.FEATURES_OK | Status.DRIVER_OK),
        ):
            self._write(self._base + offset, size, int(value))
        self._index = 0

    def read(self, length: int, sectors: list[int]) -> float:
        """Seconds that reads of `length` bytes from these sectors take after one doorbell."""
        memory = self._memory
        for n, sector in enumerate(sectors):
            first = 3 * n
            memory.write(_HEADERS + 16 * n, struct.pack("<IIQ", 0, 0, sector))
            for descriptor in (
                (_HEADERS + 16 * n, 16, _NEXT, first + 1),
                (_DATA + n * length, length, _NEXT | _WRITE, first + 2),
                (_STATUSES + n, 1, _WRITE, 0),
            ):
                memory.write(_DESC + 16 * first, struct.pack("<QIHH", *descriptor))
                first += 1
            slot = (self._index + n) % _QUEUE_SIZE
            memory.write(_AVAIL + 4 + 2 * slot, struct.pack("<H", 3 * n))
        self._index = (self._index + len(sectors)) & 0xFFFF
        memory.write(_AVAIL + 2, struct.pack("<H", self._index))
        began = perf_counter()
        self._write(self._base + DOORBELLS, 2, 0)
        took = perf_counter() - began
        (used,) = struct.unpack("<H", memory.read(_USED + 2, 2))
        assert used == self._index, "the disk did not answer in its turn"
        assert not any(memory.read(_STATUSES, len(sectors))), "the disk failed"
        return took

    def close(self) -> None:
        self._machine.close()


class DiskBench:
    """The same disk twice.

    Args:
        count: small requests in each round.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._place = tempfile.TemporaryDirectory(prefix="vmm-bench-")
        image = Path(self._place.name) / "disk.img"
        with open(image, "wb") as file:
            file.write(random.Random(1).randbytes(1 << 20) * (IMAGE >> 20))
        self._disks: dict[str, Disk] = {}
        try:
            for dma in DmaMode:
                self._disks[dma] = Disk(image, dma)
        except BaseException:
            self.close()
            raise

    def round(self) -> dict[str, float]:
        """Microseconds for a small read, MiB/s of a stream, for each way; and their ratios."""
        chance = random.Random(2)
        sectors = [chance.randrange(IMAGE // BLOCK) * (BLOCK // 512) for _ in range(self._count)]
        starts = range(0, IMAGE // 512, AT_ONCE * STREAM // 512)
        read: dict[str, list[float]] = {dma: [] for dma in self._disks}
        stream: dict[str, list[float]] = {dma: [] for dma in self._disks}
        # By turns, and medians: hosts are noisy.
        for sector in sectors:
            for dma, disk in self._disks.items():
                read[dma].append(disk.read(BLOCK, [sector]))
        for start in starts:
            for dma, disk in self._disks.items():
                places = [start + n * STREAM // 512 for n in range(AT_ONCE)]
                stream[dma].append(disk.read(STREAM, places))
        figures = {f"{dma}_read": median(read[dma]) * 1e6 for dma in read}
        megabytes = AT_ONCE * STREAM / (1 << 20)
        figures |= {f"{dma}_stream": megabytes / median(stream[dma]) for dma in stream}
        for kind in ("read", "stream"):
            figures[f"ratio_{kind}"] = figures[f"granted_{kind}"] / figures[f"shared_{kind}"]
        return figures

    def close(self) -> None:
        for disk in self._disks.values():
            disk.close()
        self._place.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
