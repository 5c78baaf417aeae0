"""Linear addresses: the page walk of the guest's tables, with accessed and dirty bits.

The engine walks the tables itself for guest instructions. This walk serves what the machine does
in the guest's name: reading gates and descriptors, pushing frames, crash reports.

Covered: no paging, 32-bit (with 4 MiB pages and PSE-36), PAE, 4-level and 5-level. Protection
keys, SMEP and SMAP do not exist on this CPU (see `cpuid`).

Source: Intel SDM volume 3A, chapter 4; error codes section 4.7.
"""

from __future__ import annotations

from devices.bus import Bus
from vmm.cpu.context import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_NXE,
    Context,
)
from vmm.cpu.layout import H_LMA
from vmm.memory import GuestMemory

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 0x20, 0x40, 0x80
NO_EXECUTE = 1 << 63

PHYSICAL_BITS = 40
"""MAXPHYADDR of the engine: an entry that points higher has reserved bits set."""
ADDRESS = (1 << 52) - (1 << 12)
_RESERVED = ADDRESS & ~((1 << PHYSICAL_BITS) - 1)

_RESERVED_PAE = (1 << 63) - (1 << 52)
"""Bits that only 4- and 5-level paging leaves to software."""

E_PRESENT, E_WRITE, E_USER, E_RESERVED = 1, 2, 4, 8

_LEVELS_PAE = (30, 21, 12)
_LEVELS_4 = (39, 30, 21, 12)
_LEVELS_5 = (48, 39, 30, 21, 12)


class Fault(Exception):
    """An exception that the CPU meets while we act for it.

    Attributes:
        vector: 0..31.
        code: the error code; None if the vector has none.
        address: CR2, for a page fault.
    """

    def __init__(self, vector: int, code: int | None = None, address: int = 0) -> None:
        super().__init__(vector, code, address)
        self.vector = vector
        self.code = code
        self.address = address


class Physical:
    """Guest-physical memory as the CPU's own accesses see it: RAM, else the MMIO bus.

    Attributes:
        low, longs: the first RAM region, as bytes and as 64-bit words.
    """

    def __init__(self, memory: GuestMemory, mmio: Bus) -> None:
        self._mmio = mmio
        low = memory.regions[0]
        self.low = low.view
        self._low_size = low.size
        self.longs = low.view.cast("Q")
        self._regions = memory.regions

    def close(self) -> None:
        """Let go of the memory."""
        self.longs.release()

    def window(self, address: int, length: int) -> tuple[memoryview, int] | None:
        """The RAM that holds the range, and the offset in it; None if it is not wholly RAM."""
        end = address + length
        if end <= self._low_size:
            return self.low, address
        for region in self._regions:
            if region.start <= address and end <= region.end:
                return region.view, address - region.start
        return None

    def long(self, address: int) -> int:
        """An aligned 64-bit word."""
        if address < self._low_size:
            return self.longs[address >> 3]
        return self.load(address, 8)

    def load(self, address: int, size: int) -> int:
        """`size` is 1..8."""
        place = self.window(address, size)
        if place is None:
            return self._mmio.read(address, size)
        view, offset = place
        return int.from_bytes(view[offset : offset + size], "little")

    def store(self, address: int, size: int, value: int) -> None:
        place = self.window(address, size)
        if place is None:
            self._mmio.write(address, size, value)
        else:
            view, offset = place
            view[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, address: int, length: int) -> bytes:
        """Any length within one page."""
        place = self.window(address, length)
        if place is not None:
            view, offset = place
            return bytes(view[offset : offset + length])
        return b"".join(
            self.load(address + at, min(8, length - at)).to_bytes(min(8, length - at), "little")
            for at in range(0, length, 8)
        )

    def write(self, address: int, data: bytes) -> None:
        place = self.window(address, len(data))
        if place is not None:
            view, offset = place
            view[offset : offset + len(data)] = data
            return
        for at in range(0, len(data), 8):
            part = data[at : at + 8]
            self._mmio.write(address + at, len(part), int.from_bytes(part, "little"))


