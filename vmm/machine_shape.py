"""The first part of a machine's life: what it is to be made of, until it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from devices.contract import Device, DeviceHost
from devices.errors import UserError
from proxy.jail import JailMode
from vmm import sources
from vmm.config import (
    DEFAULT_MEMORY,
    ClockKind,
    DeviceConfig,
    DmaMode,
    HostOptions,
    MachineConfig,
    choice,
    default_devices,
    parse_size,
)
from vmm.console import ConsoleBuffer
from vmm.local import DeviceFactory
from vmm.outcome import ENDS_THE_RUN
from vmm.parts import Parts


class MachineShape:
    """What a machine is to be made of, until it is built.

    Args:
        config: its whole shape; None: `memory` and the default devices.
        memory: RAM in bytes, or as text ("64M"); ignored if `config` is given.
        devices: the devices; None: the default ones; ignored if `config` is given.
        clock: "real" or "virtual"; ignored if `config` is given.
        host: how this host runs it.
        jail: short for ``host.jail``.

    Raises:
        UserError: a configuration that cannot be.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        memory: int | str = DEFAULT_MEMORY,
        devices: tuple[DeviceConfig, ...] | None = None,
        clock: ClockKind | str = ClockKind.REAL,
        host: HostOptions | None = None,
        jail: JailMode | str | None = None,
    ) -> None:
        if config is None:
            size = parse_size(memory) if isinstance(memory, str) else memory
            config = MachineConfig(
                size,
                default_devices() if devices is None else devices,
                choice(ClockKind, clock, "clock"),
            )
        self.config = config
        self.host = host or HostOptions()
        if jail is not None:
            self.host = replace(self.host, jail=choice(JailMode, jail, "jail"))
        self.console = ConsoleBuffer()
        self.between: Callable[[], None] | None = None
        """Called between slices when anything happened; may call any method of the machine."""
        self._factories: dict[str, DeviceFactory] = {}
        self._parts: Parts | None = None
        self._signal = 0
        self._closed = False

    def add_device(
        self,
        model: str | type[Device] | Callable[[DeviceHost], Device],
        name: str | None = None,
        *,
        isolated: bool = True,
        addr: int | None = None,
        irq: int | None = None,
        slot: int | str | None = None,
        may_exit: bool | None = None,
        dma: DmaMode = DmaMode.SHARED,
        **options: Any,
    ) -> str:
        """Attach a device; only before the first `boot`, `restore` or `run`.

        Args:
            model: a model's name, a `Device` subclass of your own, or a function that makes a
                device from its `DeviceHost` (it runs in the device's process).
            isolated: False keeps the device in the machine's process.
            addr, irq, slot, dma: see `DeviceConfig`.
            may_exit: whether its exit requests are obeyed; None: if that is what the model is for.
            options: the model's own.

        Returns:
            The device's name.

        Raises:
            UserError: wrong options, a name that is taken, or a machine that is built already.
        """
        if self._parts is not None:
            raise UserError("devices can be added only before the machine is built")
        text, factory = sources.model_and_factory(model, options)
        if name is None:
            name = sources.free_name(text, {device.name for device in self.config.devices})
        if may_exit is None:
            may_exit = text in ENDS_THE_RUN
        device = DeviceConfig(name, text, options, isolated, addr, irq, slot, may_exit, dma)
        self.config = replace(self.config, devices=(*self.config.devices, device))
        if factory is not None:
            self._factories[name] = factory
        return name
