"""What the device contract suite needs: subjects to test, access scripts, and spoiled states.

A *subject* is one device as the machine drives it. `Workshop.make_subject` builds it from the name
of its model in either of two ways, and the suite in ``test_device_contract.py`` cannot tell which.
"""

from __future__ import annotations

import copy
import os
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from fakes import FakeHost
from jail_tools import ORDINARY_UID

from devices.bus import BusDevice
from devices.contract import Device, NoState
from devices.errors import DeviceFailure
from devices.files import host_files, host_links
from devices.registry import load, parse_options
from proxy.device import ProxyDevice
from proxy.placement import Placement
from proxy.warden import Warden

IN_PROCESS, PROXIED, LANE = "in-process", "proxied", "proxied-lane"
"""`LANE`: proxied, with the shared-memory lane for busy stretches where the host has a free CPU."""


@dataclass(frozen=True)
class Access:
    """One access of a guest.

    Attributes:
        kind: "read", "write", "read-config" or "write-config".
        where: index of the region, or of the configuration dword.
        value: what is written; for a configuration write `size` bytes of it.
    """

    kind: str
    where: int
    offset: int
    size: int
    value: int = 0


class Subject:
    """One device under test.

    Args:
        device: a `Device` or its proxy.
        host: where the upcalls of the device end up.
    """

    def __init__(self, device: Any, host: FakeHost) -> None:
        self.device = device
        self.host = host
        self.regions = device.regions()
        self.handlers: tuple[BusDevice, ...] = tuple(device.handlers())

    @property
    def is_pci(self) -> bool:
        return bool(getattr(self.device, "is_pci", hasattr(self.device, "write_config")))

    @property
    def takes_input(self) -> bool:
        return bool(getattr(self.device, "takes_input", hasattr(self.device, "receive")))

    def perform(self, access: Access) -> object:
        """The value read, or what a configuration write changed on the buses."""
        match access.kind:
            case "read":
                return self.handlers[access.where].read(access.offset, access.size)
            case "write":
                return self.handlers[access.where].write(access.offset, access.size, access.value)
            case "read-config":
                return self.device.read_config(access.where)
            case _:
                data = access.value.to_bytes(access.size, "little")
                return self.device.write_config(access.where, access.offset, data)

    def run(self, script: list[Access]) -> list[object]:
        return [self.perform(access) for access in script]

    def saved(self) -> Any:
        """A snapshot taken as the machine takes it: asleep."""
        self.device.sleep()
        state = self.device.snapshot()
        self.device.wake()
        return state

    def take_up(self, state: Any) -> None:
        """Restore as the machine does: asleep."""
        self.device.sleep()
        try:
            self.device.restore(state)
        finally:
            self.device.wake()


