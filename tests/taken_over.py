"""Devices whose code was replaced by one that tries all it can: what the tests of each share."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

from proxy_helpers import Recorder

from devices.bus import ALL_ONES, BusType
from devices.contract import Device, DeviceHost, Region
from devices.dma import DmaFault
from proxy.device import ProxyDevice
from proxy.jail import JailMode, JailPlan
from proxy.jail.escape import ATTEMPTS, Attempt, Targets, bait
from proxy.warden import Warden
from vmm.memory import GuestMemory

Own = Callable[[DeviceHost], str]
"""Does what this device alone could try; what it got in words, or OSError."""


class Verdict(NamedTuple):
    """Whether it got what it wanted, what it said, how it ended."""

    got: bool
    said: str
    failure: str


class Attacks:
    """Ways out: those of everybody in `ATTEMPTS`, then those of this device alone."""

    host: DeviceHost
    targets: ClassVar[Targets]
    own: ClassVar[tuple[Own, ...]] = ()

    @classmethod
    def number(cls, what: Attempt | Own) -> int:
        return (*ATTEMPTS, *cls.own).index(what)

    def carry_out(self, number: int) -> int:
        """1 if it got what it wanted; what that was, or what stopped it, is logged."""
        try:
            if number < len(ATTEMPTS):
                text = ATTEMPTS[number].run(self.targets)
            else:
                text = self.own[number - len(ATTEMPTS)](self.host)
        except (OSError, ValueError, MemoryError, DmaFault) as error:
            self.host.log(f"{type(error).__name__}: {error}")
            return 0
        for start in range(0, len(text), 1500):
            self.host.log(text[start : start + 1500])
        return 1


class TakenOver(Attacks, Device):
    """Carries out attack number `offset` when it is read."""

    model: ClassVar[str] = "taken-over"

    def regions(self) -> tuple[Region, ...]:
        return (Region("r", BusType.MMIO, 0x1000, 0x1000_0000, synced=True),)

    def read(self, offset: int, size: int) -> int:
        return self.carry_out(offset)


class Takeover:
    """Starts devices that were taken over, one for each attempt.

    Args:
        kind: their code.
        policy: the model whose jail they have.
        plan: of their jails, if not all that can be had.
    """

    def __init__(self, kind: type[TakenOver], policy: str, plan: JailPlan | None = None) -> None:
        self._policy = policy
        self._kind = kind
        self._warden = Warden([kind], jail=JailMode.AUTO, plan=plan)

    def attempt(
        self,
        what: Attempt | Own,
        fds: Mapping[str, int],
        *,
        events: Recorder | None = None,
        guest_memory: GuestMemory | None = None,
    ) -> Verdict:
        events = Recorder() if events is None else events
        child = self._warden.spawn(
            *("taken-over", self._policy, {}),
            factory=0,
            fds=fds,
            guest_memory=0 if guest_memory is None else guest_memory.size,
        )
        memory = None if guest_memory is None else guest_memory.for_devices()
        with ProxyDevice(child, events, deadline=20, memory=memory) as device:
            read = device.handlers()[0].read(self._kind.number(what), 1)
            said = "".join(each[1] for each in events.seen if each[0] == "log")
            failure = str(device.failed or "")
        assert (read == ALL_ONES[1]) == bool(failure)
        return Verdict(read == 1, said, failure)

    def close(self) -> None:
        self._warden.close()


@contextmanager
def takeover(
    kind: type[TakenOver], policy: str, plan: JailPlan | None = None
) -> Iterator[Takeover]:
    """One, with all that there is to be had in this process."""
    with bait() as kind.targets:
        made = Takeover(kind, policy, plan)
        try:
            yield made
        finally:
            made.close()


def assert_stopped(tried: Attempt, verdict: Verdict) -> None:
    """It got nothing; if policies forbid what it needs, it was caught there."""
    assert not verdict.got, verdict.said
    assert_caught(verdict, *tried.calls)


def assert_caught(verdict: Verdict, *calls: str) -> None:
    """It ended in one of these system calls; without any, it did not end."""
    assert not verdict.got, verdict.said
    if calls:
        assert any(f"forbidden system call '{each}'" in verdict.failure for each in calls), verdict
    else:
        assert not verdict.failure


def descriptors(_host: DeviceHost) -> str:
    """All that its process has, as kind:device:inode."""
    found = []
    for fd in range(4096):
        try:
            about = os.fstat(fd)
        except OSError:
            continue
        found.append(f"{stat.S_IFMT(about.st_mode):o}:{about.st_dev}:{about.st_ino}")
    return " ".join(found)


def census(said: str, known: Mapping[str, int]) -> dict[str, int]:
    """How many of which there are in what `descriptors` said.

    Args:
        known: names of some, and descriptors of the same files in this process.
    """
    files = {(s.st_dev, s.st_ino): n for n, s in ((n, os.fstat(fd)) for n, fd in known.items())}
    kinds = {"20000": "null", "140000": "tube", "10000": "doorbell"}
    found: dict[str, int] = {}
    for each in said.split():
        kind, device, inode = each.split(":")
        name = files.get((int(device), int(inode))) or kinds.get(kind, each)
        found[name] = found.get(name, 0) + 1
    return found
