"""`Warden`: the machine's handle of the process that forks and watches device processes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import weakref
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import msgspec

from devices.errors import DeviceError, UserError
from proxy.child_interface import ChildInterface
from proxy.errors import ProtocolFault, TubeClosed
from proxy.events import Obituary
from proxy.jail import JailMode, JailPlan, plan_jail
from proxy.launch import DeviceFactory
from proxy.tube import (
    MAX_DATAGRAM,
    MAX_DESCRIPTORS,
    Tube,
    close_all,
    pair,
    set_receive_deadline,
)
from proxy.warden_process import (
    ORDER_LIMIT,
    CloseAll,
    Launched,
    NotLaunched,
    SpawnOrder,
    run_warden,
)

_MARGIN = 2.0
"""Seconds that the warden has beyond the deadline of a start to say that it passed."""
_AT_ONCE = 8
"""Devices that start side by side; more would get in each other's way and miss the deadline."""


class Start:
    """A device process that was ordered: it starts while its machine does something else."""

    def __init__(self, name: str, take_answer: Callable[[], None]) -> None:
        self.name = name
        self._take_answer = take_answer
        self._result: ChildInterface | UserError | DeviceError | None = None

    @property
    def settled(self) -> bool:
        """Whether `wait` need not wait."""
        return self._result is not None

    def settle(self, result: ChildInterface | UserError | DeviceError) -> None:
        """What became of it."""
        self._result = result

    def fail(self, why: str) -> None:
        """There will be no such device process."""
        self.settle(DeviceError(self.name, f"cannot be started: {why}"))

    def wait(self) -> ChildInterface:
        """The device process, in its jail.

        Raises:
            UserError: the model, its options or its descriptors are wrong.
            DeviceError: it could not be started.
        """
        while self._result is None:
            self._take_answer()
        if not isinstance(self._result, ChildInterface):
            raise self._result
        return self._result


