"""Devices in the machine's own process: their host, their turns, what they wait for.

The same rules as in a child (`proxy.child`, `proxy.host`), so that a model cannot tell the two
apart; only that what runs beside the guest there runs between two slices of it here.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from devices import registry
from devices.bus import BusDevice
from devices.contract import Device, DeviceHost, Region, TakesTurns, WaitsForRoom, Watches
from devices.dma import GuestMemory, Turns
from devices.errors import DeviceError, UserError
from proxy.events import ProxyEvents
from vmm.config import DeviceConfig
from vmm.events import EventLoop

DeviceFactory = Callable[[DeviceHost], Device]


class ModelFactory:
    """Makes a device of a class, with options that were parsed before."""

    def __init__(self, kind: type[Device], options: Any) -> None:
        self.kind = kind
        self._options = options

    def __call__(self, host: DeviceHost) -> Device:
        return self.kind(host, self._options)


class LocalHost:
    """The `DeviceHost` of a device that lives in the machine's own process."""

    def __init__(
        self, name: str, events: ProxyEvents, fds: Mapping[str, int], finish_work: bool = False
    ) -> None:
        self._name = name
        self._events = events
        self.fds = fds
        self.turns = Turns(self._wrote_runs, lambda: events.want_turn(name), finish_work)

    @property
    def memory(self) -> GuestMemory:
        return self.turns.memory

    def want_turn(self) -> None:
        self.turns.want_turn()

    def want_work(self) -> None:
        self.turns.want_work()
        self._events.want_turn(self._name)

    def set_irq(self, level: bool, pin: int = 0) -> None:
        self._events.irq(self._name, pin, level)

    def send_msi(self, address: int, data: int) -> None:
        self._events.msi(self._name, address, data)

    def wrote_pages(self, first: int, count: int) -> None:
        self._wrote_runs([(first, count)])

    def _wrote_runs(self, runs: Sequence[tuple[int, int]]) -> None:
        self._events.wrote_pages(self._name, runs)

    def output(self, data: bytes) -> None:
        self._events.output(self._name, data)

    def input_wanted(self) -> None:
        self._events.input_wanted(self._name)

    def request_exit(self, value: int) -> None:
        self._events.exit_request(self._name, value)

    def log(self, message: str) -> None:
        self._events.log(self._name, message)


class LocalHandler:
    """A region of a model that has turns."""

    def __init__(self, handler: BusDevice, synced: bool, local: LocalTurns) -> None:
        self.read = local.turns.reader(handler.read)
        self._handler = handler
        self._synced = synced
        self._local = local

    def write(self, offset: int, size: int, value: int) -> None:
        if self._synced:
            self._local.turns.write(self._handler.write, offset, size, value)
        else:
            self._handler.write(offset, size, value)
        self._local.watch()


class LocalTurns:
    """Turns, work and watched descriptors of one device in this process."""

    def __init__(self, device: Device, turns: Turns, loop: EventLoop) -> None:
        self.turns = turns
        self._device = device
        self._loop = loop
        self._watched: dict[int, int] = {}
        self._asleep = False
        # Once: these questions are slow, and `watch` is in the path of an access.
        self._watcher = device if isinstance(device, Watches) else None
        self._waiter = device if isinstance(device, WaitsForRoom) else None
        turns.attach(device)

    def handlers(
        self, handlers: Sequence[BusDevice], regions: Sequence[Region]
    ) -> Sequence[BusDevice]:
        """The device's handlers, with its turns around them if it has any."""
        device = self._device
        if not (device.dma or isinstance(device, (TakesTurns, Watches))):
            return handlers
        return [LocalHandler(h, r.synced, self) for h, r in zip(handlers, regions, strict=True)]

    def take(self) -> None:
        """The turn it wants, and the work; between two slices of execution."""
        self.turns.take()
        if self.turns.work_wanted:
            self.turns.work()
        self.watch()

    def sleep(self) -> None:
        self.turns.memory.flush()
        self._asleep = True
        self.watch()

    def wake(self) -> None:
        self.turns.memory.flush()
        self._asleep = False
        self.watch()

    def watch(self) -> None:
        """Wait for the descriptors that the model waits for now."""
        if self._watcher is None:
            return
        wanted: dict[int, int] = {}
        if not self._asleep:
            wanted = dict.fromkeys(self._watcher.watched(), select.EPOLLIN)
            if self._waiter is not None:
                for fd in self._waiter.full():
                    wanted[fd] = wanted.get(fd, 0) | select.EPOLLOUT
        if wanted == self._watched:
            return
        for fd, events in self._watched.items():
            if wanted.get(fd) != events:
                self._loop.remove(fd)
        for fd, events in wanted.items():
            if self._watched.get(fd) != events:
                self._loop.add(fd, lambda fd=fd: self._ready(fd), events)  # type: ignore[misc]
        self._watched = wanted

    def _ready(self, fd: int) -> None:
        assert self._watcher is not None
        self._watcher.ready(fd)
        self.watch()


def build_local(config: DeviceConfig, host: LocalHost, factory: DeviceFactory | None) -> Device:
    """A device in the machine's own process.

    Raises:
        UserError: unknown model or options.
        DeviceError: the model's constructor failed.
    """
    try:
        if factory is not None:
            return factory(host)
        model = registry.load(config.model)
        return model(host, registry.parse_options(model, config.options))
    except (UserError, DeviceError):
        raise
    except Exception as error:
        raise DeviceError(config.name, f"cannot be built: {error!r}") from error
