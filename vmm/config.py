"""The machine's configuration: one validated value, saved in every snapshot's manifest.

A machine is built from it in the same way at boot and at restore. What belongs to the host and not
to the machine (jail mode, deadlines, where the console goes) is in `HostOptions` and is not saved.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from devices.errors import Subject, UserError
from proxy.jail import JailMode
from proxy.shape import ISA_LINES
from vmm.outcome import ENDS_THE_RUN
from vmm.places import Place

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
"""Device names become file names in a snapshot, so they are kept to this."""

NOT_GRANTABLE = (
    "dma=granted is for devices that need no more of guest memory than the requests in their "
    "virtqueues; leave it out"
)

OF_ANY_FUNCTION = ("name", "slot", "isolation", "dma")
"""Options of every PCI function, which the short forms of disks and cards take too."""

DEFAULT_MEMORY = 128 << 20
CONSOLE = "serial"
"""The name of the device that the terminal is connected to, if there is one."""


class DmaMode(enum.StrEnum):
    """How the process of a device with DMA gets at guest memory.

    SHARED: it maps all RAM. GRANTED: it sees the bytes of its requests (`vmm.grants`).
    """

    SHARED = "shared"
    GRANTED = "granted"


@dataclass(frozen=True)
class DeviceConfig:
    """One device of a machine.

    Attributes:
        name: unique in the machine; keys its state in snapshots.
        model: a name from `devices.registry`, or ``package.module:Class``.
        options: the model's own options.
        isolated: whether it gets a jailed process; False keeps it in the machine's process.
        addr: where its only bus region starts; None: where the model says.
        irq: the ISA interrupt line (0..15, not 2) of its pin; None: what the model says.
        slot: its PCI slot, ``[BRIDGE:]DEVICE[.FUNCTION]`` (a number alone is a device); None: the
            lowest free device of the root bus.
        may_exit: whether its exit requests are obeyed.
        dma: how it gets at guest memory, if it does DMA.
    """

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    isolated: bool = True
    addr: int | None = None
    irq: int | None = None
    slot: int | str | None = None
    may_exit: bool = False
    dma: DmaMode = DmaMode.SHARED

    def __post_init__(self) -> None:
        where = f"device '{self.name}'"
        object.__setattr__(self, "dma", choice(DmaMode, self.dma, f"{where}: dma", self._on("dma")))
        if self.dma is DmaMode.GRANTED and not self.isolated:
            raise UserError(
                f"{where}: dma=granted is for a process of its own, which isolation=none takes "
                "away",
                self._on("dma"),
                self._on("isolation"),
            )
        if type(self.name) is not str or not NAME.fullmatch(self.name):
            raise UserError(
                f"device name '{self.name}': use 1 to 32 of a-z 0-9 . _ -, first a letter or digit",
                self._on("name"),
            )
        for key, value in (("irq", self.irq), ("addr", self.addr)):
            if value is not None and type(value) is not int:
                raise UserError(f"{where}: {key}={value!r} is not an integer", self._on(key))
        if self.irq is not None and self.irq not in ISA_LINES:
            raise UserError(
                f"{where}: irq={self.irq} is not a line from 0 to 15 without 2", self._on("irq")
            )
        if self.slot is not None:
            if type(self.slot) not in (int, str):
                problem = 'is no slot; write a number, or text such as "3.1"'
                raise UserError(f"{where}: slot={self.slot!r} {problem}", self._on("slot"))
            try:
                place = Place.parse(str(self.slot))
            except UserError as error:
                raise UserError(f"{where}: {error}", self._on("slot")) from None
            object.__setattr__(self, "slot", str(place))
        if self.addr is not None and not 0 <= self.addr < 1 << 64:
            raise UserError(f"{where}: addr={self.addr:#x} is no 64-bit address", self._on("addr"))

    def _on(self, option: str) -> Subject:
        return Subject(option, self.name)


_Kind = TypeVar("_Kind", bound=enum.StrEnum)


def choice(kind: type[_Kind], text: str, what: str, *about: Subject) -> _Kind:
    """The member of `kind` that `text` names.

    Raises:
        UserError: none; `what` says of what.
    """
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(kind)
        raise UserError(f"{what} is one of {known}, not {text!r}", *about) from None


class ClockKind(enum.StrEnum):
    """What guest time follows.

    REAL: the host's clock; a halted guest sleeps. VIRTUAL: the code that the guest executes; idle
    time is skipped, and the same start gives the same run.
    """

    REAL = "real"
    VIRTUAL = "virtual"


@dataclass(frozen=True)
class MachineConfig:
    """The shape of a machine: what a snapshot must find again.

    Attributes:
        memory: RAM in bytes.
        devices: in the order of the command line.
        clock: what guest time follows.
        rom: bytes of firmware ROM below 4 GiB; 0: none.
    """

    memory: int = DEFAULT_MEMORY
    devices: tuple[DeviceConfig, ...] = ()
    clock: ClockKind = ClockKind.REAL
    rom: int = 0

    def __post_init__(self) -> None:
        for what, value in (("memory", self.memory), ("rom", self.rom)):
            if type(value) is not int:
                raise UserError(f"{what} is a number of bytes, not {value!r}")
        object.__setattr__(self, "clock", choice(ClockKind, self.clock, "clock"))
        seen: set[str] = set()
        for device in self.devices:
            if device.name in seen:
                raise UserError(
                    f"device '{device.name}': another one has this name; give one of them a name=",
                    Subject("name", device.name),
                )
            seen.add(device.name)


class FailurePolicy(enum.StrEnum):
    """What the machine does when a device process dies, hangs or breaks the protocol."""

    STOP = "stop"
    ISOLATE = "isolate"


@dataclass(frozen=True)
class HostOptions:
    """How this host runs a machine; not part of its shape.

    Attributes:
        jail: which layers the device processes must have.
        deadline: seconds that the machine waits for an answer of a device process.
        on_failure: what a device failure means for the run.
        fast_lane: whether accesses may go through shared memory while they come thick and fast.
    """

    jail: JailMode = JailMode.AUTO
    deadline: float = 5.0
    on_failure: FailurePolicy = FailurePolicy.STOP
    fast_lane: bool = True

    def __post_init__(self) -> None:
        # Text stands for its mode, and nothing else passes for one: modes are compared by identity.
        object.__setattr__(self, "jail", choice(JailMode, self.jail, "jail"))
        policy = choice(FailurePolicy, self.on_failure, "on_failure")
        object.__setattr__(self, "on_failure", policy)
        if not 0 < self.deadline < float("inf"):
            raise UserError(f"a deadline of {self.deadline} s cannot be")


def default_devices() -> tuple[DeviceConfig, ...]:
    """What every machine has unless told otherwise: serial, echo, a PCI function, debug exit."""
    return (
        DeviceConfig(CONSOLE, "serial"),
        DeviceConfig("echo", "echo"),
        DeviceConfig("config-space", "config-space"),
        debug_exit(),
    )


def debug_exit() -> DeviceConfig:
    """The debug-exit port: in the machine's process, since it ends the machine."""
    return DeviceConfig("debug-exit", "debug-exit", isolated=False, may_exit=True)


