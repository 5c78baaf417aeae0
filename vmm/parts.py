"""What a built machine is made of, and the order in which that is made and unmade.

The warden comes first, before memory, the CPU engine and any thread exist, so that no device
process inherits them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from time import monotonic, time

from devices.bus import Bus, BusType, Range
from devices.contract import Device
from devices.errors import DeviceError, DeviceFailure, Subject, UserError, concerning
from proxy.device import ProxyDevice
from proxy.placement import Placement
from proxy.tube import close_all
from vmm.attachment import Attachment
from vmm.children import files_for, links_for, order_children, proxy_for
from vmm.clock import MachineClock, RealClock, VirtualClock
from vmm.config import CONSOLE, ClockKind, DeviceConfig, FailurePolicy, HostOptions, MachineConfig
from vmm.console import ConsoleBuffer
from vmm.cpu.engine import Cpu
from vmm.cpu.intercept import available
from vmm.cpu.msrs import Msrs
from vmm.crash import crash_report
from vmm.events import FAR, EventLoop, Timer
from vmm.host_files import HostFiles
from vmm.local import DeviceFactory, LocalHost, LocalTurns, build_local
from vmm.memory import GuestMemory
from vmm.network.links import Links
from vmm.outcome import ENDS_THE_RUN, Ending, Outcome
from vmm.pc import DEBUG_CONSOLE, Board, BoardEvents
from vmm.plugging import plug_in
from vmm.turns import TurnGiver
from vmm.vcpu import VcpuLoop
from vmm.wiring import Wiring

MSRS = "msr"
LONG_DRAIN = 1e-3
"""Seconds of listening to one device after which the guest runs for as long."""
LOOKS = 4
"""Looks within a deadline at whether devices do what was posted to them."""
PHYSICAL_LIMIT = 1 << 40
"""The guest's physical address space: 40 bits."""
VIRTUAL_EPOCH = 1_767_225_600
"""The time of day at which a machine with a virtual clock starts: 2026-01-01 00:00 UTC."""


