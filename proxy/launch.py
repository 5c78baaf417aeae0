"""How a device process starts: build the model, enter the jail, report, serve."""

from __future__ import annotations

import gc
import os
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import msgspec

from devices import registry
from devices.contract import Device, DeviceHost
from devices.errors import DeviceError, UserError
from devices.files import directories
from proxy import lane
from proxy.child import ChildLoop
from proxy.errors import ProtocolFault
from proxy.host import ChildHost
from proxy.jail import JailPlan, SharedDirectory, enter_jail, policy_for
from proxy.tube import send, send_with_fds

DeviceFactory = Callable[[DeviceHost], Device]

# Exit statuses of a device process, after sysexits.h.
DEVICE_BUG = 70
START_FAILED = 71
PROTOCOL = 76

LISTENER = b"listener"
"""The datagram that carries the seccomp listener to the warden."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child is in its jail and waits for `Activate`."""

    jail_report: Any


class StartFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The child could not start; `by_user` if its configuration is to blame."""

    by_user: bool
    text: str


StartReport = Ready | StartFailed


@dataclass(frozen=True)
class Order:
    """What is to be built, in the child.

    Attributes:
        name: the device's configured name.
        model: the model's name.
        options: text or plain values.
        factory: builds the device instead of `model` and `options`, or None.
        fds: descriptors for the device, by option name.
        guest_memory: bytes of guest memory that a device with DMA will map.
        finish_work: see `devices.dma.Turns`.
    """

    name: str
    model: str
    options: Mapping[str, Any]
    factory: DeviceFactory | None
    fds: Mapping[str, int]
    guest_memory: int = 0
    finish_work: bool = False


def start_child(
    order: Order,
    plan: JailPlan,
    setup: socket.socket,
    *,
    end: socket.socket,
    doorbell: int,
    page_fd: int,
) -> NoReturn:
    """Be the device process from the fork to its end.

    Everything that the device will import is imported when its model is built, before the jail.
    """
    status = START_FAILED
    try:
        try:
            host = ChildHost(end, doorbell, order.fds, order.finish_work)
            device = _build(order, host)
            page = lane.map_page(page_fd) if page_fd >= 0 else None
            keep = [end.fileno(), doorbell, setup.fileno(), *order.fds.values()]
            loop = ChildLoop(end, host, device, page)
            gc.freeze()
            policy = policy_for(order.model)
            if policy.keeps_size:
                policy = replace(policy, file_size=_largest(order.fds.values()))
            shared = _shared(device, order.fds)
            if shared is not None and not shared.writable:
                policy = policy.reading()
            if device.dma:
                policy = replace(policy, more_memory=policy.more_memory + order.guest_memory)
            report = enter_jail(
                plan,
                policy,
                keep,
                lambda listener: send_with_fds(setup, LISTENER, [listener]),
                shared,
            )
            device.on_sandboxed()
        except (UserError, DeviceError) as error:
            text = error.reason if isinstance(error, DeviceError) else str(error)
            _report(setup, StartFailed(isinstance(error, UserError), text))
            raise
        except Exception as error:
            _report(setup, StartFailed(False, f"{type(error).__name__}: {error}"))
            raise
        _report(setup, Ready(msgspec.to_builtins(report)))
        setup.close()
        gc.enable()
        status = _serve(loop, host)
    finally:
        os._exit(status)


def _build(order: Order, host: DeviceHost) -> Device:
    if order.factory is not None:
        return order.factory(host)
    kind = registry.load(order.model)
    return kind(host, registry.parse_options(kind, order.options))


def _largest(fds: Iterable[int]) -> int:
    """The size of the largest file or block device."""
    files = [fd for fd in fds if stat.S_IFMT(os.fstat(fd).st_mode) in (stat.S_IFREG, stat.S_IFBLK)]
    # A block device has no size in its status.
    return max((os.lseek(fd, 0, os.SEEK_END) for fd in files), default=0)


def _shared(device: Device, fds: Mapping[str, int]) -> SharedDirectory | None:
    """The directory among a device's descriptors.

    Raises:
        UserError: there are several; only one can be the root.
    """
    found = [
        SharedDirectory(fds[name], writable)
        for name, writable in directories(device.options).items()
        if name in fds
    ]
    if len(found) > 1:
        raise UserError(f"device model '{device.model}' shares more than one directory")
    return found[0] if found else None


def _report(setup: socket.socket, report: StartReport) -> None:
    send(setup, msgspec.json.encode(report))


def _serve(loop: ChildLoop, host: ChildHost) -> int:
    """Serve until the end; the exit status. Nothing here may open a source file."""
    try:
        loop.serve()
    except ProtocolFault as fault:
        host.last_words(f"the machine broke the protocol: {fault}")
        return PROTOCOL
    except BaseException as error:
        host.last_words(f"{type(error).__name__}: {error}{_place(error)}")
        return DEVICE_BUG
    return 0


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
