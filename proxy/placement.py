"""On which CPU a child runs.

- On the tube a child sits on the CPU of the thread that drives it: a wake-up across CPUs costs
  ten times as much, most of all in a virtual machine.
- While a child polls its lane it needs a CPU of its own, and there must be one to spare: at most
  one child polls for each CPU beyond the first.

The children follow the thread; the thread itself is never pinned. A host that forbids moving
children (`sched_setaffinity` fails) is left as it is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Protocol


class Poller(Protocol):
    """What holds one of the places for polling."""

    def idle(self) -> bool:
        """Whether its child has gone to sleep."""

    def close(self) -> None: ...


class Placement:
    """The CPUs that one machine has; shared by all its proxies.

    Args:
        lanes: False lets no child poll.
    """

    def __init__(self, *, lanes: bool = True) -> None:
        self._cpus = os.sched_getaffinity(0)
        self._pollers: list[Poller] = []
        self.places = len(self._cpus) - 1 if lanes else 0
        """How many children may poll at a time."""
        try:
            # PyDLL: the call is so short that letting go of the interpreter lock costs more.
            self._getcpu: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu
        except (OSError, AttributeError):
            self._getcpu = lambda: -1

    def describe(self) -> str:
        """One line on what was chosen, for statistics."""
        if not self.places:
            why = "one CPU" if len(self._cpus) == 1 else "no lanes wanted"
            return f"{why}: every access goes through the tube, children follow the vCPU's thread"
        return (
            f"children follow the vCPU's thread (now on CPU {self._getcpu()}); "
            f"of {len(self._cpus)} CPUs {self.places} may poll a shared-memory lane, "
            f"{len(self._pollers)} of them in use"
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

    def grant(self, poller: Poller, pid: int) -> bool:
        """Give `poller` a CPU of its own if there is one, perhaps from one that is idle."""
        if len(self._pollers) >= self.places:
            idle = next((each for each in self._pollers if each.idle()), None)
            if idle is None:
                return False
            idle.close()
            if idle in self._pollers:
                return False
        cpu = self._getcpu()
        if not _move(pid, self._cpus - {cpu}):
            return False
        self._pollers.append(poller)
        return True

    def release(self, poller: Poller) -> None:
        """The poller's child polls no more."""
        if poller in self._pollers:
            self._pollers.remove(poller)


def _move(pid: int, cpus: set[int]) -> bool:
    try:
        os.sched_setaffinity(pid, cpus)
    except OSError:
        return False
    return True
