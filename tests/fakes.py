"""Stand-ins for what a device model asks of the world around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from devices.dma import GuestMemory, Turns


class FakeHost:
    """A `DeviceHost` that keeps what it was asked, in order.

    Attributes:
        calls: (method name, arguments...) of each call.
        lines: the level of each interrupt pin that was driven.
        printed: all output.
        turns: whose turn it is; its `memory` has the RAM that `ram` gave it.
    """

    def __init__(self, fds: Mapping[str, int] | None = None, *, finish_work: bool = False) -> None:
        self.fds: Mapping[str, int] = fds or {}
        self.calls: list[tuple[Any, ...]] = []
        self.lines: dict[int, bool] = {}
        self.printed = bytearray()
        self.turns = Turns(self._wrote_runs, lambda: self.calls.append(("want_turn",)), finish_work)

    def ram(self, size: int, start: int = 0) -> bytearray:
        """Give it this much guest RAM, which the test can look at."""
        memory = bytearray(size)
        self.turns.memory.map([(start, memoryview(memory))])
        return memory

    @property
    def memory(self) -> GuestMemory:
        return self.turns.memory

    def want_turn(self) -> None:
        self.turns.want_turn()

    def want_work(self) -> None:
        self.turns.want_work()

    @property
    def irq(self) -> bool:
        """The level of pin 0."""
        return self.lines.get(0, False)

    def count(self, name: str) -> int:
        """How often this method was called."""
        return sum(call[0] == name for call in self.calls)

    def edges(self) -> list[bool]:
        """The levels that pin 0 was driven to, in order."""
        return [call[1] for call in self.calls if call[0] == "set_irq" and call[2] == 0]

    def story(self) -> tuple[bytes, list[tuple[Any, ...]]]:
        """All that was asked; output apart, because a child gathers it."""
        return bytes(self.printed), [call for call in self.calls if call[0] != "output"]

    def forget(self) -> None:
        """Begin a new story; the levels of the lines stay known."""
        self.calls.clear()
        self.printed.clear()

    def set_irq(self, level: bool, pin: int = 0) -> None:
        self.calls.append(("set_irq", level, pin))
        self.lines[pin] = level

    def send_msi(self, address: int, data: int) -> None:
        self.calls.append(("send_msi", address, data))

    def wrote_pages(self, first: int, count: int) -> None:
        self.calls.append(("wrote_pages", first, count))

    def _wrote_runs(self, runs: Sequence[tuple[int, int]]) -> None:
        for first, count in runs:
            self.wrote_pages(first, count)

    def output(self, data: bytes) -> None:
        self.calls.append(("output", data))
        self.printed += data

    def input_wanted(self) -> None:
        self.calls.append(("input_wanted",))

    def request_exit(self, value: int) -> None:
        self.calls.append(("request_exit", value))

    def log(self, message: str) -> None:
        self.calls.append(("log", message))
