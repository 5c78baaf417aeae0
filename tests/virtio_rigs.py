"""Where the tests' own driver finds a device: in this process, in a jailed one, or in a jailed one
that gets grants instead of guest memory.

The fixture `place` makes a test run in all three. A `ProxyRig` is what a machine is to a proxied
device, without a CPU: guest memory is a memfd that the child maps, a doorbell is a synced write,
and a turn is given when the device asks for one.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from proxy_helpers import Recorder
from virtio_driver import RAM_SIZE, LocalRig
from virtio_echo import VirtioEcho

from devices.contract import Device
from devices.pci.decode import BUS_MASTER, COMMAND
from devices.virtio.balloon import Balloon
from devices.virtio.blk import Blk
from devices.virtio.console import Console
from devices.virtio.granted import AREA_LIMIT
from devices.virtio.net import Net
from devices.virtio.p9.device import P9
from devices.virtio.rng import Rng
from devices.virtio.vsock.device import Vsock
from proxy.child_interface import ChildInterface
from proxy.device import ProxyDevice
from proxy.jail import JailMode
from proxy.warden import Warden
from vmm.granted_proxy import GrantedProxy
from vmm.memory import GuestMemory

MODELS: dict[str, type[Device]] = {
    kind.model: kind for kind in (VirtioEcho, Blk, Rng, Console, Balloon, Net, P9, Vsock)
}
_OWN = [VirtioEcho]
"""Those that the registry does not know."""


class ProxyRig:
    """A model in a jailed process."""

    def __init__(
        self,
        warden: Warden,
        model: str,
        options: Mapping[str, Any] | None = None,
        fds: Mapping[str, int] | None = None,
        finish_work: bool = True,
    ) -> None:
        self._warden, self._model = warden, model
        self._options, self._fds = options or {}, fds or {}
        self._finish_work = finish_work
        self._memory = GuestMemory(RAM_SIZE)
        self.ram: Any = self._memory.view
        self.failures: list[Any] = []
        self._build()

    def _build(self) -> None:
        self.events = Recorder()
        self.events.failures = self.failures
        own = next((n for n, kind in enumerate(_OWN) if kind.model == self._model), None)
        child = self._warden.spawn(
            "device",
            self._model,
            self._options,
            factory=own,
            fds=self._fds,
            guest_memory=max(RAM_SIZE, AREA_LIMIT),
            finish_work=self._finish_work,
        )
        self.device = self._proxy(child)
        self._handlers = {
            info.bar: self.device.handlers()[info.region] for info in self.device.bars()
        }

    def _proxy(self, child: ChildInterface) -> ProxyDevice:
        memory = self._memory.for_devices()
        return ProxyDevice(child, self.events, deadline=20, memory=memory, map_config=False)

    def read(self, bar: int, offset: int, size: int) -> int:
        return self._handlers[bar].read(offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self._handlers[bar].write(offset, size, value)

    def read_config(self, register: int) -> int:
        return self.device.read_config(register)

    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None:
        self.device.write_config(register, offset, value.to_bytes(size, "little"))

    def settle(self) -> None:
        self.device.sync()
        while ("turn",) in self.events.seen:
            self.events.seen.remove(("turn",))
            self.device.sync()

    @property
    def irq(self) -> bool:
        self.device.drain()
        levels = [call[2] for call in self.events.seen if call[0] == "irq" and call[1] == 0]
        return bool(levels) and levels[-1]

    @property
    def messages(self) -> list[tuple[int, int]]:
        self.device.drain()
        return [call[1:] for call in self.events.seen if call[0] == "msi"]

    @property
    def logs(self) -> list[str]:
        self.device.drain()
        return [call[1] for call in self.events.seen if call[0] == "log"]

    @property
    def printed(self) -> bytes:
        self.device.sleep()  # until then a child may gather output
        self.device.wake()
        return self.events.text

    def receive(self, data: bytes) -> int:
        return self.device.receive(data)

    def adjust(self, **wanted: Any) -> None:
        self.device.adjust(**wanted)

    def snapshot(self) -> Any:
        self.device.sleep()
        return self.device.snapshot()

    def replace(self, saved: Any) -> None:
        """Go on in another process, started anew and restored."""
        text = self.events.text
        self.device.shutdown()
        self._build()
        self.events.text = text
        self.device.sleep()
        self.device.restore(saved)
        self.device.wake()
        self.settle()

    def wait(self) -> None:
        """Let the device do what takes time, for a moment."""
        waiter = select.poll()
        waiter.register(self.device.doorbell, select.POLLIN)
        waiter.poll(50)
        self.device.drain()

    def close(self) -> None:
        self.device.shutdown()
        with suppress(BufferError):
            self._memory.close()


class GrantedProxyRig(ProxyRig):
    """A model in a jailed process that gets grants instead of guest memory."""

    _master = False

    def _proxy(self, child: ChildInterface) -> ProxyDevice:
        def wrote(runs: Sequence[tuple[int, int]]) -> None:
            self.events.wrote_pages("device", runs)

        memory = self._memory.for_grants(wrote)
        return GrantedProxy(
            child, self.events, memory, lambda: self._master, deadline=20, map_config=False
        )

    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None:
        if (register, offset) == (COMMAND, 0):
            self._master = bool(value & BUS_MASTER)
        super().write_config(register, value, size, offset)


class Here(LocalRig):
    """A model in this process, with what `ProxyRig` has beside a `Rig`."""

    failures: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any) -> None:
        self._printed = b""
        super().__init__(*arguments)

    @property
    def printed(self) -> bytes:
        return self._printed + bytes(self.host.printed)

    def receive(self, data: bytes) -> int:
        taken: int = self.device.receive(data)
        return taken

    def adjust(self, **wanted: Any) -> None:
        self.device.adjust(**wanted)

    def replace(self, saved: Any) -> None:
        self._printed = self.printed
        super().replace(saved)

    def wait(self) -> None:
        """Let it read what it waits for, as the machine's loop does."""
        watched = getattr(self.device, "watched", list)()
        for fd in select.select(watched, [], [], 0.01)[0]:
            self.device.ready(fd)

    def close(self) -> None:
        self.device.close()


