"""The warden's own process: forks device processes, watches over them, tells of their ends.

It was forked before the machine had threads, an engine or guest memory, and runs no device code.
It ends with the machine: when its control socket or the machine's process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NoReturn

import msgspec

from devices import registry
from devices.errors import UserError
from proxy import lane, launch
from proxy.errors import ProtocolFault, TubeClosed
from proxy.events import Obituary
from proxy.jail import (
    JailPlan,
    fork_into_jail,
    leave_terminal,
    prepare_warden,
    receive_violation,
)
from proxy.launch import DeviceFactory, Ready, StartReport, start_child
from proxy.tube import Tube, close_all, pair, receive_datagram

ORDER_LIMIT = 1 << 20
"""Bytes of the longest order or report."""
CLOSE_GRACE = 2.0
"""Seconds that devices have to clean up when the machine is gone."""


class SpawnOrder(msgspec.Struct, frozen=True, tag="spawn"):
    """Start a device; its descriptors travel with the message, in the order of `fd_names`.

    `guest_memory` is how many bytes of it a device with DMA will map; `finish_work`: see
    `devices.dma.Turns`.
    """

    name: str
    model: str
    options: dict[str, Any]
    factory: int | None
    fd_names: list[str]
    guest_memory: int = 0
    finish_work: bool = False


class CloseAll(msgspec.Struct, frozen=True, tag="close"):
    """End all devices, then yourself."""


class Launched(msgspec.Struct, frozen=True, tag="launched"):
    """A child interface's descriptors travel with this; `order` counts the orders from 0."""

    order: int
    pid: int
    jail_report: Any


class NotLaunched(msgspec.Struct, frozen=True, tag="refused"):
    """Why there is no device; `by_user` if its configuration is to blame."""

    order: int
    by_user: bool
    text: str


@dataclass
class _Child:
    name: str
    order: int
    pid: int
    pidfd: int
    setup: socket.socket | None
    give: list[int]
    """Descriptors for the machine, until the start is over."""
    start_by: float
    listener: int = -1
    syscall: str | None = None


def run_warden(
    control: socket.socket,
    events: socket.socket,
    machine: int,
    *,
    factories: Sequence[DeviceFactory],
    plan: JailPlan,
    deadline: float,
    keep_fds: Sequence[int],
) -> NoReturn:
    """Be the warden, in a process just forked from the machine.

    Args:
        control: orders come from here and are answered here.
        events: obituaries go here.
        machine: pidfd of the machine.
        factories: what orders may name by index.
        keep_fds: descriptors that the factories need.
    """
    status = 1
    try:
        gc.disable()
        gc.freeze()
        _leave_terminal()
        _close_others([control.fileno(), events.fileno(), machine, *keep_fds])
        prepare_warden(plan)
        _Warden(control, events, factories, plan, deadline).run(machine)
        status = 0
    finally:
        os._exit(status)


def _leave_terminal() -> None:
    """Neither the terminal's signals nor its input are for devices."""
    leave_terminal()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _close_others(keep: Sequence[int]) -> None:
    first = 3
    for fd in sorted({each for each in keep if each >= 3}):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


