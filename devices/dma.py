"""Guest memory as a device model reaches it, and whose turn it is to do so.

The rule: a model touches guest memory only while the vCPU stands still and waits for it. That is so
in an access to a region that is ``synced``, in every read, in a command of the machine that is
answered (a config write, `Device.sleep`), and in `TakesTurns.turn`. A posted write to any other
region, `Watches.ready` and `HasWork.work` run beside the guest: they ask for a turn.

So memory order, code that the guest has translated, snapshots and repeatable runs need no
thought in a model: what it wrote is told to the CPU (`DmaMemory.flush`) before the guest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from devices.contract import HasWork, TakesTurns
from devices.host_io import address_of
from devices.spans import PAGE_SHIFT, Spans

Wrote = Callable[[Sequence[tuple[int, int]]], None]

_MOST_RUNS = 1024
"""Runs of written pages that are kept before they are sorted and joined."""


class DmaFault(ValueError):
    """A guest-physical range that is not wholly RAM: an error of the guest's driver."""


class GuestMemory(Protocol):
    """The RAM of the machine by guest-physical address; all of its methods raise `DmaFault`."""

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes."""
        ...

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` there; the pages count as written."""
        ...

    def window(self, address: int, length: int) -> memoryview:
        """The bytes themselves, for `os.preadv` and the like; only until the turn ends.

        Who writes through it calls `mark` afterwards.
        """
        ...

    def mark(self, address: int, length: int) -> None:
        """Say that this range was written through a window."""
        ...

    # The same for the hundreds of pages of a large request at once.

    def windows(self, spans: Iterable[tuple[int, int]]) -> list[memoryview]:
        """Of each (address, length)."""
        ...

    def host(self, spans: Spans) -> int | None:
        """What is to be added to an address of any of them for where it is in this process.

        None: that is not the same for all, or they may not be RAM at all: look at each.
        """
        ...

    def mark_pages(self, runs: Sequence[tuple[int, int]]) -> None:
        """As `mark`, of whole pages: of each run the first and the first behind it."""
        ...


class DmaMemory:
    """`GuestMemory` over mapped regions.

    Args:
        wrote: told of written pages by `flush`: runs of them, each (number of the first, how many).
    """

    def __init__(self, wrote: Wrote) -> None:
        self._wrote = wrote
        self._regions: list[tuple[int, int, memoryview]] = []
        self._runs: list[tuple[int, int]] = []
        """(first, end) of pages that were written, in the order of writing."""
        self._hosts: dict[int, int] = {}
        """By start of each region: where it lies in this process."""

    def map(self, regions: Sequence[tuple[int, memoryview]]) -> None:
        """From now on RAM is this: (guest-physical address, bytes) of each region."""
        largest_first = sorted(regions, key=lambda region: -region[1].nbytes)
        self._regions = [(start, start + view.nbytes, view) for start, view in largest_first]
        self._hosts = {start: address_of(view) for start, view in regions}

    def window(self, address: int, length: int) -> memoryview:
        if length >= 0:
            end = address + length
            for start, limit, view in self._regions:
                if start <= address and end <= limit:
                    return view[address - start : end - start]
        raise DmaFault(f"{address:#x}+{length:#x} is outside RAM")

    def read(self, address: int, length: int) -> bytes:
        return self.window(address, length).tobytes()

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        length = len(data)
        self.window(address, length)[:] = data
        if length:
            self.mark(address, length)

    def mark(self, address: int, length: int) -> None:
        first, end = address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1
        runs = self._runs
        if runs:
            last_first, last_end = runs[-1]
            if last_first <= first <= last_end:
                if end > last_end:
                    runs[-1] = last_first, end
                return
            if len(runs) >= _MOST_RUNS:
                self._join()
        runs.append((first, end))

    def windows(self, spans: Iterable[tuple[int, int]]) -> list[memoryview]:
        return [self.window(address, length) for address, length in spans]

    def host(self, spans: Spans) -> int | None:
        addresses, lengths = spans.words[::2], set(spans.words[1::2])
        if lengths and 0 not in lengths:
            first, end = min(addresses), max(addresses) + max(lengths)  # quick, not sharp
            for start, limit, _ in self._regions:
                if start <= first and end <= limit:
                    return self._hosts[start] - start
        return None

    def mark_pages(self, runs: Sequence[tuple[int, int]]) -> None:
        self._runs += runs
        if len(self._runs) > _MOST_RUNS:
            self._join()

    def flush(self) -> None:
        """Tell of the pages written since the last time, each once."""
        runs = self._runs
        if runs:
            if len(runs) > 1:
                self._join()
            told = [(first, end - first) for first, end in runs]
            runs.clear()
            self._wrote(told)

    def _join(self) -> None:
        runs = sorted(self._runs)
        joined: list[tuple[int, int]] = []
        begin, past = runs[0]
        for first, end in runs:
            if first > past:
                joined.append((begin, past))
                begin, past = first, end
            elif end > past:
                past = end
        joined.append((begin, past))
        self._runs[:] = joined


class Turns:
    """When one model has its turn: the same in the machine's process and in a child.

    Args:
        wrote: see `DmaMemory`.
        announce: asks the machine to come and call `take`; called outside of turns only.
        finish_work: do `HasWork.work` within the turn that wanted it, so that a run with a virtual
            clock is repeatable.

    Attributes:
        memory: of the model; empty unless the machine maps RAM into it.
        work_wanted: whether `HasWork.work` is to be called.
    """

    def __init__(
        self,
        wrote: Wrote,
        announce: Callable[[], None],
        finish_work: bool = False,
    ) -> None:
        self.memory = DmaMemory(wrote)
        self.work_wanted = False
        self._turn_wanted = False
        self._in_turn = False
        self._announce = announce
        self._finish_work = finish_work
        self._turn: Callable[[], None] | None = None
        self._work: Callable[[], None] | None = None

    def attach(self, device: Any) -> None:
        """This is the model; None once it is gone."""
        self._turn = device.turn if isinstance(device, TakesTurns) else None
        self._work = device.work if isinstance(device, HasWork) else None

    def want_turn(self) -> None:
        if not self._turn_wanted:
            self._turn_wanted = True
            if not self._in_turn:
                self._announce()

    def want_work(self) -> None:
        self.work_wanted = True

    def take(self) -> None:
        """Give the model the turn that it wants, if it wants one; the vCPU stands still."""
        self._in_turn = True
        self._finish()

    def write(
        self, write: Callable[[int, int, int], None], offset: int, size: int, value: int
    ) -> None:
        """A synced write: carry it out, and the turn that it asks for."""
        self._in_turn = True
        write(offset, size, value)
        self._finish()

    def reader(self, read: Callable[[int, int], int]) -> Callable[[int, int], int]:
        """`read` of a model that may write memory in it; a read is a turn."""
        flush = self.memory.flush

        def turn(offset: int, size: int) -> int:
            value = read(offset, size)
            flush()
            return value

        return turn

    def work(self) -> None:
        """Do the work that the model wanted; beside the guest."""
        self.work_wanted = False
        if self._work is not None:
            self._work()

    def _finish(self) -> None:
        while True:
            if self._turn_wanted:
                self._turn_wanted = False
                if self._turn is not None:
                    self._turn()
            if not (self._finish_work and self.work_wanted):
                break
            self.work()
        self._in_turn = False
        self.memory.flush()
        if self._turn_wanted:
            self._announce()
