"""What the guest's BARs put on the two buses, with no trust in the functions behind them.

The root keeps a shadow of what decides about decoding in each function (Command, BARs, power
state, a bridge's windows), made from the guest's writes and from what was fixed when the machine
was built. The shadow decides what is on the buses. What a function answers to a configuration
write must say the same; if it does not, the function is at fault and the buses hold what the guest
asked for all the same.

Two functions, or a function and another device, may be programmed to overlap. Who was there first
stays reachable; the other is kept as unreachable and inserted as soon as its place is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from devices.bus import Bus, BusDevice, BusType, Range, RangeConflict
from devices.pci import bridge
from devices.pci.capability import CapabilityId, find_capabilities
from devices.pci.contract import (
    CONFIG_REGISTERS,
    BarInfo,
    ConfigWriteResult,
    PciConfig,
    RegionRange,
)
from devices.pci.decode import (
    BUS_MASTER,
    COMMAND,
    POWER_STATE,
    Decoder,
    bar_fields,
    check_bars,
    decoded_spaces,
    difference,
)
from devices.pci.intx import Slot
from devices.pci.registers import Field

HEADER_TYPE = 3
"""The dword that holds the header type, in bits 16 to 23."""
MOST_RANGES = 7
"""Six BARs and a ROM."""
_NOT_PASSED = "the bridge before it does not pass it on"


@dataclass
class FunctionState:
    """What the root keeps of one function.

    Attributes:
        owner: the configured name of the device.
        shadow: the dwords of the shadow that can change, by their offsets as hexadecimal text.
        unreachable: indices into the function's BARs of those that are not on their bus.
        pins: interrupt pins that are asserted, 0 for INTA#.
    """

    owner: str
    shadow: dict[str, int]
    unreachable: list[int] = field(default_factory=list)
    pins: list[int] = field(default_factory=list)


class Seat:
    """One function as it is plugged into the root.

    What it says of itself now (header type, capabilities) is what it is taken for from here on.

    Attributes:
        is_bridge: it has a type 1 header; `behind` is then the root's number for the bus there.

    Raises:
        ValueError: the BARs break a rule, or name a region that has no handler.
    """

    def __init__(
        self,
        slot: Slot,
        function: PciConfig,
        owner: str,
        handlers: Sequence[BusDevice],
        bars: Sequence[BarInfo],
    ) -> None:
        check_bars(bars)
        for info in bars:
            if info.region >= len(handlers):
                raise ValueError(f"'{owner}': BAR {info.bar} maps region {info.region}: none such")
        self.slot = slot
        self.function = function
        self.owner = owner
        self.bars = tuple(bars)
        self.handlers = tuple(handlers[info.region] for info in bars)
        self.failed = False
        self.multi_function = False
        self.is_bridge = function.read_config(HEADER_TYPE) >> 16 & 0x7F == bridge.TYPE_1
        self.behind = 0
        if self.is_bridge and self.bars:
            raise ValueError(f"'{owner}' is a bridge with BARs")
        self.shadow = self._shadow()
        self._kept = [n for n in range(CONFIG_REGISTERS) if self.shadow.changeable(n)]
        self._was_master = False
        self.placed: list[Range | None] = self.shadow.placed
        """Where the guest wants each BAR."""
        self.mapped: dict[int, Range] = {}
        """What is on the buses, by index of the BAR."""
        self.unreachable: dict[int, str] = {}
        """Why a wanted BAR is not on its bus, by index of the BAR."""

    def _shadow(self) -> Decoder:
        starts = find_capabilities(self.function.read_config)
        power = starts.get(CapabilityId.POWER_MANAGEMENT, -4) // 4 + 1
        reset = starts.get(CapabilityId.ADVANCED_FEATURES, -4) // 4 + 1
        spaces = bridge.SPACES if self.is_bridge else decoded_spaces(self.bars)
        fields = [Field("command", 4 * COMMAND, 2, writable=spaces | BUS_MASTER)]
        fields += bridge.window_fields() if self.is_bridge else bar_fields(self.bars)
        if power:
            fields.append(Field("power state", 4 * power, 1, writable=POWER_STATE))
        return Decoder(fields, self.bars, power=power, reset=reset)

    def is_shadowed(self, register: int) -> bool:
        """Whether a write to this dword changes the shadow."""
        return register in self._kept or self.shadow.decides(register)

    def write_shadow(self, register: int, offset: int, data: bytes) -> None:
        """The guest writes; the function hears of it next, and then `written` follows."""
        self._was_master = self.may_master()
        if self.shadow.asks_reset(register, offset, data):
            self.shadow.decode_reset()
        else:
            self.shadow.decode_write(register, offset, data)

    def written(self) -> None:
        """The function has answered."""
        self._was_master = False

    def may_master(self) -> bool:
        """Whether the guest made it a bus master.

        While a write is under way the old value holds too: what the function sends before it
        answers may go by either.
        """
        return self._was_master or self.shadow.may_master()

    def state(self, pins: list[int]) -> FunctionState:
        shadow = {f"{4 * n:#04x}": self.shadow.values[n] for n in self._kept}
        return FunctionState(self.owner, shadow, sorted(self.unreachable), pins)

    def check(self, state: FunctionState) -> None:
        """See whether `state` can be this seat's; ValueError if not."""
        if state.owner != self.owner:
            raise ValueError(f"{self.slot} is '{self.owner}' here, not '{state.owner}'")
        if state.shadow.keys() != {f"{4 * n:#04x}" for n in self._kept}:
            raise ValueError(f"{self.slot}: the shadow is not that of this function")
        self.shadow.check(self._dwords(state))
        wanted = self.shadow.placements(self._dwords(state))
        if any(not 0 <= i < len(wanted) or wanted[i] is None for i in state.unreachable):
            raise ValueError(f"{self.slot}: an unreachable BAR that is not decoded")
        if any(not 0 <= pin < 4 for pin in state.pins):
            raise ValueError(f"{self.slot}: there are four interrupt pins")

    def load(self, state: FunctionState) -> None:
        """Take up a state that `check` accepted; the buses follow with `BarMapper.remap`."""
        self.shadow.load(self._dwords(state))
        self.placed = self.shadow.placed
        self.unreachable = dict.fromkeys(state.unreachable, "its place was taken")

    def _dwords(self, state: FunctionState) -> list[int]:
        return self.shadow.changed({n: state.shadow[f"{4 * n:#04x}"] for n in self._kept})

    def shadow_difference(self) -> str:
        """In what way the function's own registers differ from the shadow; "" if they agree."""
        for register in self._kept:
            bits = self.shadow.changeable(register)
            own, wanted = self.function.read_config(register), self.shadow.values[register]
            if (own ^ wanted) & bits:
                return f"register {4 * register:#04x} is {own:#x}, the guest wrote {wanted:#x}"
        return ""