class Place:
    """Makes rigs of one kind."""

    def __init__(self, warden: Warden | None, granted: bool = False) -> None:
        self._warden = warden
        self._granted = granted
        self._made: list[Any] = []
        self._files: list[int] = []
        self._sockets: list[socket.socket] = []
        self._directories: list[str] = []
        self._kept: dict[str, Any] = {}

    @property
    def jailed(self) -> bool:
        return self._warden is not None

    def make(
        self,
        model: str,
        options: Mapping[str, Any] | None = None,
        fds: Mapping[str, int] | None = None,
        *,
        finish_work: bool = True,
    ) -> Any:
        """A rig; it is closed at the end of the test.

        Args:
            finish_work: have a jailed device do its slow work within the turn that wants it; else
                it is done when nobody waits, and a request stays in flight for a while.
        """
        if self._granted and not MODELS[model].grantable:
            pytest.skip(f"a {model} needs guest memory itself")
        kind = GrantedProxyRig if self._granted else ProxyRig
        if self._warden is None:
            rig: Any = Here(MODELS[model], options, fds)
        else:
            rig = kind(self._warden, model, options, fds, finish_work)
        self._made.append(rig)
        return rig

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The same thing whenever it is asked for in this test, by whatever example of it."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def the(self, model: str) -> Any:
        """The same rig whenever it is asked for in this test."""
        return self.kept(model, lambda: self.make(model))

    def memory_file(self, size: int = 1 << 17) -> int:
        """A file in memory; it is closed at the end of the test."""
        fd = os.memfd_create("file", os.MFD_ALLOW_SEALING)
        os.truncate(fd, size)
        self._files.append(fd)
        return fd

    def directory(self) -> int:
        """A directory with a file in it; it is gone at the end of the test."""
        path = tempfile.mkdtemp(prefix="virtio-")
        self._directories.append(path)
        Path(path, "file").write_bytes(b"contents")
        os.chmod(path, 0o777)  # root's devices are other users
        os.chmod(Path(path, "file"), 0o666)
        self._files.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        return self._files[-1]

    def cable(self, kind: int = socket.SOCK_STREAM) -> tuple[int, socket.socket]:
        """One end of a stream, and the other; both are closed at the end of the test."""
        here, there = socket.socketpair(socket.AF_UNIX, kind)
        here.setblocking(False)
        there.settimeout(20)
        self._sockets += [here, there]
        return here.fileno(), there

    def close(self) -> None:
        """End all of them; a device process must not have failed."""
        for rig in self._made:
            rig.close()
        failures = [failure for rig in self._made for failure in rig.failures]
        self._made.clear()
        for fd in self._files:
            os.close(fd)
        for end in self._sockets:
            end.close()
        for path in self._directories:
            shutil.rmtree(path)
        self._sockets.clear()
        self._directories.clear()
        self._files.clear()
        self._kept.clear()
        assert failures == []


@contextmanager
def virtio_wardens() -> Iterator[Warden]:
    """A warden that knows all of `MODELS`."""
    with Warden(list(_OWN), jail=JailMode.AUTO) as made:
        yield made
