"""Where BARs and windows go when there is no firmware: a first fit, largest first, bus by bus.

Largest first wastes nothing to alignment, since every size is a power of two and BARs are aligned
to their size (PCI 3.0, 6.2.5.1). A bridge's window is an entry among the BARs of its bus, as large
as what is behind it needs; prefetchable memory behind it has a window of its own (PCI-to-PCI Bridge
1.2, 3.2.5.9), below 4 GiB as everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from devices.bus import Bus, BusType, Range
from devices.pci import bridge
from devices.pci.config import INTERRUPT
from devices.pci.contract import BarInfo
from devices.pci.decode import COMMAND, DECODES, bar_register, decoded_spaces
from devices.pci.intx import PINS, Slot
from devices.pci.mapping import Seat
from devices.pci.registers import DWORD
from devices.pci.topology import Topology

_GRANULE = {BusType.PIO: bridge.IO_GRANULE, BusType.MMIO: bridge.MEMORY_GRANULE}
_WINDOWS = {BusType.PIO: (False,), BusType.MMIO: (False, True)}
"""The windows of a bridge on each bus: whether they are for prefetchable memory."""
_FAR = Range(1 << 40, 1 << 40)
"""Room for trying how large a window must be."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A BAR (`info`) or a window of a bridge (None): that for prefetchable memory, or another."""

    seat: Seat
    size: int
    align: int
    info: BarInfo | None
    prefetchable: bool = False


