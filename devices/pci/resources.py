"""Where BARs go when there is no firmware: a first fit, largest first.

Largest first wastes nothing to alignment, since every size is a power of two and BARs are aligned
to their size (PCI 3.0, 6.2.5.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from devices.bus import Bus, Range
from devices.pci.config import BAR0, COMMAND, INTERRUPT, Command, decoded_spaces
from devices.pci.contract import BarInfo
from devices.pci.intx import PINS, Slot
from devices.pci.mapping import Seat
from devices.pci.registers import DWORD


class Root(Protocol):
    """What assigning needs of the root: what a guest has too, and the wiring of the pins."""

    def read_config(self, number: int, register: int) -> int: ...

    def write_config(self, number: int, register: int, offset: int, data: bytes) -> None: ...

    def irq_for(self, slot: Slot, pin: int) -> int: ...


def assign(
    root: Root, seats: Sequence[Seat], windows: Sequence[tuple[Bus, Range]], decode: bool
) -> list[str]:
    """Place all BARs, preset interrupt lines; see `PciRoot.assign_resources`."""
    homeless = []
    for seat in seats:
        _set_decode(root, seat, False)
    for bus, window in windows:
        wanted = [(seat, info) for seat in seats for info in seat.bars if info.bus is bus.kind]
        taken = [entry.range for entry in bus]
        places = first_fit([info.size for _, info in wanted], window, taken)
        for (seat, info), place in zip(wanted, places, strict=True):
            _write_bar(root, seat, info, place or 0)
            if place is None:
                homeless.append(
                    f"{seat.slot} '{seat.owner}' BAR {info.bar}: no {info.size:#x} bytes are "
                    f"free in the {bus.kind} window {window}"
                )
    for seat in seats:
        pin = root.read_config(seat.slot.number, INTERRUPT) >> 8 & 0xFF
        if 1 <= pin <= PINS:
            line = root.irq_for(seat.slot, pin - 1)
            root.write_config(seat.slot.number, INTERRUPT, 0, bytes([line]))
        if decode:
            _set_decode(root, seat, True)
    return homeless


def first_fit(sizes: Sequence[int], window: Range, taken: Iterable[Range]) -> list[int | None]:
    """An address in `window` for each size, aligned to it, clear of `taken` and of each other.

    Args:
        sizes: powers of two, in bytes.
        window: where to look.
        taken: what is there already.

    Returns:
        One address for each size, in the order of `sizes`; None where nothing was left.
    """
    used = [other for other in taken if other.overlaps(window)]
    found: list[int | None] = [None] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        address = _align(window.start, size)
        while address + size <= window.end:
            wanted = Range(address, size)
            blocker = next((other for other in used if other.overlaps(wanted)), None)
            if blocker is None:
                found[index] = address
                used.append(wanted)
                break
            address = _align(blocker.end, size)
    return found


def _align(address: int, size: int) -> int:
    return (address + size - 1) & ~(size - 1)


def _set_decode(root: Root, seat: Seat, on: bool) -> None:
    number, spaces = seat.slot.number, decoded_spaces(seat.bars)
    if spaces:
        both = int(Command.IO_SPACE | Command.MEMORY_SPACE)
        command = root.read_config(number, COMMAND) & 0xFFFF & ~both
        data = (command | (spaces if on else 0)).to_bytes(2, "little")
        root.write_config(number, COMMAND, 0, data)


def _write_bar(root: Root, seat: Seat, info: BarInfo, address: int) -> None:
    for distance in range(2 if info.is_64bit else 1):
        part = address >> 32 * distance & DWORD
        register = BAR0 + info.bar + distance
        root.write_config(seat.slot.number, register, 0, part.to_bytes(4, "little"))
