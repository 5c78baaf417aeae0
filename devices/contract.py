"""What a device model is, in small contracts; a model takes up those that it needs.

- `BusDevice` (in `devices.bus`): answers reads and writes of one range.
- `Device`: the base of every model: regions, state, sleep/wake, snapshot/restore.
- `TakesInput`: bytes from the outside world (a typed character) reach it.
- `TakesTurns`, `HasWork`, `Watches`, `WaitsForRoom`: it does DMA or waits for its host (see
  `devices.dma`).
- `TakesGrants`: it can do with the bytes of its requests instead of guest memory.
- `PciFunction` (in `devices.pci`): has a configuration space.
- `DeviceHost`: the other direction, what a model may ask of the machine that holds it.

A model never knows where it is mapped, whether it runs in the machine's process or in a jailed
child, nor what time it is on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import msgspec

from devices.bus import BusDevice, BusType, Range
from devices.errors import DeviceError

if TYPE_CHECKING:
    from devices.dma import GuestMemory

U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
FileBytes = Annotated[bytes, msgspec.Meta(description="the contents of a file")]
"""The type of an option that a user sets to the name of a file, see `registry.inline_files`."""


@dataclass(frozen=True, slots=True)
class Region:
    """One stretch of addresses that a model answers for.

    Attributes:
        name: for people: "registers", "bar0".
        bus: the address space it lies in.
        length: its size in bytes.
        start: where the machine puts it unless its configuration says otherwise; None when only
            the guest decides (a PCI BAR).
        irq: the ISA interrupt line that the device's pin is wired to unless the machine's
            configuration says otherwise; None: no line, or one that PCI routes. If several regions
            have one, pin 0 is that of the first, pin 1 of the second.
        synced: the guest goes on after a write only when the device has carried it out, with all
            that it told the machine on the way; other writes may be posted.
        ahead: offset 0 is a port of data that may be read ahead, see `ReadsAhead`.
    """

    name: str
    bus: BusType
    length: int
    start: int | None = None
    irq: int | None = None
    synced: bool = False
    ahead: bool = False

    def range(self) -> Range | None:
        return None if self.start is None else Range(self.start, self.length)


class DeviceHost(Protocol):
    """What a model may ask of the machine. In a jailed child each call is one message."""

    @property
    def fds(self) -> Mapping[str, int]:
        """Descriptors that the machine opened for this device, by the option that named them."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM, for a model with `Device.dma`; for any other it has no bytes.

        To be used in turns only, see `devices.dma`; never in the constructor.
        """
        ...

    def want_turn(self) -> None:
        """Have `TakesTurns.turn` called soon: at the end of this synced write, else with the vCPU
        stopped between two instructions. Asking again before that changes nothing.

        It is no state: a model asks again in `Device.wake` for what it still has to do.
        """
        ...

    def want_work(self) -> None:
        """Have `HasWork.work` called once no command waits. No state either."""
        ...

    def set_irq(self, level: bool, pin: int = 0) -> None:
        """Drive an interrupt line. `pin` counts from 0 (for PCI: INTA#)."""
        ...

    def send_msi(self, address: int, data: int) -> None:
        """Send a message-signalled interrupt: a 32-bit write of `data` to `address`."""
        ...

    def wrote_pages(self, first: int, count: int) -> None:
        """Say that `count` guest pages of 4 KiB from page number `first` were written by DMA.

        `memory` does it by itself.
        """
        ...

    def output(self, data: bytes) -> None:
        """Hand bytes to the outside world (the terminal), in order."""
        ...

    def input_wanted(self) -> None:
        """Say that input which `TakesInput.receive` did not accept may be offered again."""
        ...

    def request_exit(self, value: int) -> None:
        """End the run with this guest exit value. Only devices made for that are obeyed."""
        ...

    def log(self, message: str) -> None:
        """One line for the machine's log."""
        ...


_S = TypeVar("_S")


def checked_state(model: str, saved: Any, kind: type[_S]) -> _S:
    """Turn what `Device.snapshot` gave back into a state; nothing else is taken.

    Conversion alone would overlook missing and unknown fields, so the result must also give the
    very same plain values again.

    Raises:
        DeviceError: wrong type, missing or unknown field, value out of range.
    """
    try:
        state: Any = msgspec.convert(saved, kind)
        # Not `to_builtins(state)`: it leaves out the fields that `convert` did not find.
        again = dataclasses.asdict(state)
        same = _canonical(again) == _canonical(saved)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DeviceError(model, f"cannot restore this state: {error}") from error
    if not same:
        odd = sorted(map(str, set(again) ^ set(saved)))
        what = f"missing or unknown: {', '.join(odd)}" if odd else "not in the form of a snapshot"
        raise DeviceError(model, f"cannot restore this state: {what}")
    checked: _S = state
    return checked


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


@dataclass
class NoState:
    """The state of a model that has none."""


@dataclass
class NoOptions:
    """The options of a model that has none."""


class Device:
    """The base of every device model.

    A model declares two plain dataclasses: `Options` (what a user may set, with defaults) and
    `State` (all that a snapshot must keep). Files, interrupt lines and the outside world come
    through `host` and are never state.
    """

    model: ClassVar[str]
    """The name on the command line: ``--device MODEL``."""
    summary: ClassVar[str] = ""
    """One line for the list of models."""
    Options: ClassVar[type] = NoOptions
    State: ClassVar[type] = NoState
    dma: ClassVar[bool] = False
    """Whether it reads and writes guest memory: only then it gets at it (`DeviceHost.memory`)."""
    grantable: ClassVar[bool] = False
    """Whether the bytes of its virtqueues' requests are all that it needs of guest memory: then it
    implements `TakesGrants`, and `DeviceHost.memory` may have no bytes."""

    def __init__(self, host: DeviceHost, options: Any = None) -> None:
        self.host = host
        self.options: Any = self.Options() if options is None else options
        self.state: Any = self.State()
        self.asleep = False

    # What it answers for.

    def regions(self) -> tuple[Region, ...]:
        """The regions, in an order that never changes in a device's life."""
        return ()

    def handlers(self) -> Sequence[BusDevice]:
        """One bus device for each region, in the same order; one region needs no override."""
        return (self,)

    def read(self, offset: int, size: int) -> int:
        """Read from the only region."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write to the only region."""

    # Its life.

    def on_sandboxed(self) -> None:
        """Called once, in the jailed child, after the jail is up and before any command."""

    def close(self) -> None:
        """The device goes away: flush and release what it holds."""

    def sleep(self) -> None:
        """Stop all activity of its own; idempotent. Only snapshot, restore and wake follow."""
        self.asleep = True

    def wake(self) -> None:
        """Go on after `sleep`; idempotent."""
        self.asleep = False

    # Its state.

    def snapshot(self) -> Any:
        """The state as plain values: dicts, lists, integers, text; bytes become base64 text."""
        return msgspec.to_builtins(self.state)

    def restore(self, saved: Any) -> None:
        """Take up a state that `snapshot` gave.

        Raises:
            DeviceError: it is not a state of this model; nothing was changed.
        """
        self.state = checked_state(self.model, saved, self.State)
        self.restored()

    def restored(self) -> None:
        """After a restore: derive what is not state, and raise the interrupt line as it was."""


@runtime_checkable
class TakesInput(Protocol):
    """A model that the outside world can send bytes to."""

    def receive(self, data: bytes) -> int:
        """Take as many leading bytes as there is room for; the number taken.

        If it is less than all, the model calls `DeviceHost.input_wanted` once there is room.
        """
        ...


@runtime_checkable
class Adjustable(Protocol):
    """A model with options that the user may change while it runs."""

    adjustable: ClassVar[frozenset[str]]
    """Their names."""

    def adjust(self, **wanted: Any) -> None:
        """These have other values now, which `Options` has checked; in a turn."""
        ...


@runtime_checkable
class TakesGrants(Protocol):
    """A `Device.grantable` model (see `devices.virtio.granted`)."""

    def queue_sizes(self) -> tuple[int, ...]:
        """The largest size of each of its virtqueues."""
        ...

    def map_grants(self, area: memoryview) -> None:
        """From now on requests are in this memory, and none in that of the guest."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A model with ports of data (`Region.ahead`) that are read word by word, and many words.

    While a guest does nothing but read such a port, the machine may have the bytes in advance and
    answer by itself. It tells what was taken before it asks anything else.
    """

    def ahead(self, region: int) -> bytes:
        """What reads at offset 0 give next, as far as they change nothing but which bytes are next.

        Nothing is taken by this. Reads are of 2 or 4 bytes, and none goes past the end of it.
        """
        ...

    def take_ahead(self, region: int, count: int) -> None:
        """So many of these bytes were read."""
        ...


@runtime_checkable
class TakesTurns(Protocol):
    """A model that asks for turns (`DeviceHost.want_turn`) to touch guest memory."""

    def turn(self) -> None:
        """Do what is to be done while the vCPU stands still; it waits, so do not take long.

        A model with more to do asks for another turn; the guest runs for a while before that.
        Never called while the device sleeps.
        """
        ...


@runtime_checkable
class HasWork(Protocol):
    """A model with slow work on the host (a flush to disk) that the guest should not wait for."""

    def work(self) -> None:
        """Do it, without touching guest memory; then ask for a turn to tell the guest.

        Never called while the device sleeps: what `sleep` must not leave behind it does itself.
        """
        ...


@runtime_checkable
class Watches(Protocol):
    """A model that waits for descriptors of its host to become readable."""

    def watched(self) -> Sequence[int]:
        """The descriptors to wait for now; asked again after each call of any of its methods.

        Waiting is level-triggered: a model whose own buffer is full leaves its descriptor out.
        """
        ...

    def ready(self, fd: int) -> None:
        """`fd` is readable, or its peer is gone: read it into memory of the model's own, and ask
        for a turn. Never touches guest memory; never called while the device sleeps.
        """
        ...


@runtime_checkable
class WaitsForRoom(Watches, Protocol):
    """One of them that also writes to a descriptor as fast as it takes it."""

    def full(self) -> Sequence[int]:
        """Descriptors that took no more: `ready` is called when one is writable, too."""
        ...