class Assignment:
    """Does once what firmware does; see `PciRoot.assign_resources`.

    Args:
        write: writes configuration space as the guest would (seat, dword, offset, data).
        irq_for: the wiring of the pins.
    """

    def __init__(
        self,
        topology: Topology,
        write: Callable[[Seat, int, int, bytes], None],
        irq_for: Callable[[Slot, int], int],
    ) -> None:
        self._topology, self._write, self._irq_for = topology, write, irq_for
        self._homeless: list[str] = []

    def run(self, windows: Sequence[tuple[Bus, Range]], decode: bool) -> list[str]:
        """Place all BARs, number the buses, preset interrupt lines; what found no place."""
        seats = [seat for seat in self._topology.in_order() if not seat.failed]
        for seat in seats:
            self._set_decode(seat, False)
        self._number(0, 0)
        for bus, window in windows:
            of_both = _WINDOWS[bus.kind]
            self._fill(0, bus.kind, of_both, window, [entry.range for entry in bus])
        for seat in seats:
            pin = seat.function.read_config(INTERRUPT) >> 8 & 0xFF
            if 1 <= pin <= PINS:
                line = self._irq_for(seat.slot, pin - 1)
                self._write(seat, INTERRUPT, 0, bytes([line]))
            if decode:
                self._set_decode(seat, True)
        return self._homeless

    def _number(self, bus: int, number: int) -> int:
        """Number the buses behind `bus`, which is `number`; the highest number used."""
        last = number
        for seat in self._topology.on_bus(bus):
            if seat.is_bridge and not seat.failed and last < 255:
                secondary = last + 1
                self._write(seat, bridge.BUSES, 0, bytes((number, secondary, 255)))
                last = self._number(seat.behind, secondary)
                self._write(seat, bridge.BUSES, 2, bytes((last,)))
        return last

    def _wanted(self, bus: int, kind: BusType, sorts: Sequence[bool]) -> list[_Wanted]:
        """What is to be placed on a bus: of memory what is not prefetchable, what is, or both."""
        found = []
        for seat in self._topology.on_bus(bus):
            found += [
                _Wanted(seat, i.size, i.size, i)
                for i in seat.bars
                if i.bus is kind and i.prefetchable in sorts
            ]
            for sort in sorts if seat.is_bridge else ():
                behind = self._wanted(seat.behind, kind, (sort,))
                if not behind:
                    continue
                granule = _GRANULE[kind]
                align = max(granule, *(each.align for each in behind))
                places = _places(behind, _FAR, ())
                ends = [p + each.size for p, each in zip(places, behind, strict=True) if p]
                size = -((_FAR.start - max(ends)) // granule) * granule
                found.append(_Wanted(seat, size, align, None, sort))
        return [each for each in found if not each.seat.failed]

    def _fill(
        self,
        bus: int,
        kind: BusType,
        sorts: Sequence[bool],
        window: Range | None,
        taken: list[Range],
    ) -> None:
        """Place what is on `bus` in `window`, and what is behind that in its windows."""
        wanted = self._wanted(bus, kind, sorts)
        nowhere: list[int | None] = [None] * len(wanted)
        places = nowhere if window is None else _places(wanted, window, taken)
        open_windows: dict[tuple[int, bool], Range] = {}
        for each, place in zip(wanted, places, strict=True):
            what = "window" if each.info is None else f"BAR {each.info.bar}"
            if each.info is not None:
                self._write_bar(each.seat, each.info, place or 0)
            elif place is not None:
                open_windows[each.seat.behind, each.prefetchable] = Range(place, each.size)
            if place is None:
                where = "of its bridge" if window is None else f"{window}"
                self._homeless.append(
                    f"{each.seat.slot} '{each.seat.owner}' {what}: no {each.size:#x} bytes are "
                    f"free in the {kind} window {where}"
                )
        for seat in self._topology.on_bus(bus):
            for sort in sorts if seat.is_bridge and not seat.failed else ():
                behind = open_windows.get((seat.behind, sort))
                for register, data in bridge.window_dwords(kind, sort, behind):
                    self._write(seat, register, 0, data)
                self._fill(seat.behind, kind, (sort,), behind, [])

    def _set_decode(self, seat: Seat, on: bool) -> None:
        spaces = bridge.SPACES if seat.is_bridge else decoded_spaces(seat.bars)
        if spaces:
            both = DECODES[BusType.PIO] | DECODES[BusType.MMIO]
            command = seat.function.read_config(COMMAND) & 0xFFFF & ~both
            data = (command | (spaces if on else 0)).to_bytes(2, "little")
            self._write(seat, COMMAND, 0, data)

    def _write_bar(self, seat: Seat, info: BarInfo, address: int) -> None:
        for distance in range(2 if info.is_64bit else 1):
            part = address >> 32 * distance & DWORD
            register = bar_register(info.bar) + distance
            self._write(seat, register, 0, part.to_bytes(4, "little"))


def _places(wanted: Sequence[_Wanted], window: Range, taken: Iterable[Range]) -> list[int | None]:
    aligns = [each.align for each in wanted]
    return first_fit([each.size for each in wanted], window, taken, aligns)


def first_fit(
    sizes: Sequence[int],
    window: Range,
    taken: Iterable[Range],
    aligns: Sequence[int] | None = None,
) -> list[int | None]:
    """An address in `window` for each size, aligned to it, clear of `taken` and of each other.

    Args:
        sizes: in bytes; powers of two unless there are `aligns`.
        window: where to look.
        taken: what is there already.
        aligns: the alignment of each, a power of two; that of its size by default.

    Returns:
        One address for each size, in the order of `sizes`; None where nothing was left.
    """
    used = [other for other in taken if other.overlaps(window)]
    found: list[int | None] = [None] * len(sizes)
    aligns = sizes if aligns is None else aligns
    for index in sorted(range(len(sizes)), key=lambda i: (-aligns[i], -sizes[i])):
        size, align = sizes[index], aligns[index]
        address = _align(window.start, align)
        while address + size <= window.end:
            wanted = Range(address, size)
            blocker = next((other for other in used if other.overlaps(wanted)), None)
            if blocker is None:
                found[index] = address
                used.append(wanted)
                break
            address = _align(blocker.end, align)
    return found


def _align(address: int, size: int) -> int:
    return (address + size - 1) & ~(size - 1)