class BarMapper:
    """Keeps the buses equal to what the seats want.

    Args:
        mmio: where memory BARs go.
        io: where I/O BARs go.
        seats: all seats, in the order in which they are served; read anew each time.
        passes: whether the bridges before a seat let these addresses through to it.
        on_violation: told (owner, text) when a function's answer contradicts the guest's writes.
    """

    def __init__(
        self,
        mmio: Bus,
        io: Bus,
        seats: Callable[[], Iterable[Seat]],
        passes: Callable[[Seat, BusType, Range], bool],
        on_violation: Callable[[str, str], None],
    ) -> None:
        self._buses = {BusType.MMIO: mmio, BusType.PIO: io}
        self._seats, self._passes = seats, passes
        self._on_violation = on_violation
        self.collisions = 0
        """How often a BAR was programmed to a place that was taken."""

    def written(self, seat: Seat, answer: ConfigWriteResult) -> None:
        """The shadow of `seat` is up to date: check the function's answer, move its ranges."""
        before = seat.placed
        self.follow(seat)
        wrong = _contradiction(answer, difference(seat.bars, before, seat.placed))
        if wrong:
            self._on_violation(seat.owner, wrong)

    def follow(self, seat: Seat) -> None:
        """The shadow of `seat` is up to date: move its ranges."""
        before, seat.placed = seat.placed, seat.shadow.placed
        if before != seat.placed:
            self._move(seat, before)

    def bridge_changed(self) -> None:
        """A window was moved, or a bridge is gone: see what is behind bridges anew."""
        for seat in self._seats():
            for index, place in tuple(seat.mapped.items()):
                if seat.slot.bus and not self._passes(seat, seat.bars[index].bus, place):
                    self._remove(seat, index)
                    seat.unreachable[index] = _NOT_PASSED
        self.retry()

    def unmap(self, seat: Seat) -> None:
        """Take all of a seat's ranges off the buses, for good or for a while."""
        for index in tuple(seat.mapped):
            self._remove(seat, index)
        seat.unreachable.clear()
        self.retry()

    def remap(self) -> None:
        """Put everything on the buses anew from the shadows, after a restore."""
        seats = [seat for seat in self._seats() if not seat.failed]
        for seat in seats:
            for index in tuple(seat.mapped):
                self._remove(seat, index)
        # Those that were reachable first, else the order of slots would change who is.
        for seat in seats:
            for index, place in enumerate(seat.placed):
                if place is not None and index not in seat.unreachable:
                    self._insert(seat, index, place)
        self.retry()
        for seat in seats:
            wrong = seat.shadow_difference()
            if wrong and not seat.failed:
                self._on_violation(seat.owner, f"after restore, {wrong}")

    def retry(self) -> None:
        """Insert what was unreachable and now has its place free."""
        for seat in self._seats():
            for index in sorted(seat.unreachable):
                place = seat.placed[index]
                if place is not None and not seat.failed:
                    self._insert(seat, index, place)

    def problems(self) -> list[str]:
        """One line for each BAR that the guest programmed and nobody can reach."""
        return [
            f"{seat.slot} '{seat.owner}' BAR {seat.bars[index].bar} is unreachable: {reason}"
            for seat in self._seats()
            for index, reason in sorted(seat.unreachable.items())
        ]

    def _move(self, seat: Seat, before: Sequence[Range | None]) -> None:
        moved = [index for index, old in enumerate(before) if old != seat.placed[index]]
        for index in moved:
            seat.unreachable.pop(index, None)
            if index in seat.mapped:
                self._remove(seat, index)
        for index in moved:
            place = seat.placed[index]
            if place is not None and not self._insert(seat, index, place):
                self.collisions += seat.unreachable[index] != _NOT_PASSED
        self.retry()

    def _remove(self, seat: Seat, index: int) -> None:
        self._buses[seat.bars[index].bus].remove(seat.mapped.pop(index), seat.owner)

    def _insert(self, seat: Seat, index: int, place: Range) -> bool:
        if seat.slot.bus and not self._passes(seat, seat.bars[index].bus, place):
            seat.unreachable[index] = _NOT_PASSED
            return False
        try:
            self._buses[seat.bars[index].bus].insert(place, seat.handlers[index], seat.owner)
        except RangeConflict as conflict:
            seat.unreachable[index] = str(conflict)
            return False
        seat.unreachable.pop(index, None)
        seat.mapped[index] = place
        return True


def _contradiction(answer: ConfigWriteResult, expected: ConfigWriteResult) -> str:
    """Which part of a function's answer is not what the guest's write asks for; "" if none."""
    pairs: tuple[tuple[str, list[RegionRange], list[RegionRange]], ...] = (
        ("mmio_remove", answer.mmio_remove, expected.mmio_remove),
        ("mmio_add", answer.mmio_add, expected.mmio_add),
        ("io_remove", answer.io_remove, expected.io_remove),
        ("io_add", answer.io_add, expected.io_add),
    )
    for name, said, wanted in pairs:
        if len(said) > MOST_RANGES:
            return f"answered a configuration write with {len(said)} ranges in {name}"
        if sorted(said) != sorted(wanted):
            return (
                f"answered a configuration write with {name} {_text(said)}; "
                f"what the guest programmed is {_text(wanted)}"
            )
    return ""


def _text(ranges: list[RegionRange]) -> str:
    return ", ".join(f"region {region} at {place}" for region, place in ranges) or "nothing"
