"""Guest RAM: one memfd, mapped shared, seen as one or more regions of the physical space.

Layout: RAM fills the space from 0 up to at most `LOW_LIMIT` (3 GiB); what is left starts at 4 GiB.
The gap between holds MMIO, as on a PC, and at its very end the firmware ROM of a machine that has
one. A ROM is RAM that a guest can change (a firmware's loader writes it anew); its bytes follow
those of RAM in the memfd.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

from devices.dma import DmaMemory, Wrote
from devices.errors import Subject, UserError
from proxy.device import GuestRam
from proxy.shape import MemoryRegion

PAGE = 4096
LOW_LIMIT = 0xC000_0000
HIGH_START = 1 << 32
MAX_SIZE = 64 << 30
MAX_ROM = 16 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class AddressError(ValueError):
    """A guest-physical range that is not wholly RAM."""


@dataclass(frozen=True, slots=True)
class RamRegion:
    """One stretch of RAM.

    Attributes:
        start: guest-physical address.
        size: in bytes, a multiple of 4 KiB.
        offset: where it begins in the memfd.
        view: the bytes themselves, writable.
        address: host virtual address of the first byte, for the engine.
    """

    start: int
    size: int
    offset: int
    view: memoryview
    address: int

    @property
    def end(self) -> int:
        return self.start + self.size


class GuestMemory:
    """The RAM of one machine. Close it only after the engine that maps it is gone.

    Args:
        size: of RAM, in bytes; a multiple of 4 KiB, 1 MiB to 64 GiB.
        rom: bytes of firmware ROM that end at 4 GiB; a multiple of 4 KiB, at most 16 MiB.

    Attributes:
        regions: all of them by ascending address, for the engine.
        ram: those that a guest may take for RAM.
        rom: the ROM's, if there is one.
        file_size: bytes of the memfd: RAM, then ROM.

    Raises:
        UserError: a size that cannot be.
    """

    def __init__(self, size: int, rom: int = 0) -> None:
        if size % PAGE or not 1 << 20 <= size <= MAX_SIZE:
            raise UserError(
                f"guest memory of {size} bytes: give a multiple of 4K from 1M to {MAX_SIZE >> 30}G",
                Subject("mem"),
            )
        if rom % PAGE or not 0 <= rom <= MAX_ROM:
            raise UserError(
                f"a firmware ROM of {rom} bytes: it must be a multiple of 4K and at most "
                f"{MAX_ROM >> 20}M",
                Subject("firmware"),
            )
        self.size = size
        self.file_size = total = size + rom
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, total)
            # A device that got it must not be able to take it from under the machine.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self._map = mmap.mmap(self.fd, total)
        except (OSError, OverflowError) as error:
            os.close(self.fd)
            problem = f"guest memory of {size} bytes cannot be had: {error}"
            raise UserError(problem, Subject("mem")) from error
        # A fork must not take guest memory along: a device gets it only by keep_fds.
        self._map.madvise(mmap.MADV_DONTFORK)
        self.view = memoryview(self._map)
        self._anchor: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * total).from_buffer(
            self._map
        )
        host = ctypes.addressof(self._anchor)
        low = min(size, LOW_LIMIT)
        self.ram = [RamRegion(0, low, 0, self.view[:low], host)]
        if size > low:
            view = self.view[low:size]
            self.ram.append(RamRegion(HIGH_START, size - low, low, view, host + low))
        self.rom: RamRegion | None = None
        self.regions = list(self.ram)
        if rom:
            view = self.view[size:total]
            self.rom = RamRegion(HIGH_START - rom, rom, size, view, host + size)
            self.regions.insert(1, self.rom)

    def close(self) -> None:
        """Unmap and release; harmless when repeated."""
        if self.fd < 0:
            return
        for region in self.regions:
            region.view.release()
        self.regions = []
        self.ram = []
        self.rom = None
        self._anchor = None
        self.view.release()
        # A traceback that is being handled may still hold a view; the mapping then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self.fd = -1

    def for_devices(self) -> GuestRam:
        """What a device process with DMA may map: the RAM, and no ROM."""
        regions = tuple(MemoryRegion(r.start, r.size, r.offset) for r in self.ram)
        return GuestRam(self.fd, regions)

    def for_grants(self, wrote: Wrote) -> DmaMemory:
        """The RAM as the machine itself reads and writes it for a device: see `DmaMemory`."""
        memory = DmaMemory(wrote)
        memory.map([(region.start, region.view) for region in self.ram])
        return memory

    def window(self, address: int, length: int) -> memoryview:
        """The bytes of a guest-physical range, writable in place.

        Raises:
            AddressError: some of it is not RAM, or it spans two regions.
        """
        for region in self.regions:
            if region.start <= address and address + length <= region.end and length >= 0:
                offset = address - region.start
                return region.view[offset : offset + length]
        raise AddressError(f"{address:#x}+{length:#x} is outside RAM")

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.window(address, length))

    def write(self, address: int, data: bytes | memoryview) -> None:
        self.window(address, len(data))[:] = data

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of the stretches of the memfd that were ever touched."""
        position = 0
        while position < self.file_size:
            try:
                begin = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(self.fd, begin, os.SEEK_HOLE)
            yield begin, end - begin
            position = end
