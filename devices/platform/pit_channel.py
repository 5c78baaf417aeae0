"""One counter of an 8254, as a function of time.

Times here are tick numbers of the counter's CLK input. CE is the counting element, CR the count
register that the guest writes (Intel 8254 data sheet, "Mode Definitions" and figure 5).

Rules:
- A count that the guest writes waits in CR (`pending`) until tick `due`, when it is loaded into CE:
  the next CLK, the end of the period (mode 2) or half period (mode 3), or the CLK after a trigger
  (`due` is None until GATE rises). `settle` does loads whose time has come; all else assumes that.
- What CE holds follows from the count it was loaded with and the ticks since then.
- Modes 2 and 3 need a count of 2 at least ("Minimum and Maximum Initial Counts"); 1 is taken as 2.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import msgspec

from devices.contract import U8, U16
from devices.platform.timing import Ticks

LSB, MSB, BOTH = 1, 2, 3
"""RW field of the control word: which bytes of the count are transferred."""
_HIGHEST = 15 * 1111
"""The largest number that four nibbles can say in BCD mode."""


@dataclass
class ChannelState:
    """One counter.

    Attributes:
        control: bits 5..0 of the control word, as written: RW, mode, BCD.
        gate: the GATE input.
        written: CR, as written.
        low: the first byte of a count of which the second is still to come.
        read_high: the next byte read is the high one.
        latched: OL with a latched count, until it was read.
        status: a latched status byte, until it was read.
        armed: CE was loaded since the control word.
        loaded: the count that CE was loaded with; before that what it happens to hold.
        since: the tick of that load, less the time that GATE stopped it; None: it is stopped.
        held: ticks that were counted when it stopped.
        pending: CR holds a count that CE has not taken.
        due: when CE takes it; None: after the next trigger.
    """

    control: Annotated[int, msgspec.Meta(ge=0x10, le=0x3F)] = BOTH << 4
    gate: bool = True
    written: U16 = 0
    low: U8 | None = None
    read_high: bool = False
    latched: U16 | None = None
    status: U8 | None = None
    armed: bool = False
    loaded: Annotated[int, msgspec.Meta(ge=1, le=0x1_0000)] = 0x1_0000
    since: Ticks | None = None
    held: Ticks = 0
    pending: bool = False
    due: Ticks | None = None

    def __post_init__(self) -> None:
        if self.due is not None and not self.pending:
            raise ValueError("a count is due that was not written")
        if self.since is not None and not self.armed:
            raise ValueError("a counter runs that was not loaded")
        if self.held < 0:
            raise ValueError("fewer than no ticks were counted")
        if self.low is not None and self.control >> 4 != BOTH:
            raise ValueError("half a count, in a mode of one byte")
        if self.mode in (2, 3) and self.armed and self.loaded < 2:
            raise ValueError(f"mode {self.mode} cannot count from 1")

    @property
    def mode(self) -> int:
        """0..5; the codes 6 and 7 mean 2 and 3 ("Control Word Format": X10, X11)."""
        code = self.control >> 1 & 7
        return code & 3 if code >= 6 else code

    @property
    def modulus(self) -> int:
        """What the counter wraps at, and what a count of 0 means."""
        return 10_000 if self.control & 1 else 0x1_0000


class Channel:
    """The counter's behaviour; whoever uses it calls `settle` first with the same time."""

    def __init__(self, state: ChannelState) -> None:
        self.state = state

    # What follows from the state and the time.

    def settle(self, now: int) -> None:
        """Load CE if that is due by now."""
        due = self.state.due
        if due is not None and now >= due:
            self._load(due)

    def out(self, now: int) -> bool:
        """The OUT pin."""
        state = self.state
        mode = state.mode
        if not state.armed:
            return mode != 0
        elapsed = self._elapsed(now)
        match mode:
            case 0 | 1:
                return elapsed >= state.loaded
            case 2 | 3 if state.since is None:
                return True
            case 2:
                return elapsed % state.loaded != state.loaded - 1
            case 3:
                return elapsed % state.loaded < _high_half(state.loaded)
            case _:
                return elapsed != state.loaded

    def count(self, now: int) -> int:
        """What CE holds, as the guest reads it (BCD in BCD mode)."""
        number = self._number(now)
        return int(f"{number:04}", 16) if self.state.control & 1 else number

    def null_count(self) -> bool:
        """The count that was written is not in CE yet ("Status Byte", bit 6)."""
        return self.state.pending or not self.state.armed

    def next_rise(self, now: int) -> int | None:
        """The first tick after `now` at which OUT goes from low to high by itself."""
        state = self.state
        if state.due is None:
            return self._rise(now)
        if state.mode >= 2:
            rise = self._rise(now)
            if rise is not None and rise <= state.due:
                return rise
        ahead = Channel(copy.copy(state))
        ahead._load(state.due)
        if state.due > now and not self.out(state.due - 1) and ahead.out(state.due):
            return state.due  # the load itself ends a strobe
        return ahead._rise(max(now, state.due))

    def _elapsed(self, now: int) -> int:
        since = self.state.since
        return self.state.held if since is None else max(now - since, 0)

    def _number(self, now: int) -> int:
        state = self.state
        elapsed, loaded = self._elapsed(now), state.loaded
        if state.armed and state.mode == 2:
            number = loaded - elapsed % loaded
        elif state.armed and state.mode == 3:
            # Both halves count the even number below `loaded` down by two.
            phase = elapsed % loaded
            half = _high_half(loaded)
            number = (loaded & ~1) - 2 * (phase if phase < half else phase - half)
        else:
            number = loaded - elapsed
        return number % state.modulus

    def _rise(self, now: int) -> int | None:
        state = self.state
        if not state.armed or state.since is None:
            return None
        match state.mode:
            case 0 | 1:
                rise = state.since + state.loaded
            case 2 | 3:
                return state.since + ((now - state.since) // state.loaded + 1) * state.loaded
            case _:
                rise = state.since + state.loaded + 1
        return rise if rise > now else None

    def _load(self, tick: int) -> None:
        state = self.state
        low_half = state.mode == 3 and state.armed and not self.out(tick)
        state.loaded = self._initial()
        state.armed, state.pending, state.due = True, False, None
        if state.mode in (1, 5) or state.gate:
            # In mode 3 a count that is loaded as OUT falls begins with its low half.
            state.since = tick - _high_half(state.loaded) if low_half else tick
        else:
            state.since = None
        state.held = 0

    def _initial(self) -> int:
        state = self.state
        number = state.written
        if state.control & 1:
            number = sum((number >> 4 * digit & 0xF) * 10**digit for digit in range(4))
        number = number or state.modulus
        return max(number, 2) if state.mode in (2, 3) else number

    # The GATE pin.

    def set_gate(self, level: bool, now: int) -> None:
        """Drive GATE ("Gate Pin Operations Summary")."""
        state = self.state
        if level == state.gate:
            return
        state.gate = level
        mode = state.mode
        if mode in (1, 5):
            if level and (state.armed or state.pending):
                state.pending, state.due = True, now + 1
        elif not level:
            state.held, state.since = self._elapsed(now), None
            if mode in (2, 3) and state.armed:
                state.due = None
        elif state.armed:
            if mode in (0, 4):
                state.since = now - state.held
            else:
                state.pending, state.due = True, now + 1

    # Registers.

    def write_control(self, value: int, now: int) -> None:
        """A control word for this counter: it starts over."""
        fresh = ChannelState(control=value & 0x3F, gate=self.state.gate, written=self.state.written)
        fresh.loaded = self._number(now) or fresh.modulus
        # In place, because the device's state holds this object.
        vars(self.state).update(vars(fresh))

    def write(self, value: int, now: int) -> None:
        """One byte of a count ("Write Operations")."""
        state = self.state
        match state.control >> 4:
            case 1:
                self._take(value, now)
            case 2:
                self._take(value << 8, now)
            case _ if state.low is None:
                state.low = value
                if state.mode == 0:
                    # "Writing the first byte disables counting. OUT is set low immediately."
                    state.loaded = self._number(now) or state.modulus
                    state.armed, state.since, state.held = False, None, 0
                    state.pending, state.due = False, None
            case _:
                low, state.low = state.low, None
                self._take(value << 8 | low, now)

    def _take(self, count: int, now: int) -> None:
        state = self.state
        state.written = count
        state.pending = True
        if state.due is not None and state.due <= now + 1:
            return
        match state.mode:
            case 0 | 4:
                state.due = now + 1
            case 2 | 3:
                if not state.armed:
                    state.due = now + 1
                elif state.since is None:
                    state.due = None
                else:
                    state.due = now + self._until_reload(now)
            case _:
                state.due = None

    def _until_reload(self, now: int) -> int:
        """Ticks to the end of the period of mode 2, or of the half period of mode 3."""
        loaded = self.state.loaded
        phase = self._elapsed(now) % loaded
        half = _high_half(loaded)
        return half - phase if self.state.mode == 3 and phase < half else loaded - phase

    def read(self, now: int) -> int:
        """One byte: of a latched status, a latched count, or the count as it is now."""
        state = self.state
        if state.status is not None:
            status, state.status = state.status, None
            return status
        value = self.count(now) if state.latched is None else state.latched
        access = state.control >> 4
        high = access == MSB or (access == BOTH and state.read_high)
        if access == BOTH:
            state.read_high = not state.read_high
        if high or access != BOTH:
            state.latched = None
        return value >> 8 if high else value & 0xFF

    def latch_count(self, now: int) -> None:
        """Hold the count for reading, unless one is held already ("Counter Latch Command")."""
        if self.state.latched is None:
            self.state.latched = self.count(now)

    def latch_status(self, now: int) -> None:
        """Hold the status byte for reading, likewise ("Read-Back Command")."""
        state = self.state
        if state.status is None:
            state.status = self.out(now) << 7 | self.null_count() << 6 | state.control


def _high_half(loaded: int) -> int:
    """Ticks that OUT is high in a period of mode 3: (N+1)/2 of an odd count."""
    return (loaded + 1) // 2
