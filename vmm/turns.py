"""Giving devices the turns that they ask for, between two slices of guest execution."""

from __future__ import annotations

from collections.abc import Callable

from devices.clock import Clock

REST_NS = 20_000
"""The least guest time between two turns that a device asked for."""


class TurnGiver:
    """Keeps who wants a turn, and sees that the guest gets on between them.

    A device that wants one turn after another has at most half of the time: the guest runs for as
    long as the turn took before the next, and at least for `REST_NS`. Only a halted guest does
    not make it wait. Guest time counts, so that runs with a virtual clock stay repeatable.

    Args:
        attention: has `give` called soon, with the vCPU stopped.
    """

    def __init__(self, clock: Clock, attention: Callable[[], None]) -> None:
        self._clock = clock
        self._attention = attention
        self._takers: dict[str, Callable[[], None]] = {}
        self._wanted: dict[str, None] = {}
        self._resting: set[str] = set()

    def add(self, name: str, take: Callable[[], None]) -> None:
        """Register a device; `take` gives it its turn and comes back when that is over."""
        self._takers[name] = take

    def want(self, name: str) -> None:
        """A device asks for a turn; from the vCPU thread, also in the middle of an access."""
        if name in self._takers and name not in self._wanted:
            self._wanted[name] = None
            if name not in self._resting:
                self._attention()

    def give(self, halted: bool) -> None:
        """Give each device that wants a turn one; not while the devices sleep."""
        for name in list(self._wanted):
            if name in self._resting and not halted:
                continue
            del self._wanted[name]
            begin = self._clock.now()
            self._takers[name]()
            self._rest(name, begin)

    def _rest(self, name: str, begin: int) -> None:
        if name not in self._resting:
            self._resting.add(name)
            now = self._clock.now()
            self._clock.call_at(now + max(now - begin, REST_NS), lambda: self._rested(name))

    def _rested(self, name: str) -> None:
        self._resting.discard(name)
        if name in self._wanted:
            self._attention()
