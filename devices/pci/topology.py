"""What is behind which bridge: the way of a configuration access, an address, a pin, a message.

Seats are known by `Slot`s that never change: bus 0 is the root's, and each bridge gets the next
number for the bus behind it when it is plugged in. What a *guest* calls that bus is in the bridge's
secondary bus number, which the guest may write at any time, so the way from one to the other is
worked out anew whenever it does.

Source: PCI-to-PCI Bridge Architecture Specification 1.2: chapter 3 (what the registers do), 9.1
(interrupt routing on add-in cards).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from devices.bus import BusType, Range
from devices.pci import bridge
from devices.pci.intx import Slot
from devices.pci.mapping import FunctionState, Seat


class Topology:
    """The seats of one root.

    Attributes:
        routes: the seat that answers to a function number of the guest's.
    """

    def __init__(self) -> None:
        self.seats: dict[int, Seat] = {}
        """By `Slot.number`."""
        self.routes: dict[int, Seat] = {}
        self._bridges: dict[int, Seat] = {}

    def add(self, seat: Seat) -> None:
        """Plug in.

        Raises:
            ValueError: the slot does not exist or is taken, or has no function 0 yet.
        """
        slot = seat.slot
        if not (0 <= slot.device < 32 and 0 <= slot.function < 8) or (
            slot.bus and slot.bus not in self._bridges
        ):
            raise ValueError(f"there is no slot {slot} on this root")
        if slot.number in self.seats:
            raise ValueError(f"slot {slot} is taken by '{self.seats[slot.number].owner}'")
        if slot.function and slot._replace(function=0).number not in self.seats:
            raise ValueError(f"slot {slot} needs a function 0 beside it (PCI 3.0, 3.2.2.3.4)")
        if seat.is_bridge:
            seat.behind = max(self._bridges, default=0) + 1
            self._bridges[seat.behind] = seat
        self.seats[slot.number] = seat
        self._mark_neighbours(slot)
        self.reroute()

    def remove(self, slot: Slot) -> Seat | None:
        """Unplug; what was there, if anything. What is behind a bridge stays, cut off."""
        seat = self.seats.pop(slot.number, None)
        if seat is not None:
            self._bridges.pop(seat.behind, None)
            self._mark_neighbours(slot)
            self.reroute()
        return seat

    def in_order(self) -> list[Seat]:
        """All seats, by slot."""
        return [self.seats[number] for number in sorted(self.seats)]

    def check(self, functions: Mapping[str, FunctionState], removed: Sequence[str]) -> None:
        """See whether saved states can be those of the seats.

        Args:
            functions: by slot.
            removed: slots that were there at the start and are not any more.

        Raises:
            ValueError: other functions are plugged in here, or a state does not fit.
        """
        here = {str(seat.slot): seat for seat in self.in_order()}
        for slot in functions.keys() - here.keys():
            raise ValueError(f"there is no function at {slot} here")
        for slot in here.keys() - functions.keys() - set(removed):
            raise ValueError(f"it has no function at {slot}, where '{here[slot].owner}' is")
        for slot, saved in functions.items():
            here[slot].check(saved)

    def on_bus(self, bus: int) -> list[Seat]:
        """The seats directly on a bus, by slot."""
        return [seat for seat in self.in_order() if seat.slot.bus == bus]

    def behind(self, seat: Seat) -> Iterator[Seat]:
        """All seats behind a bridge, however far; none behind anything else."""
        if seat.is_bridge:
            for other in self.on_bus(seat.behind):
                yield other
                yield from self.behind(other)

    def bridges_before(self, slot: Slot) -> Iterator[Seat | None]:
        """The bridges between a slot and the root, the nearest first; None for one that is gone."""
        bus = slot.bus
        while bus:
            found = self._bridges.get(bus)
            yield found
            bus = found.slot.bus if found is not None else 0

    def reroute(self) -> None:
        """Bus numbers changed: work out `routes`."""
        self.routes = {}
        self._route(0, 0, set(range(1, 256)))

    def _route(self, bus: int, number: int, free: set[int]) -> None:
        """What the guest finds on `bus`, which it calls `number`; `free` may be further behind."""
        for seat in self.on_bus(bus):
            self.routes[seat.slot._replace(bus=number).number] = seat
        for seat in self.on_bus(bus):
            if not self._forwards(seat):
                continue
            buses = seat.shadow.values[bridge.BUSES]
            secondary, subordinate = buses >> 8 & 0xFF, buses >> 16 & 0xFF
            claimed = free & set(range(secondary, subordinate + 1))
            # Where two bridges claim a bus number, the first one has it.
            free -= claimed
            if secondary in claimed:
                self._route(seat.behind, secondary, claimed - {secondary})

    def _forwards(self, seat: Seat | None) -> bool:
        if seat is None or not seat.is_bridge or seat.failed or not seat.shadow.powered:
            return False
        return not seat.shadow.values[bridge.CONTROL] & bridge.SECONDARY_RESET

    # Through the bridges.

    def is_connected(self, slot: Slot) -> bool:
        """Whether all bridges before a slot are there and at work."""
        return all(self._forwards(each) for each in self.bridges_before(slot))

    def passes(self, seat: Seat, bus: BusType, place: Range) -> bool:
        """Whether all bridges before a seat pass accesses to `place` on to it."""
        for before in self.bridges_before(seat.slot):
            if before is None or not self._forwards(before):
                return False
            opened = bridge.windows(before.shadow.values, bus)
            if not any(each.start <= place.start and place.end <= each.end for each in opened):
                return False
        return True

    def may_master(self, slot: Slot) -> bool:
        """Whether what a function writes to memory gets there: each bridge must pass it on."""
        seat = self.seats.get(slot.number)
        if seat is None or seat.failed or not seat.may_master():
            return False
        for before in self.bridges_before(slot):
            if before is None or not (self._forwards(before) and before.may_master()):
                return False
        return True

    def _mark_neighbours(self, slot: Slot) -> None:
        seats = [seat for seat in self.on_bus(slot.bus) if seat.slot.device == slot.device]
        for seat in seats:
            seat.multi_function = len(seats) > 1