class _Warden:
    def __init__(
        self,
        control: socket.socket,
        events: socket.socket,
        factories: Sequence[DeviceFactory],
        plan: JailPlan,
        deadline: float,
    ) -> None:
        self._control = Tube(control, ORDER_LIMIT)
        self._events = events
        self._factories = factories
        self._plan = plan
        self._deadline = deadline
        self._children: dict[int, _Child] = {}
        self._poll = select.poll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._ending = False
        self._orders = 0
        self._imported: set[str] = set()
        self._watch(control.fileno(), self._take_order)

    def run(self, machine: int) -> None:
        """Serve until the control socket or the machine (a pidfd) is at its end."""
        self._watch(machine, self._end)
        while not self._ending:
            events = [(fd, self._watched[fd]) for fd, _ in self._poll.poll(self._timeout())]
            for fd, call in events:
                # Not what took over the number of a descriptor that an earlier event has closed:
                # some of these calls wait if there is nothing.
                if self._watched.get(fd) is call:
                    call()
            now = monotonic()
            for child in list(self._children.values()):
                if child.setup is not None and now >= child.start_by:
                    self._refuse(child, f"did not start within {self._deadline:g} s")
                    self._kill(child)
        self._bury_all()

    def _timeout(self) -> float | None:
        waits = [c.start_by for c in self._children.values() if c.setup is not None]
        return max(0.0, min(waits) - monotonic()) * 1000 + 1 if waits else None

    def _watch(self, fd: int, call: Callable[[], None]) -> None:
        self._watched[fd] = call
        self._poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _end(self) -> None:
        self._ending = True

    # Orders.

    def _take_order(self) -> None:
        try:
            data, fds = self._control.receive()
        except (TubeClosed, ProtocolFault):
            self._ending = True
            return
        except OSError as error:
            self._answer(NotLaunched(self._orders, False, str(error.strerror)))
            self._orders += 1
            return
        number = self._orders
        self._orders += 1
        try:
            order = msgspec.json.decode(data, type=SpawnOrder | CloseAll)
            if isinstance(order, CloseAll):
                self._ending = True
            else:
                self._launch(number, order, fds)
        except OSError as error:
            self._answer(NotLaunched(number, False, error.strerror or str(error)))
        finally:
            close_all(fds)

    def _launch(self, number: int, order: SpawnOrder, fds: list[int]) -> None:
        factory = None if order.factory is None else self._factories[order.factory]
        if factory is None:
            self._import(order.model)
        given = dict(zip(order.fd_names, fds, strict=True))
        name, memory, finishes = order.name, order.guest_memory, order.finish_work
        build = launch.Order(name, order.model, order.options, factory, given, memory, finishes)
        here, there = pair()
        setup_here, setup_there = pair()
        opened: list[int] = []
        page = pid = -1
        try:
            opened += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            if lane.supported():
                page = lane.create_page(order.name)
                opened.append(page)
            pid = fork_into_jail(self._plan)
            if pid == 0:
                start_child(
                    build, self._plan, setup_there, end=there, doorbell=opened[1], page_fd=page
                )
            pidfd = os.pidfd_open(pid)
            opened.append(pidfd)
            give = [here.fileno(), os.dup(pidfd), *opened[:-1]]
        except BaseException:
            here.close()
            setup_here.close()
            close_all(opened)
            if pid > 0:
                os.kill(pid, signal.SIGKILL)  # ours, and not waited for yet: the number is right
                os.waitpid(pid, 0)
            raise
        finally:
            there.close()
            setup_there.close()
        here.detach()
        start_by = monotonic() + self._deadline
        child = _Child(order.name, number, pid, pidfd, setup_here, give, start_by)
        self._children[pid] = child
        self._watch(setup_here.fileno(), lambda: self._hear(child))
        self._watch(pidfd, lambda: self._bury(child))

    def _import(self, model: str) -> None:
        """Import a model of our own here, once, so that its children share it and start fast.

        A model from elsewhere is imported in its child: what its module does is not ours to trust.
        """
        if model in registry.MODELS and model not in self._imported:
            self._imported.add(model)
            with contextlib.suppress(UserError):
                registry.load(model)
            gc.freeze()

    def _answer(self, answer: Launched | NotLaunched, fds: Sequence[int] = ()) -> None:
        try:
            self._control.send(msgspec.json.encode(answer), fds)
        except TubeClosed:
            self._ending = True

    # Children.

    def _hear(self, child: _Child) -> None:
        """Take one message of a child that is starting."""
        if child.setup is None:
            return
        try:
            data, fds = receive_datagram(child.setup, 1, socket.MSG_DONTWAIT)
            if data == launch.LISTENER and len(fds) == 1 and child.listener < 0:
                child.listener = fds[0]
                self._watch(fds[0], lambda: self._judge(child))
                return
            close_all(fds)
            report = msgspec.json.decode(data, type=StartReport)
        except BlockingIOError:
            return
        except (TubeClosed, ProtocolFault, OSError, msgspec.MsgspecError) as error:
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                self._refuse(child, str(error.strerror))
                self._kill(child)
                return
            # It is ending; its end is told by its pidfd.
            self._unwatch(child.setup.fileno())
            return
        if isinstance(report, Ready):
            self._end_start(child, Launched(child.order, child.pid, report.jail_report))
        else:
            self._refuse(child, report.text, report.by_user)

    def _refuse(self, child: _Child, text: str, by_user: bool = False) -> None:
        self._end_start(child, NotLaunched(child.order, by_user, text))

    def _end_start(self, child: _Child, answer: Launched | NotLaunched) -> None:
        """The start is over: answer the order and keep nothing of the child's tube."""
        if child.setup is None:
            return
        self._unwatch(child.setup.fileno())
        child.setup.close()
        child.setup = None
        give, child.give = child.give, []
        self._answer(answer, give if isinstance(answer, Launched) else ())
        close_all(give)
        # The others had to share the CPUs with it.
        start_by = monotonic() + self._deadline
        for other in self._children.values():
            other.start_by = start_by

    def _judge(self, child: _Child) -> None:
        """The seccomp listener is readable: a forbidden system call, or the end of the child."""
        name = receive_violation(child.listener)
        if name is None:
            self._unwatch(child.listener)
            return
        child.syscall = child.syscall or name
        self._kill(child)

    def _kill(self, child: _Child) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _bury(self, child: _Child) -> None:
        """Reap an ended child and tell of it."""
        if child.setup is not None:
            self._hear(child)
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        obituary = Obituary(
            child.name,
            child.pid,
            status=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            syscall=child.syscall,
        )
        starting = child.setup is not None
        self._refuse(child, f"{obituary.text()} while it started")
        self._unwatch(child.pidfd)
        os.close(child.pidfd)
        if child.listener >= 0:
            self._unwatch(child.listener)
            os.close(child.listener)
        del self._children[child.pid]
        if not starting:
            self._tell(obituary)

    def _tell(self, obituary: Obituary) -> None:
        # If the machine is gone, or has not listened to hundreds of these: it learns of each death
        # by the child's pidfd and tube all the same, only not of the cause.
        with contextlib.suppress(OSError):
            self._events.send(msgspec.json.encode(obituary), socket.MSG_DONTWAIT)

    def _bury_all(self) -> None:
        """The machine lets go: its ends of the tubes are closed, so devices clean up and end."""
        end = monotonic() + CLOSE_GRACE
        for child in list(self._children.values()):
            if child.setup is not None:
                self._kill(child)
                self._end_start(child, NotLaunched(child.order, False, "the warden ends"))
        while self._children:
            left = end - monotonic()
            poll = select.poll()
            for child in self._children.values():
                poll.register(child.pidfd, select.POLLIN)
            ended = {fd for fd, _ in poll.poll(max(left, 0) * 1000)}
            for child in list(self._children.values()):
                if child.pidfd in ended:
                    self._bury(child)
                elif left <= 0:
                    self._kill(child)
                    self._bury(child)