class Warden:
    """Forks the warden process at once; make one before threads, the engine and guest memory.

    Args:
        factories: what `spawn` may name by index, for devices that are not models by name.
        jail: how much jail each device gets.
        deadline: seconds within which a device must start.
        keep_fds: descriptors that the factories need; all others are closed in the warden.
        plan: a plan that was made before; else the host is probed now.

    Raises:
        UserError: the jail that was asked for cannot be had.
    """

    _closed = True
    """Also of one that a signal kept from being made, and which is dropped all the same."""

    def __init__(
        self,
        factories: Sequence[DeviceFactory] = (),
        *,
        jail: JailMode = JailMode.AUTO,
        deadline: float = 5.0,
        keep_fds: Sequence[int] = (),
        plan: JailPlan | None = None,
    ) -> None:
        self.plan = plan_jail(jail) if plan is None else plan
        self.dead = False
        """The warden's process has ended by itself; so have all its devices."""
        self._factories = len(factories)
        self._unread: list[Obituary] = []
        self._known: dict[int, Obituary] = {}
        self._pids: dict[str, int] = {}
        self._orders = 0
        self._starts: dict[int, Start] = {}
        self._children: weakref.WeakSet[ChildInterface] = weakref.WeakSet()
        self._owner = os.getpid()
        control, theirs = pair()
        self._events, events = pair()
        machine = os.pidfd_open(self._owner)
        self.pid = os.fork()
        if self.pid == 0:
            run_warden(
                theirs,
                events,
                machine,
                factories=factories,
                plan=self.plan,
                deadline=deadline,
                keep_fds=keep_fds,
            )
        os.close(machine)
        theirs.close()
        events.close()
        self._pidfd = os.pidfd_open(self.pid)
        self._control = Tube(control, ORDER_LIMIT)
        set_receive_deadline(control, deadline + _MARGIN)
        self._closed = False

    def fileno(self) -> int:
        """Readable when `obituaries` has something to say, or the warden is dead."""
        return self._events.fileno()

    def spawn(
        self,
        name: str,
        model: str,
        options: Mapping[str, Any],
        *,
        factory: int | None = None,
        fds: Mapping[str, int] | None = None,
        guest_memory: int = 0,
        finish_work: bool = False,
    ) -> ChildInterface:
        """Start a device process; it is in its jail when this returns.

        Args and raises: as `order`, and as `Start.wait`.
        """
        return self.order(
            name,
            model,
            options,
            factory=factory,
            fds=fds,
            guest_memory=guest_memory,
            finish_work=finish_work,
        ).wait()

    def order(
        self,
        name: str,
        model: str,
        options: Mapping[str, Any],
        *,
        factory: int | None = None,
        fds: Mapping[str, int] | None = None,
        guest_memory: int = 0,
        finish_work: bool = False,
    ) -> Start:
        """Have a device process started; several that were ordered start side by side.

        Args:
            name: the device's configured name.
            model: the model's name; with `factory` it only chooses the jail's policy.
            options: text or plain values.
            factory: index of what builds the device instead.
            fds: descriptors for the device; duplicated, the caller keeps its own.
            guest_memory: bytes of it that the device may map later, if it does DMA.
            finish_work: see `devices.dma.Turns`.

        Raises:
            UserError: too many descriptors, or no such factory.
            DeviceError: it cannot be started.
        """
        fds = fds or {}
        if len(fds) > MAX_DESCRIPTORS:
            raise UserError(f"device '{name}': at most {MAX_DESCRIPTORS} descriptors")
        if factory is not None and not 0 <= factory < self._factories:
            raise UserError(f"device '{name}': there is no factory {factory}")
        while len(self._starts) >= _AT_ONCE:
            self._take_answer()
        if self._closed or self.dead:
            raise DeviceError(name, "cannot be started: the warden is gone")
        order = SpawnOrder(
            name, model, dict(options), factory, list(fds), guest_memory, finish_work
        )
        try:
            self._control.send(msgspec.json.encode(order), list(fds.values()))
        except TubeClosed as error:
            self._lose()
            raise DeviceError(name, "cannot be started: the warden is gone") from error
        except OSError as error:
            raise DeviceError(name, f"cannot be started: {error.strerror}") from error
        start = self._starts[self._orders] = Start(name, self._take_answer)
        self._orders += 1
        return start

    def _take_answer(self) -> None:
        """Wait for what became of one of the orders, whichever comes first."""
        if self._closed or self.dead:
            self._fail_starts("the warden is gone")
            return
        try:
            data, got = self._control.receive()
        except (TubeClosed, BlockingIOError, ProtocolFault):
            self._lose()
            self._fail_starts("the warden is gone")
            return
        except OSError as error:
            # Whose answer that was is not known. A child whose descriptors are closed ends.
            self._fail_starts(error.strerror or str(error))
            return
        answer = msgspec.json.decode(data, type=Launched | NotLaunched)
        start = self._starts.pop(answer.order, None)
        if start is None or isinstance(answer, NotLaunched):
            close_all(got)
        if start is None:
            return
        if isinstance(answer, Launched):
            child = ChildInterface.from_fds(start.name, answer.pid, got, answer.jail_report)
            child.obituary_of = self._obituary_of
            self._pids[start.name] = answer.pid
            self._children.add(child)
            start.settle(child)
        elif answer.by_user:
            start.settle(UserError(answer.text))
        else:
            start.fail(answer.text)

    def _fail_starts(self, why: str) -> None:
        starts, self._starts = self._starts, {}
        for start in starts.values():
            start.fail(why)

    def obituaries(self) -> list[Obituary]:
        """The ends that were not told yet, in order; never waits."""
        self._listen(0)
        unread, self._unread = self._unread, []
        return unread

    def wait_obituary(self, name: str, timeout: float) -> Obituary | None:
        """How the latest process of this name ended, if it does within `timeout` seconds."""
        pid = self._pids.get(name)
        return None if pid is None else self._obituary_of(pid, timeout)

    def close(self) -> None:
        """End all devices, then the warden; nothing is left behind. Idempotent.

        Proxies should be shut down before; a device that was not is ended by closing its tube.
        """
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for child in list(self._children):
            child.close()
        with contextlib.suppress(TubeClosed):
            self._control.send(msgspec.json.encode(CloseAll()))
        self._control.close()  # and with it what comes of orders that nobody waits for any more
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(10_000):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._listen(0)
        self._events.close()
        os.close(self._pidfd)

    def __enter__(self) -> Warden:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _obituary_of(self, pid: int, timeout: float) -> Obituary | None:
        end = monotonic() + timeout
        while pid not in self._known:
            left = end - monotonic()
            if self.dead or self._closed or left < 0:
                return None
            self._listen(left)
        return self._known[pid]

    def _listen(self, timeout: float) -> None:
        """Take what the warden tells, waiting at most `timeout` seconds for the first."""
        poll = select.poll()
        if self.dead:
            return
        poll.register(self._events, select.POLLIN)
        while poll.poll(timeout * 1000):
            timeout = 0
            try:
                data = self._events.recv(MAX_DATAGRAM, socket.MSG_DONTWAIT)
            except OSError:
                data = b""
            if not data:
                self._lose()
                return
            obituary = msgspec.json.decode(data, type=Obituary)
            self._known[obituary.pid] = obituary
            self._unread.append(obituary)

    def _lose(self) -> None:
        """The warden is gone, and with it goes every device (they die with their parent)."""
        self.dead = True
