"""The device processes of one machine: their warden, and what each is ordered to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devices import registry
from devices.contract import Device
from devices.errors import Subject, UserError, concerning
from devices.virtio.granted import AREA_LIMIT
from proxy.child_interface import ChildInterface
from proxy.device import ProxyDevice
from proxy.jail import JailMode, JailUnavailable
from proxy.tube import close_all
from proxy.warden import Start, Warden
from vmm.config import (
    NOT_GRANTABLE,
    ClockKind,
    DeviceConfig,
    DmaMode,
    HostOptions,
    MachineConfig,
)
from vmm.granted_proxy import GrantedProxy
from vmm.host_files import HostFiles
from vmm.local import DeviceFactory, ModelFactory
from vmm.memory import GuestMemory
from vmm.network.links import Links, open_links
from vmm.wiring import Wiring

DEBUG_EXIT = "debug-exit"
"""The one model that needs no process: all it can do is end the machine."""


@dataclass(frozen=True)
class Children:
    """Device processes that start while the rest of the machine is built.

    Attributes:
        warden: their parent; it is there even if there is none.
        starts: by device name.
        jail_line: what a user must be told about their jails; "" if all is well.
        links: by device name: the host's ends of its links.
    """

    warden: Warden
    starts: Mapping[str, Start]
    jail_line: str
    links: Mapping[str, Links]


def order_children(
    config: MachineConfig,
    host: HostOptions,
    factories: Mapping[str, DeviceFactory],
    host_files: HostFiles,
) -> Children:
    """Fork the warden and have all isolated devices started.

    Raises:
        UserError: a jail that cannot be had, options, a file that cannot be opened.
        DeviceError: a device that cannot be started.
    """
    unjailed = _without_process(config)
    if unjailed and host.jail is JailMode.STRICT:
        raise JailUnavailable(
            f"--jail=strict cannot be had: without a process of their own are {_listed(unjailed)}; "
            "give them isolation=jail",
            (),
            *(Subject("isolation", name) for name in unjailed),
        )
    isolated = [device for device in config.devices if device.isolated]
    for device in isolated:
        if device.model in registry.MODELS:
            registry.load(device.model)  # once in this process: each warden inherits it
    own = [device.name for device in isolated if device.name in factories]
    links: dict[str, Links] = {}
    warden = Warden([factories[name] for name in own], jail=host.jail, deadline=host.deadline)
    try:
        lines = [warden.plan.one_line()]
        if unjailed:
            lines.append(
                f"jail: none for {_listed(unjailed)} (isolation=none): no process of their own, "
                "all the rights of this user"
            )
        starts = {}
        for device in isolated:
            factory = factories.get(device.name)
            with concerning(Subject(device=device.name)):
                _check_dma(device, factory)
                links[device.name] = links_for(device, factory, host_files)
                fds = files_for(device, factory, host_files)
                try:
                    starts[device.name] = warden.order(
                        device.name,
                        device.model,
                        device.options,
                        factory=own.index(device.name) if device.name in own else None,
                        fds=fds | links[device.name].fds,
                        guest_memory=config.memory if device.dma is DmaMode.SHARED else AREA_LIMIT,
                        finish_work=config.clock is ClockKind.VIRTUAL,
                    )
                finally:
                    close_all(list(fds.values()))
    except BaseException:
        warden.close()
        for each in links.values():
            each.close()
        raise
    return Children(warden, starts, "\n".join(line for line in lines if line), links)


def model_of(device: DeviceConfig, factory: DeviceFactory | None) -> type[Device] | None:
    """The model's class; None for a function that makes a device."""
    if isinstance(factory, ModelFactory):
        return factory.kind
    return registry.load(device.model) if factory is None else None


def files_for(
    device: DeviceConfig, factory: DeviceFactory | None, host_files: HostFiles
) -> dict[str, int]:
    """See `HostFiles.open`."""
    kind = model_of(device, factory)
    return {} if kind is None else host_files.open(device, kind)


def links_for(device: DeviceConfig, factory: DeviceFactory | None, host_files: HostFiles) -> Links:
    """See `open_links`; what the descriptors are is put to the files'."""
    kind = model_of(device, factory)
    with host_files.naming_snapshot(device.name):
        links = Links(device.name, {}) if kind is None else open_links(device, kind)
    for option, fd in links.fds.items():
        host_files.hold(device.name, option, fd)
    return links


def proxy_for(
    child: ChildInterface,
    device: DeviceConfig,
    factory: DeviceFactory | None,
    wiring: Wiring,
    memory: GuestMemory,
    **how: Any,
) -> ProxyDevice:
    """The proxy of a process that has started, with as much of guest memory as it may have.

    Args:
        how: see `ProxyDevice`.

    Raises:
        UserError: it needs more of guest memory than it may have.
        DeviceError: it cannot be activated.
    """
    if device.dma is DmaMode.GRANTED:
        return GrantedProxy(
            child,
            wiring,
            memory.for_grants(wiring.cpu.invalidate_pages),
            lambda: wiring.may_master(device.name),
            **how,
        )
    kind = model_of(device, factory)
    may_map = kind is None or kind.dma  # whatever it says itself
    return ProxyDevice(child, wiring, memory=memory.for_devices() if may_map else None, **how)


def _check_dma(device: DeviceConfig, factory: DeviceFactory | None) -> None:
    kind = model_of(device, factory)
    if device.dma is DmaMode.GRANTED and kind is not None and not kind.grantable:
        raise UserError(f"device '{device.name}': {NOT_GRANTABLE}", Subject("dma", device.name))


def _without_process(config: MachineConfig) -> list[str]:
    """The devices that no jail holds, apart from the debug-exit port."""
    return [
        device.name
        for device in config.devices
        if not device.isolated and device.model != DEBUG_EXIT
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