_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)\s*([kmg]?)(i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """A size in bytes from ``64M``, ``1G``, ``0x100000`` or plain bytes.

    Raises:
        UserError: it is none of these.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"'{text}' is not a size; write for example 64M, 1G or 0x4000000")
    return int(match[1], 0) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def parse_device(text: str, taken: Iterable[str]) -> DeviceConfig:
    """A device from ``MODEL[,option=value]...``.

    ``name=``, ``addr=``, ``irq=``, ``slot=``, ``isolation=jail|none`` and ``dma=shared|granted``
    mean the same for every model; all else is the model's. One that is true or false is true if
    it stands alone, without a value.

    Args:
        taken: names that are in use; a device without ``name=`` avoids them.

    Raises:
        UserError: the text is not of that form, or the model lacks such an option.
    """
    where = f"--device {text}"
    try:
        model, options = split_options(text, alone=switches(text))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return device_from(where, model, options, taken)


def switches(text: str) -> tuple[str, ...]:
    """What may stand without a value in ``MODEL[,option=value]...``; nothing, if there is none."""
    from devices import registry

    try:
        return registry.switches(registry.load(text.partition(",")[0]))
    except UserError:
        return ()


def split_options(
    text: str, several: str = "", alone: tuple[str, ...] = ()
) -> tuple[str, dict[str, Any]]:
    """What ``FIRST[,option=value]...`` says.

    Args:
        several: the option that may be given several times; its values are joined by ``+``.
        alone: the options that are true if they stand without a value.

    Raises:
        UserError: it is not of that form, or an option is given twice.
    """
    first, *pairs = text.split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if pair in alone:
            equals, value = "=", "true"
        if not key or not equals:
            raise UserError(f"'{pair}' is not option=value")
        if key in options:
            if key != several:
                raise UserError(f"option '{key}' is given twice")
            value = f"{options[key]}+{value}"
        options[key] = value
    return first, options


def device_from(
    where: str, model: str, options: Mapping[str, Any], taken: Iterable[str]
) -> DeviceConfig:
    """A device from its model and the options that a user gave, as text or as plain values.

    Args:
        where: begins the message of what is wrong with the general options.
        taken: as in `parse_device`.

    Raises:
        UserError: an option is wrong.
    """
    from devices import registry

    own = dict(options)
    isolation = own.pop("isolation", "jail")
    if isolation not in ("jail", "none"):
        raise UserError(
            f"{where}: isolation is 'jail' or 'none', not '{isolation}'",
            Subject("isolation", model),
        )
    general = {key: _number(where, model, key, own) for key in ("addr", "irq")}
    granting = Subject("dma", model)
    dma = choice(DmaMode, own.pop("dma", DmaMode.SHARED), f"{where}: dma", granting)
    slot = own.pop("slot", None)
    name = own.pop("name", "")
    if name == "":
        name = _free_name(model, taken)
    kind = registry.load(model)
    own = registry.inline_files(kind, own)
    registry.parse_options(kind, own)
    if dma is DmaMode.GRANTED and not kind.grantable:
        raise UserError(f"{where}: {NOT_GRANTABLE}", granting)
    return DeviceConfig(
        name,
        model,
        own,
        isolated=isolation == "jail",
        slot=slot,
        may_exit=model in ENDS_THE_RUN,
        dma=dma,
        **general,
    )


def _number(where: str, model: str, key: str, options: dict[str, Any]) -> int | None:
    value = options.pop(key, None)
    if value is None or type(value) is int:
        return value
    try:
        return int(value, 0)
    except (ValueError, TypeError):
        raise UserError(f"{where}: {key}={value} is not a number", Subject(key, model)) from None


def _free_name(model: str, taken: Iterable[str]) -> str:
    base = re.sub(r"[^a-z0-9._-]", "-", model.rpartition(":")[2].lower())[:28] or "device"
    names = set(taken)
    if base not in names:
        return base
    return next(name for n in range(2, 1000) if (name := f"{base}-{n}") not in names)


def difference(saved: MachineConfig, wanted: MachineConfig) -> str | None:
    """How two shapes differ, in words that name the first difference; None if they do not."""
    if saved.memory != wanted.memory:
        return f"memory is {saved.memory >> 20} MiB there and {wanted.memory >> 20} MiB here"
    if saved.clock != wanted.clock:
        return f"the clock is {saved.clock} there and {wanted.clock} here"
    if saved.rom != wanted.rom:
        return f"the firmware has {saved.rom} bytes there and {wanted.rom} here"
    there: Mapping[str, DeviceConfig] = {device.name: device for device in saved.devices}
    here: Mapping[str, DeviceConfig] = {device.name: device for device in wanted.devices}
    for name in there:
        if name not in here:
            return f"device '{name}' is missing here"
    for name, device in here.items():
        if name not in there:
            return f"device '{name}' is not in the snapshot"
        if device != there[name]:
            return f"device '{name}' is configured differently"
    return None
