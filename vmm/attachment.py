"""Devices as the machine sees them: in a jailed process or in its own, driven in the same way.

`Attachment` is one configured device with its place on the buses.

A device in the machine's own process is trusted: what it raises in its life (sleep, snapshot, ...)
becomes a `DeviceError` with its name, but what it raises in an access comes up through the engine
as what it is, a bug with a traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from devices.bus import Bus, BusDevice, BusType, Range, RangeConflict
from devices.contract import Adjustable, Region, TakesInput
from devices.errors import DeviceError, Subject, UserError
from devices.pci.contract import BarInfo, PciConfig
from devices.pci.intx import Slot
from proxy.device import ProxyDevice
from proxy.shape import Shape, wrong_shape
from vmm.config import DeviceConfig
from vmm.local import LocalTurns

_T = TypeVar("_T")


class Driven(Protocol):
    """What the machine asks of a device wherever it lives: `Device` and `ProxyDevice` both do."""

    def regions(self) -> tuple[Region, ...]: ...

    def handlers(self) -> Sequence[BusDevice]: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def snapshot(self) -> Any: ...

    def restore(self, saved: Any) -> None: ...


@dataclass
class Attachment:
    """One configured device.

    Attributes:
        config: as the user gave it.
        device: the model itself or its proxy.
        handlers: what its regions are on the bus; by default what the device says.
        slot: where a PCI function is plugged in.
        lines: the ISA lines of its pins; empty if it has none, or PCI routes them.
        placed: the ranges that were put on the buses for it at build time.
        local: what a device in this process has that its model does not see; None for a proxy.
    """

    config: DeviceConfig
    device: Driven
    handlers: Sequence[BusDevice] = ()
    slot: Slot | None = None
    lines: tuple[int, ...] = ()
    placed: list[tuple[BusType, Range]] = field(default_factory=list)
    local: LocalTurns | None = None

    def __post_init__(self) -> None:
        self.handlers = self.handlers or self._asked("handlers", self.device.handlers)
        if self.local is not None:
            self.handlers = self.local.handlers(self.handlers, self.regions())

    @property
    def name(self) -> str:
        return self.config.name

    # The device's life. What these raise is `DeviceError`, with the name of the configuration.

    def sleep(self) -> None:
        self._asked("sleep", self.device.sleep)
        if self.local is not None:
            self.local.sleep()

    def wake(self) -> None:
        self._asked("wake", self.device.wake)
        if self.local is not None:
            self.local.wake()

    def snapshot(self) -> Any:
        return self._asked("snapshot", self.device.snapshot)

    def restore(self, saved: Any) -> None:
        self._asked("restore", lambda: self.device.restore(saved))

    def receive(self, data: bytes) -> int:
        """Offer bytes from the outside world to a device that takes them: see `input`."""
        return self._asked("receive", lambda: cast(TakesInput, self.device).receive(data))

    def adjust(self, wanted: Mapping[str, Any]) -> None:
        """Give options other values, which were checked (`registry.adjusted`), while it runs."""
        self._asked("adjust", lambda: cast(Adjustable, self.device).adjust(**wanted))
        if self.local is not None:
            self.local.take()

    def regions(self) -> tuple[Region, ...]:
        """Its regions, of which each can be."""
        if isinstance(self.device, ProxyDevice):
            return self.device.regions()  # judged already
        return self._asked("regions", self._judged_regions)

    def bars(self) -> Sequence[BarInfo]:
        """The BARs of a PCI function."""
        function = cast(PciConfig, self.device)
        return self._asked("bars", lambda: tuple(function.bars()))

    def _judged_regions(self) -> tuple[Region, ...]:
        regions = tuple(self.device.regions())
        wrong = wrong_shape(Shape(regions))
        if not wrong and len(regions) != len(self.handlers):
            wrong = f"{len(regions)} regions and {len(self.handlers)} handlers"
        if wrong:
            raise DeviceError(self.name, wrong)
        return regions

    def _asked(self, what: str, call: Callable[[], _T]) -> _T:
        if isinstance(self.device, ProxyDevice):
            return call()  # raises nothing else, or it is our bug
        try:
            return call()
        except DeviceError as error:
            if error.device == self.name:
                raise
            # A model knows only what it is, not what it is called here.
            raise DeviceError(self.name, error.reason) from error
        except Exception as error:
            raise DeviceError(self.name, f"{what} failed: {error!r}") from error

    # What it is.

    def input(self) -> TakesInput | None:
        """The device as one that takes bytes from the outside world, if it does."""
        if isinstance(self.device, TakesInput) and getattr(self.device, "takes_input", True):
            return self
        return None

    def pci_function(self) -> PciConfig | None:
        """The device as a PCI function, if it is one."""
        if getattr(self.device, "is_pci", False):
            return cast(PciConfig, self.device)
        return None

    def place(self, buses: Mapping[BusType, Bus]) -> None:
        """Put the regions that have an address of their own on the buses.

        Raises:
            UserError: no address, one that is taken, or an option that is not for such a device.
            DeviceError: regions that cannot be.
        """
        regions = self.regions()
        fixed = [region for region in regions if region.start is not None]
        addr = self.config.addr
        if self.pci_function() is None and self.config.slot is not None:
            raise self._refused("slot", "is no PCI function: it takes no slot=")
        if self.pci_function() is not None and self.config.irq is not None:
            raise self._refused("irq", "is a PCI function: it takes no irq=")
        if addr is not None and (self.pci_function() or len(regions) != 1):
            raise self._refused("addr", "has no single bus region for addr= to move")
        for region, handler in zip(regions, self.handlers, strict=True):
            start = region.start if addr is None else addr
            if start is None:
                continue
            try:
                where = Range(start, region.length)
                buses[region.bus].insert(where, handler, self.name)
            except (RangeConflict, ValueError) as error:
                about = [Subject("addr", self.name)]
                if isinstance(error, RangeConflict) and error.owner:
                    about.append(Subject("addr", error.owner))
                problem = f"device '{self.name}': {error}; give it another addr="
                raise UserError(problem, *about) from error
            self.placed.append((region.bus, where))
        self.lines = tuple(region.irq for region in fixed if region.irq is not None)
        if self.config.irq is not None:
            self.lines = (self.config.irq,)

    def _refused(self, option: str, problem: str) -> UserError:
        return UserError(f"device '{self.name}' {problem}", Subject(option, self.name))
