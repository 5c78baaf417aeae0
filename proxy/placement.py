"""On which CPU a child runs.

- On the tube a child sits on the CPU of the thread that drives it: a wake-up across CPUs costs
  ten times as much, most of all in a virtual machine. A thread that waits for a turn stays there
  meanwhile (`Placement.stay`), else the answer would wake it on another CPU that is idle.
- A child that polls its lane gets a CPU of its own if there is one to spare: at most one child
  polls for each CPU beyond the first. One more may poll on the thread's own CPU: there both give
  way to each other (`sched_yield`) between looks, which costs half of a wake-up through a socket.

The children follow the thread, which is free to go anywhere while the guest runs. A host that
forbids moving children (`sched_setaffinity` fails) is left as it is.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Callable, Collection
from typing import Protocol


class Poller(Protocol):
    """What holds one of the places for polling."""

    def idle(self) -> bool:
        """Whether its child has gone to sleep."""

    def close(self) -> None: ...


class Seat(enum.Enum):
    """Where a polling child sits: on a CPU of its own, or on that of the thread it serves."""

    OWN = 0
    SHARED = 1


class Placement:
    """The CPUs that one machine has; shared by all its proxies.

    Args:
        lanes: False lets no child poll.
    """

    def __init__(self, *, lanes: bool = True) -> None:
        self._cpus = os.sched_getaffinity(0)
        self._pollers: dict[Poller, Seat] = {}
        self.lanes = lanes
        self.places = {Seat.OWN: len(self._cpus) - 1, Seat.SHARED: 1}
        """How many children may poll at a time."""
        try:
            # PyDLL: the call is so short that letting go of the interpreter lock costs more.
            self._getcpu: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu
        except (OSError, AttributeError):
            self._getcpu = lambda: -1

    def describe(self) -> str:
        """One line on what was chosen, for statistics."""
        follow = f"children follow the vCPU's thread (now on CPU {self._getcpu()})"
        if not self.lanes:
            return f"{follow}; no lanes wanted: every access goes through the tube"
        used = list(self._pollers.values())
        return (
            f"{follow}; lanes polled: {used.count(Seat.OWN)} of at most {self.places[Seat.OWN]} "
            f"on a CPU of their own, {used.count(Seat.SHARED)} of at most "
            f"{self.places[Seat.SHARED]} on the thread's"
        )

    def follow(self, pid: int, last: int) -> int:
        """Move a child to the calling thread's CPU unless that is `last`.

        Returns the CPU, -1 if it is not known.
        """
        if len(self._cpus) == 1:
            return last
        cpu = self._getcpu()
        if cpu != last and cpu >= 0:
            _move(pid, {cpu})
        return cpu

    def stay(self, pid: int, last: int) -> tuple[int, set[int] | None]:
        """Move a child to the calling thread's CPU as `follow` does, and keep the thread there.

        Returns the CPU, and what `roam` is to be told in the end.
        """
        if len(self._cpus) == 1:
            return last, None
        cpu = self.follow(pid, last)
        roaming = os.sched_getaffinity(0)
        if cpu < 0 or len(roaming) == 1 or not _move(0, (cpu,)):
            return cpu, None
        return cpu, roaming

    def roam(self, roaming: set[int] | None) -> None:
        """End `stay`."""
        if roaming is not None:
            _move(0, roaming)

    def has_seat(self, seat: Seat) -> bool:
        """Whether `grant` may find a seat of this kind."""
        holders = [each for each, held in self._pollers.items() if held is seat]
        return len(holders) < self.places[seat] or any(each.idle() for each in holders)

    def grant(self, poller: Poller, pid: int, seat: Seat) -> bool:
        """Give `poller` a seat of this kind if there is one, perhaps from one that is idle."""
        holders = [each for each, held in self._pollers.items() if held is seat]
        if len(holders) >= self.places[seat]:
            idle = next((each for each in holders if each.idle()), None)
            if idle is None:
                return False
            idle.close()
            if idle in self._pollers:
                return False
        cpu = self._getcpu()
        if not _move(pid, {cpu} if seat is Seat.SHARED else self._cpus - {cpu}):
            return False
        self._pollers[poller] = seat
        return True

    def release(self, poller: Poller) -> None:
        """The poller's child polls no more."""
        self._pollers.pop(poller, None)


def _move(pid: int, cpus: Collection[int]) -> bool:
    try:
        os.sched_setaffinity(pid, cpus)
    except OSError:
        return False
    return True