class Parts:
    """Builds everything in its constructor; on any error what was built is taken down again.

    Args:
        config: the machine's shape.
        host: how this host runs it.
        factories: for devices that are not made from a model's name.
        console: of the device named "serial".
        between: see `VcpuLoop`.
        meanwhile: called once while devices start; for what takes time and needs only memory.
        host_files: where devices' files come from.

    Raises:
        UserError: the configuration, or a jail that cannot be had.
        DeviceError: a device that does not come up.
    """

    def __init__(
        self,
        config: MachineConfig,
        host: HostOptions,
        factories: Mapping[str, DeviceFactory],
        console: ConsoleBuffer,
        between: Callable[[], None],
        *,
        meanwhile: Callable[[GuestMemory], None] = lambda _: None,
        host_files: HostFiles | None = None,
    ) -> None:
        self.host_files = host_files or HostFiles()
        self.config = config
        self.host = host
        self.symbols: list[tuple[int, int, str]] = []
        self.attachments: list[Attachment] = []
        self.proxies: list[ProxyDevice] = []
        self.console = console
        self.patience_ends = FAR
        """When (`time.monotonic`) silent devices are given up, because the run is to end."""
        self.run_ends = Outcome(Ending.INTERRUPTED)
        """How it ends then."""
        self.given_up: Outcome | None = None
        """What a run that comes after that must end with."""
        self._look: Timer | None = None
        self._stack = ExitStack()
        self._stack.callback(self.host_files.close)
        try:
            self._build(factories, between, meanwhile)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise UserError("too many open files for so many devices: see ulimit -n") from error
            raise

    def _build(
        self,
        factories: Mapping[str, DeviceFactory],
        between: Callable[[], None],
        meanwhile: Callable[[GuestMemory], None],
    ) -> None:
        children = order_children(self.config, self.host, factories, self.host_files)
        self.warden, self.jail_line = children.warden, children.jail_line
        self._stack.callback(self.warden.close)
        for links in children.links.values():
            self._stack.callback(links.close)
        self.memory = GuestMemory(self.config.memory, self.config.rom)
        self._stack.callback(self.memory.close)
        mmio = Bus(BusType.MMIO, PHYSICAL_LIMIT)
        ports = Bus(BusType.PIO, 1 << 16, mmio.recent)
        self.buses = {BusType.PIO: ports, BusType.MMIO: mmio}
        for region in self.memory.regions:
            mmio.reserve(Range(region.start, region.size))
        counts = self.config.clock is ClockKind.VIRTUAL
        self.cpu = Cpu(self.memory, self.buses[BusType.PIO], mmio, counts=counts, tsc=self._tsc)
        self._stack.callback(self.cpu.close)
        self.events = EventLoop(self.cpu.kick, self.cpu.unheard)
        self._stack.callback(self.events.close)
        self._build_platform(between)
        meanwhile(self.memory)
        how = {"deadline": self.host.deadline, "placement": self.placement, "synced": counts}
        for device in self.config.devices:
            start, factory = children.starts.get(device.name), factories.get(device.name)
            with concerning(Subject(device=device.name)):
                if start is None:
                    self._attach_local(device, factory)
                    continue
                proxy = proxy_for(start.wait(), device, factory, self.wiring, self.memory, **how)
                self._activate(proxy)
                self._attach(device, Attachment(device, proxy))
                self._attach_links(children.links[device.name])
        plug_in(self.pci, self.attachments)
        self.events.add(self.warden.fileno(), self._warden_spoke)
        takers = {each.name: taker for each in self.attachments if (taker := each.input())}
        self.console_name = CONSOLE if CONSOLE in takers else next(iter(takers), CONSOLE)
        self.console_device = takers.get(self.console_name)
        self.consoles[self.console_name] = self.console

    # Building.

    def _build_platform(self, between: Callable[[], None]) -> None:
        """Clock, board and vCPU loop, which live in this process."""
        epoch = VIRTUAL_EPOCH
        self.clock: MachineClock
        if self.config.clock is ClockKind.VIRTUAL:
            self.clock = VirtualClock(lambda: self.cpu.executed, self.cpu.kick)
        else:
            self.clock = RealClock(self.events.replanned, self.cpu.kick)
            epoch = int(time())
        self.events.guest_due = self.clock.host_due
        self.consoles = {CONSOLE: self.console, DEBUG_CONSOLE: ConsoleBuffer()}
        self.wiring = Wiring(
            self.cpu,
            attention=self.request_attention,
            guest_exit=self._guest_exit,
            device_failed=self._device_failed,
            consoles=self.consoles,
        )
        self.board = Board(
            self.buses,
            self.memory,
            self.clock,
            wiring=self.wiring,
            events=BoardEvents(
                power_off=lambda: self._guest_ends(Outcome(Ending.POWERED_OFF)),
                reset=lambda: self._guest_ends(Outcome(Ending.RESET)),
                a20=self.cpu.set_a20,
                pci_fault=self._pci_fault,
            ),
            epoch=epoch,
        )
        self.turns = TurnGiver(self.clock, self.request_attention)
        self.wiring.turn_wanted = self.turns.want
        self.pci = self.wiring.pci = self.board.pci
        self.wiring.irqchip = self.board.irqchip
        self.placement = Placement(lanes=self.host.fast_lane)
        self.vcpu = VcpuLoop(
            self.cpu,
            self.events,
            self.board.irqchip,
            self.clock,
            between=lambda: self._between(between),
            crash_report=lambda cause: crash_report(cause, self.cpu, self.symbols, self.buses),
        )

    def _tsc(self) -> int:
        """The time-stamp counter runs at 1 GHz, so that it is guest time."""
        return self.clock.now()

    def _activate(self, proxy: ProxyDevice) -> None:
        self._stack.callback(proxy.shutdown)
        proxy.watch_writes(self._posted)
        proxy.give_up_when(lambda: monotonic() >= self.patience_ends)
        self.proxies.append(proxy)
        self.turns.add(proxy.name, proxy.sync)
        self.events.add(proxy.doorbell, lambda: self._rung(proxy))
        self.events.add(proxy.pidfd, lambda: self._ended(proxy))

    def _attach_local(self, device: DeviceConfig, factory: DeviceFactory | None) -> None:
        virtual = self.config.clock is ClockKind.VIRTUAL
        fds = files_for(device, factory, self.host_files)
        self._stack.callback(close_all, list(fds.values()))
        links = links_for(device, factory, self.host_files)
        self._stack.callback(links.close)
        self._attach_links(links)
        host = LocalHost(device.name, self.wiring, fds | links.fds, finish_work=virtual)
        local = build_local(device, host, factory)
        self._stack.callback(self._close_local, device.name, local)
        if local.dma:
            host.turns.memory.map([(region.start, region.view) for region in self.memory.ram])
        turns = LocalTurns(local, host.turns, self.events)
        self._stack.callback(turns.sleep)
        self.turns.add(device.name, turns.take)
        self._attach(device, Attachment(device, local, local=turns))

    def _attach_links(self, links: Links) -> None:
        with self.host_files.naming_snapshot(links.device):
            links.attach(self.events, self.wiring.log)

    def _attach(self, device: DeviceConfig, attachment: Attachment) -> None:
        if device.name in self.wiring.attached:
            problem = "has the name of a part of the board; give it another name="
            raise UserError(f"device '{device.name}' {problem}", Subject("name", device.name))
        attachment.place(self.buses)
        self.attachments.append(attachment)
        self.wiring.attached[device.name] = attachment

    # What the parts tell each other.

    def _rung(self, proxy: ProxyDevice) -> None:
        begin = monotonic()
        more = proxy.drain()
        took = monotonic() - begin
        if more or took > LONG_DRAIN:
            # Whoever says that much is not heard again before the guest had as much time.
            self.events.remove(proxy.doorbell)
            self.events.call_at(begin + 2 * took, lambda: self._listen_again(proxy))

    def _listen_again(self, proxy: ProxyDevice) -> None:
        self.events.add(proxy.doorbell, lambda: self._rung(proxy))
        self._rung(proxy)

    def _posted(self) -> None:
        """A device was given something to do without an answer: look later whether it is done.

        So one that hangs is named though nobody asks it; nothing is planned while nothing is
        posted, and an access costs no clock.
        """
        if self._look is None:
            due = monotonic() + self.host.deadline / LOOKS
            self._look = self.events.call_at(due, self._look_after)

    def _look_after(self) -> None:
        self._look = None
        for proxy in self.proxies:
            proxy.look_after()

    def _warden_spoke(self) -> None:
        # A proxy that fails asks for its own obituary; here the others are taken off the socket.
        self.warden.obituaries()
        if self.warden.dead:
            self.events.remove(self.warden.fileno())

    def _ended(self, proxy: ProxyDevice) -> None:
        self.events.remove(proxy.pidfd)
        proxy.check()

    def _between(self, between: Callable[[], None]) -> None:
        if not self.vcpu.suspended:
            self.turns.give(self.cpu.halted)
        between()

    def request_attention(self) -> None:
        """Have the vCPU loop come back and look, soon."""
        self.vcpu.attention = True
        self.cpu.kick()
        self.events.interrupt()

    def _guest_exit(self, model: str, value: int) -> None:
        ending = ENDS_THE_RUN.get(model, Ending.GUEST_EXIT)
        of_the_guest = ending is Ending.GUEST_EXIT
        self._guest_ends(Outcome(ending, guest_value=value if of_the_guest else None))

    def _guest_ends(self, outcome: Outcome) -> None:
        # The CPU stops at the end of the block; what the guest still does there goes nowhere.
        for bus in self.buses.values():
            bus.mute()
        self.vcpu.stop(outcome)

    def _device_failed(self, failure: DeviceFailure) -> None:
        self.pci.fail(failure.device)
        if self.host.on_failure is FailurePolicy.STOP:
            outcome = Outcome(Ending.DEVICE_FAILED, str(failure), device=failure.device)
            if failure.given_up:
                self.given_up = outcome
            else:
                self.vcpu.stop(outcome)
        if failure.given_up:
            self._guest_ends(self.run_ends)
        self.request_attention()

    def _pci_fault(self, owner: str, text: str) -> None:
        for proxy in self.proxies:
            if proxy.name == owner:
                proxy.fail(text)

    def _close_local(self, name: str, device: Device) -> None:
        try:
            device.close()
        except Exception as error:
            self.wiring.log(name, f"close failed: {error!r}")

    # Quiet.

    def spaces(self) -> dict[str, Bus | Msrs]:
        """Where the guest can look for something that is not there, by name: buses, MSRs."""
        found: dict[str, Bus | Msrs] = {str(kind): bus for kind, bus in self.buses.items()}
        if available():
            found[MSRS] = self.cpu.traps.msrs
        return found

    def unmute(self) -> None:
        """The CPU has stopped: devices can be reached again."""
        for bus in self.buses.values():
            bus.unmute()

    def stateful(self) -> list[Attachment]:
        """Everything that a snapshot keeps; the platform last."""
        return [*self.attachments, *self.board.attachments]

    def sleep_order(self) -> list[Attachment]:
        """Every device once: those on the port bus, those on the MMIO bus, those on none."""
        by_name = {attachment.name: attachment for attachment in self.attachments}
        order = [entry.owner for bus in self.buses.values() for entry in bus]
        names = dict.fromkeys([*order, *by_name])
        return [by_name[name] for name in names if name in by_name]

    def suspend(self) -> None:
        """Put every device to sleep, port bus first, each once; then hear what they said last.

        So no interrupt is in flight afterwards. Harmless when repeated.

        Raises:
            DeviceError: a device refused or failed; those that slept are awake again.
        """
        if self.vcpu.suspended:
            return
        slept: list[Attachment] = []
        try:
            for attachment in self.sleep_order():
                attachment.sleep()
                slept.append(attachment)
        except DeviceError:
            for attachment in reversed(slept):
                # The error that made us wake it again is the one to report.
                with suppress(DeviceError):
                    attachment.wake()
            raise
        self.drain()
        self.clock.pause()
        self.vcpu.suspended = True

    def resume(self) -> None:
        """Wake every device. Harmless when repeated.

        Raises:
            DeviceError: a device failed to wake; the others are awake.
        """
        if not self.vcpu.suspended:
            return
        self.vcpu.suspended = False
        failures = []
        for attachment in reversed(self.sleep_order()):
            try:
                attachment.wake()
            except DeviceError as error:
                failures.append(error)
        self.request_attention()
        if failures:
            raise failures[0]

    def drain(self) -> None:
        """Handle everything that device processes have said so far."""
        for proxy in self.proxies:
            while proxy.drain():
                pass

    def close(self) -> None:
        """Take everything down, the devices first; harmless when repeated."""
        self._stack.close()