class Linear:
    """The linear address space of a saved context.

    `user` in the methods below asks for the rights of CPL 3; the default is what the CPU uses for
    descriptor tables and for the stacks of more privileged code.
    """

    def __init__(self, context: Context, physical: Physical) -> None:
        self._context = context
        self._longs = context.longs
        self._at = context.at
        self.physical = physical

    def canonical(self, linear: int) -> bool:
        """Whether long mode accepts this address; always true outside it."""
        if not self._context.hidden & H_LMA:
            return True
        bits = 57 if self._context.control(4) & CR4_LA57 else 48
        return linear >> (bits - 1) in (0, (1 << (65 - bits)) - 1)

    def translate(self, linear: int, write: bool = False, user: bool = False) -> int:
        """The physical address; sets accessed and, for a write, dirty bits.

        Raises:
            Fault: a page fault, or #GP(0) for an address that is not canonical.
        """
        longs, cr = self._longs, self._at.cr
        cr0 = longs[cr]
        if not cr0 & CR0_PG:
            return linear & 0xFFFF_FFFF
        if not longs[cr + 4] & CR4_PAE:
            return self._walk32(linear & 0xFFFF_FFFF, write, user)
        if not self._context.hidden & H_LMA:
            linear &= 0xFFFF_FFFF
            return self._walk64(linear, longs[cr + 3] & 0xFFFF_FFE0, _LEVELS_PAE, write, user)
        if not self.canonical(linear):
            raise Fault(13, 0)
        levels = _LEVELS_5 if longs[cr + 4] & CR4_LA57 else _LEVELS_4
        return self._walk64(linear, longs[cr + 3] & ADDRESS, levels, write, user)

    def _walk64(
        self, linear: int, table: int, levels: tuple[int, ...], write: bool, user: bool
    ) -> int:
        physical = self.physical
        reserved = _RESERVED if self._longs[self._at.efer] & EFER_NXE else _RESERVED | NO_EXECUTE
        if levels is _LEVELS_PAE:
            reserved |= _RESERVED_PAE
        rights = WRITABLE | USER
        for shift in levels:
            place = table + (linear >> shift & 0x1FF) * 8
            entry = physical.long(place)
            if not entry & PRESENT:
                raise self._fault(linear, write, user, 0)
            if levels is _LEVELS_PAE and shift == 30:
                if entry & (reserved | NO_EXECUTE):
                    raise self._fault(linear, write, user, E_PRESENT | E_RESERVED)
                table = entry & ADDRESS  # a PDPTE has neither rights nor an accessed bit
                continue
            if entry & reserved or (entry & LARGE and shift > 30):
                raise self._fault(linear, write, user, E_PRESENT | E_RESERVED)
            rights &= entry
            if shift == 12 or entry & LARGE:
                offset = (1 << shift) - 1
                # Below a large page's address, bit 12 is its PAT bit; the others must be 0.
                if entry & ADDRESS & offset & ~0x1000 and shift > 12:
                    raise self._fault(linear, write, user, E_PRESENT | E_RESERVED)
                self._check(linear, rights, write, user)
                marked = entry | (ACCESSED | DIRTY if write else ACCESSED)
                if marked != entry:
                    physical.store(place, 8, marked)
                return entry & ADDRESS & ~offset | linear & offset
            if not entry & ACCESSED:
                physical.store(place, 8, entry | ACCESSED)
            table = entry & ADDRESS
        raise AssertionError("a walk ends at its last level")

    def _walk32(self, linear: int, write: bool, user: bool) -> int:
        physical = self.physical
        place = (self._longs[self._at.cr + 3] & 0xFFFF_F000) + (linear >> 22) * 4
        entry = physical.load(place, 4)
        if not entry & PRESENT:
            raise self._fault(linear, write, user, 0)
        large = entry & LARGE and self._longs[self._at.cr + 4] & CR4_PSE
        rights = entry
        if not large:
            if not entry & ACCESSED:
                physical.store(place, 4, entry | ACCESSED)
            place = (entry & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4
            entry = physical.load(place, 4)
            if not entry & PRESENT:
                raise self._fault(linear, write, user, 0)
            rights &= entry
        elif entry & 1 << 21:
            raise self._fault(linear, write, user, E_PRESENT | E_RESERVED)
        self._check(linear, rights, write, user)
        marked = entry | (ACCESSED | DIRTY if write else ACCESSED)
        if marked != entry:
            physical.store(place, 4, marked)
        if large:  # PSE-36: bits 13-20 are address bits 32-39
            return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32 | linear & 0x3F_FFFF
        return entry & 0xFFFF_F000 | linear & 0xFFF

    def _check(self, linear: int, rights: int, write: bool, user: bool) -> None:
        if user and not rights & USER:
            raise self._fault(linear, write, user, E_PRESENT)
        if write and not rights & WRITABLE and (user or self._longs[self._at.cr] & CR0_WP):
            raise self._fault(linear, write, user, E_PRESENT)

    @staticmethod
    def _fault(linear: int, write: bool, user: bool, code: int) -> Fault:
        code |= (E_WRITE if write else 0) | (E_USER if user else 0)
        return Fault(14, code, linear)

    # Bytes.

    def read(self, linear: int, length: int, user: bool = False) -> bytes:
        """Bytes that may cross pages.

        Raises:
            Fault: as `translate`.
        """
        room = 0x1000 - (linear & 0xFFF)
        if length <= room:
            return self.physical.read(self.translate(linear, False, user), length)
        head = self.physical.read(self.translate(linear, False, user), room)
        return head + self.read(self._step(linear, room), length - room, user)

    def write(self, linear: int, data: bytes, user: bool = False) -> None:
        """Bytes that may cross pages; nothing is written if any of them cannot be.

        Raises:
            Fault: as `translate`.
        """
        parts = []
        while data:
            room = 0x1000 - (linear & 0xFFF)
            parts.append((self.translate(linear, True, user), data[:room]))
            data = data[room:]
            linear = self._step(linear, room)
        for place, part in parts:
            self.physical.write(place, part)

    def place_of(self, linear: int) -> int | None:
        """The physical address, None where nothing is mapped."""
        try:
            return self.translate(linear)
        except Fault:
            return None

    def peek(self, linear: int, length: int) -> bytes:
        """RAM at a linear address, for reports: as many of the bytes as are mapped."""
        data = b""
        while len(data) < length:
            at = linear + len(data) & (1 << 64) - 1
            part = min(length - len(data), 0x1000 - (at & 0xFFF))
            place = self.place_of(at)
            if place is None or self.physical.window(place, part) is None:
                break
            data += self.physical.read(place, part)
        return data

    def number(self, linear: int, size: int) -> int:
        """A little-endian integer."""
        return int.from_bytes(self.read(linear, size), "little")

    def _step(self, linear: int, length: int) -> int:
        return linear + length & ((1 << 64) - 1 if self._context.hidden & H_LMA else 0xFFFF_FFFF)