class Upcalls:
    """`proxy.events.ProxyEvents` that end up in a `FakeHost`."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.failures: list[DeviceFailure] = []

    def irq(self, name: str, pin: int, level: bool) -> None:
        self.host.set_irq(level, pin)

    def msi(self, name: str, address: int, data: int) -> None:
        self.host.send_msi(address, data)

    def wrote_pages(self, name: str, runs: Sequence[tuple[int, int]]) -> None:
        for run in runs:
            self.host.wrote_pages(*run)

    def want_turn(self, name: str) -> None:
        self.host.calls.append(("want_turn",))

    def output(self, name: str, data: bytes) -> None:
        self.host.output(data)

    def input_wanted(self, name: str) -> None:
        self.host.input_wanted()

    def exit_request(self, name: str, value: int) -> None:
        self.host.request_exit(value)

    def log(self, name: str, text: str) -> None:
        self.host.log(text)

    def failed(self, failure: DeviceFailure) -> None:
        self.failures.append(failure)


@contextmanager
def given_files(kind: type[Device]) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """A file of 64 KiB, an empty directory or a link for each option of a model that needs one.

    Gives options and descriptors.
    """
    with ExitStack() as stack:
        fds = {}
        for name, file in host_files(kind.Options).items():
            if file.directory:
                path = stack.enter_context(TemporaryDirectory())
                if os.geteuid() == 0:
                    os.chown(path, ORDINARY_UID, ORDINARY_UID)
                fds[name] = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            else:
                fds[name] = os.memfd_create(name)
                os.truncate(fds[name], 1 << 16)
            stack.callback(os.close, fds[name])
        for name, link in host_links(kind.Options).items():
            if link.kind == "sockets":
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                stack.enter_context(ours)
                fds[name] = stack.enter_context(theirs).fileno()
        yield dict.fromkeys(fds, "file"), fds


class Workshop:
    """Makes subjects; owns the warden of those that are proxied."""

    def __init__(self) -> None:
        self._warden: Warden | None = None

    @contextmanager
    def make_subject(self, model: str, how: str) -> Iterator[Subject]:
        """A fresh device of `model` that is closed at the end.

        Args:
            how: `IN_PROCESS`, `PROXIED` or `LANE`.
        """
        if how == IN_PROCESS:
            making = self._in_process(model)
        else:
            making = self._proxied(model, Placement() if how == LANE else None)
        with making as subject:
            yield subject

    @contextmanager
    def _in_process(self, model: str) -> Iterator[Subject]:
        kind = load(model)
        with given_files(kind) as (options, fds):
            host = FakeHost(fds)
            device: Device = kind(host, parse_options(kind, options))
            try:
                yield Subject(device, host)
            finally:
                device.close()

    @contextmanager
    def _proxied(self, model: str, placement: Placement | None) -> Iterator[Subject]:
        if self._warden is None:
            self._warden = Warden()
        upcalls = Upcalls()
        with given_files(load(model)) as (options, fds):
            child = self._warden.spawn("subject", model, options, fds=fds)
            with ProxyDevice(child, upcalls, placement=placement) as device:
                yield Subject(device, upcalls.host)
        assert upcalls.failures == []

    def close(self) -> None:
        if self._warden is not None:
            self._warden.close()


def is_stateless(model: str) -> bool:
    """Whether the model declares that it has no state at all."""
    return load(model).State is NoState


# Access scripts.

_CONFIG_TARGETS = (1, 1, 3, 4, 5, 6, 7, 8, 9, 12, 15, *range(16, 40))
"""Dwords that a guest writes: command, cache line size, BARs, interrupt line, capabilities."""


def script(subject: Subject, seed: int, length: int = 200) -> list[Access]:
    """A repeatable guest that knows nothing of the device and tries everything."""
    chance = random.Random(seed)
    accesses = []
    for _ in range(length):
        if subject.is_pci and (not subject.regions or chance.random() < 0.3):
            accesses.append(_config_access(chance))
            continue
        where = chance.randrange(len(subject.regions))
        room = subject.regions[where].length
        # Registers crowd at the start of a region, mistakes at its end.
        spans = [min(room, 8), min(room, 64), room]
        offset = chance.choice([chance.randrange(chance.choice(spans)), room - 1])
        size = chance.choice([n for n in (1, 1, 2, 4, 8) if offset + n <= room])
        value = chance.choice([chance.randrange(1 << 8 * size), 1, 0, (1 << 8 * size) - 1])
        accesses.append(Access(chance.choice(["read", "write"]), where, offset, size, value))
    return accesses


def _config_access(chance: random.Random) -> Access:
    if chance.random() < 0.5:
        return Access("read-config", chance.randrange(64), 0, 4)
    offset = chance.randrange(4)
    size = chance.randint(1, 4 - offset)
    # Command bytes stay small: I/O, memory, bus master on and off.
    value = chance.choice([chance.randrange(1 << 8 * size), 7, (1 << 8 * size) - 1])
    return Access("write-config", chance.choice(_CONFIG_TARGETS), offset, size, value)


def every_read(subject: Subject) -> Iterator[Access]:
    """Each size at each offset; of a large region its pages' borders and its two ends."""
    for where, region in enumerate(subject.regions):
        near = {
            offset
            for border in range(0, region.length + 1, 4096)
            for offset in range(border - 9, border + 9)
        }
        near |= set(range(64))
        for offset in sorted(near & set(range(region.length))):
            for size in range(1, min(8, region.length - offset) + 1):
                yield Access("read", where, offset, size)


# Spoiled states.


def spoiled(state: Any) -> Iterator[tuple[str, Any]]:
    """States that no device of the model ever had, each with what is wrong with it."""
    for wrong in (None, 7, -1, 1.5, "text", [], [state], True):
        yield f"all of it is {wrong!r}", wrong
    yield from _spoiled_parts(state, state, ())


def _spoiled_parts(whole: Any, part: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    where = "/".join(map(str, path)) or "top"
    if isinstance(part, dict):
        yield f"{where}: unknown field", _with(whole, (*path, "no such field"), 0)
        for key, inner in part.items():
            # A key that is no name is one of a free mapping, which may lack it.
            if key.isidentifier():
                yield f"{where}: without {key}", _without(whole, (*path, key))
            yield from _spoiled_parts(whole, inner, (*path, key))
        return
    if isinstance(part, (list, tuple)):
        yield f"{where}: one more", _with(whole, path, [*part, {"odd": 1}])
        for index, inner in list(enumerate(part))[:8]:
            yield from _spoiled_parts(whole, inner, (*path, index))
        return
    if isinstance(part, bool):
        wrongs: list[Any] = [1, 0, "true", None, []]
    elif isinstance(part, int):
        wrongs = [-1, 1 << 64, 1 << 200, 1.5, "1", None, [part], {}]
    elif isinstance(part, str):
        wrongs = [7, None, [part], {}]
    else:
        wrongs = [{"odd": 1}, [part]]
    for wrong in wrongs:
        yield f"{where}: {wrong!r} for {part!r}", _with(whole, path, wrong)


def _with(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(whole)
    _holder(changed, path)[path[-1]] = value
    return changed


def _without(whole: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(whole)
    del _holder(changed, path)[path[-1]]
    return changed


def _holder(whole: Any, path: tuple[Any, ...]) -> Any:
    for step in path[:-1]:
        whole = whole[step]
    return whole
