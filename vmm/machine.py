"""The machine: builds itself from one configuration, runs a guest, suspends, snapshots, restores.

Reads top to bottom: what a machine is made of, how it is built, booted, run, stopped and saved.
Everything here happens on the thread that calls `run` (the vCPU thread).

    with Machine() as machine:
        machine.boot("hello")
        outcome = machine.run(timeout=5)
        print(machine.output, outcome.ending)
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, Self

from devices import registry
from devices.contract import Device
from devices.errors import DeviceError, DeviceFailure, UserError
from proxy.jail import JailMode
from vmm import post, saving, sources
from vmm import snapshot as snapshots
from vmm.boot.options import BootOptions, BootResult
from vmm.children import model_of
from vmm.config import HostOptions, MachineConfig, choice
from vmm.events import FAR
from vmm.host_files import DiskKeeping, DiskProgress, DiskUse, HostFiles, SavedFiles
from vmm.interrupt import noted_signals
from vmm.local import DeviceFactory
from vmm.machine_shape import MachineShape
from vmm.moving import Places, moved
from vmm.outcome import Ending, Outcome
from vmm.parts import Parts
from vmm.vcpu import UNLIMITED

TIMEOUT_GRACE = 1.0
SIGNAL_GRACE = 0.2
"""Seconds that a device has to answer when the time-out of a run has passed, or after Ctrl-C."""


class Machine(MachineShape):
    """One virtual machine; `MachineShape` says what it takes to make one."""

    def build(self) -> None:
        """Fork the device processes and make memory, CPU and buses; `boot` does it by itself.

        Raises:
            UserError: the configuration, or the jail that this host cannot provide.
            DeviceError: a device that does not come up.
        """
        self._build()

    def _build(self, **more: Any) -> None:
        if self._closed:
            raise UserError("this machine is closed")
        if self._parts is None:
            self._parts = Parts(
                self.config,
                self.host,
                self._factories,
                self.console,
                self._between_slices,
                **more,
            )

    @property
    def parts(self) -> Parts:
        """What the machine is made of, for those who want to look inside."""
        self.build()
        assert self._parts is not None
        return self._parts

    # Running.

    def boot(
        self,
        image: str | Path | bytes,
        options: BootOptions | None = None,
    ) -> BootResult:
        """Load a guest: bytes, a file, or the name of one in `guests`.

        Raises:
            UserError: the image or the options; see `vmm.boot.loader.load`.
        """
        return post.start(self.parts, *sources.read_image(image, options))

    def boot_firmware(self, rom: bytes, name: str = "firmware") -> BootResult:
        """Start at the reset vector of a firmware ROM; ``config.rom`` must be its size.

        Raises:
            UserError: it is not that, or no ROM.
        """
        return post.start_firmware(self.parts, rom, name)

    def run(
        self,
        *,
        until: str | bytes | None = None,
        timeout: float | None = None,
        budget: int | None = None,
        steps: int | None = None,
    ) -> Outcome:
        """Run the guest until it ends or something below happens; it can be run on after that.

        Args:
            until: come back (`Ending.PAUSED`) when the console has printed this.
            timeout: come back (`Ending.TIMEOUT`) after so many seconds.
            budget: come back (`Ending.PAUSED`) after about so many bytes of executed code.
            steps: come back (`Ending.PAUSED`) after exactly so many instructions; slow.

        Raises:
            KeyboardInterrupt: Ctrl-C, however else the run may have ended.
        """
        parts = self.parts
        vcpu = parts.vcpu
        parts.host_files.begin()
        self._signal = 0
        watch = timer = None
        if until is not None:
            text = until.encode() if isinstance(until, str) else until
            watch = self.console.watch(text, lambda: vcpu.stop(Outcome(Ending.PAUSED)))
        if parts.given_up is not None:
            vcpu.stop(parts.given_up)
            parts.given_up = None
        if timeout is not None:
            expired = Outcome(Ending.TIMEOUT, f"the guest ran for {timeout:g} s")
            parts.patience_ends = monotonic() + timeout + TIMEOUT_GRACE
            parts.run_ends = expired
            timer = parts.events.call_at(monotonic() + timeout, lambda: vcpu.stop(expired))
        if self.suspended:
            self.resume()
        try:
            with noted_signals(parts.events, self._noted_signal):
                vcpu.run(UNLIMITED if budget is None else budget, steps)
                parts.unmute()
                self._settle()
        finally:
            parts.patience_ends = FAR
            if watch is not None:
                self.console.unwatch(watch)
            if timer is not None:
                timer.cancel()
        outcome = vcpu.take_outcome()
        number, self._signal = self._signal, 0
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return outcome.with_panic(self.console.output)

    def _noted_signal(self, number: int) -> None:
        self._signal = number
        parts = self.parts
        parts.patience_ends = min(parts.patience_ends, monotonic() + SIGNAL_GRACE)
        self.stop(Outcome(Ending.INTERRUPTED, signal.Signals(number).name))

    def _between_slices(self) -> None:
        """Between two slices of execution, when anything happened: what callbacks must not do."""
        if not self.suspended:
            self._push_input()
        if self.between is not None:
            self.between()

    def _push_input(self) -> None:
        device = self.parts.console_device
        if device is not None:
            try:
                self.console.push(device.receive)
            except DeviceError as error:
                self.parts.wiring.log(error.device, error.reason)

    def stop(self, outcome: Outcome | None = None) -> None:
        """Make `run` come back; from callbacks on the vCPU thread."""
        self.parts.vcpu.stop(outcome or Outcome(Ending.QUIT))

    def send(self, data: str | bytes) -> None:
        """Type on the guest's console."""
        self.console.feed(data.encode() if isinstance(data, str) else data)
        if self._parts is not None:
            self._parts.request_attention()

    @property
    def output(self) -> bytes:
        """What the guest has printed on its console so far."""
        return bytes(self.console.output)

    def adjust(self, name: str, **options: Any) -> None:
        """Give options of a running device other values: those that `Adjustable` models name.

            machine.adjust("console", columns=100, rows=40)

        Raises:
            UserError: there is no such device, or this cannot be changed while it runs.
            DeviceError: the device failed.
        """
        attachment = self.parts.wiring.attached.get(name)
        if attachment is None:
            raise UserError(f"there is no device '{name}'")
        kind = model_of(attachment.config, self._factories.get(name)) or Device
        wanted = registry.adjusted(kind, attachment.config.options, options)
        suspended = self.suspended
        self.resume()
        try:
            attachment.adjust(wanted)
        finally:
            if suspended:
                self.suspend()

    # Suspend, snapshot, restore.

    @property
    def suspended(self) -> bool:
        """Whether the devices sleep and the guest stands still."""
        return self._parts is not None and self._parts.vcpu.suspended

    def suspend(self) -> None:
        """Stop guest and devices until `resume`; see `Parts.suspend`.

        Raises:
            DeviceError: a device refused or failed; the machine can run on.
        """
        self.parts.suspend()

    def resume(self) -> None:
        """Let the devices go on; the guest does with `run`.

        Raises:
            DeviceError: a device failed to wake; the others are awake.
        """
        self.parts.resume()

    def snapshot(
        self,
        path: str | Path,
        *,
        disks: DiskKeeping | str = DiskKeeping.COPY,
        progress: DiskProgress = lambda _name, _done, _of: None,
    ) -> list[str]:
        """Save the whole machine as a directory (see `vmm.snapshot`); the guest can go on.

        Args:
            disks: "copy" keeps the content of disks that the guest can write, "none" does not.
            progress: called with a disk's name, bytes done and their total while that goes on.

        Returns:
            What became of each disk, in words.

        Raises:
            DeviceError: a device cannot be saved; nothing was written and the guest can go on.
            UserError: the directory cannot be written, or a disk not be kept.
        """

        def go_on(name: str, done: int, total: int) -> None:
            if self._signal:
                raise UserError(f"snapshot {path}: {signal.Signals(self._signal).name}")
            progress(name, done, total)

        return saving.save(self.parts, Path(path), choice(DiskKeeping, disks, "disks"), go_on)

    @classmethod
    def restore(
        cls,
        path: str | Path,
        *,
        host: HostOptions | None = None,
        jail: JailMode | str | None = None,
        factories: Mapping[str, DeviceFactory | type[Device]] | None = None,
        models: Iterable[str | type[Device]] = (),
        disks: DiskUse | str = DiskUse.PRIVATE,
        places: Places | None = None,
        progress: DiskProgress = lambda _name, _done, _of: None,
    ) -> Machine:
        """A machine that goes on where a snapshot was taken, with devices newly forked.

        Args:
            factories: for devices that were added as a function: the function, by device name.
            models: models that are not vmm's own and that the snapshot may have, as classes or as
                "package.module:Class"; their code is trusted.
            disks: "private" gives the machine copies of its own of the disks as they were; with
                "original" it goes on with the files themselves, if nobody wrote to them since.
            places: by device name: other values of options that name something of the host (see
                `vmm.moving`), so that it can be restored beside a machine that has them.
            progress: as for `snapshot`.

        Raises:
            UserError: the snapshot is damaged, of a newer format, does not fit, has a model that
                was not named, a state that its device refuses, or a file that is gone or changed.
            DeviceError: a device that does not come up.
        """
        path = Path(path)
        manifest = snapshots.load_manifest(path)
        use = choice(DiskUse, disks, "disks")
        models = tuple(models)
        trusted = sources.trusted_factories(manifest.config, factories or {}, models)
        kept = [name for name, disk in manifest.disks.items() if disk.copy is not None]
        private = kept if use is DiskUse.PRIVATE else []

        def move(config: MachineConfig) -> MachineConfig:
            return moved(
                config,
                places or {},
                lambda each: model_of(each, trusted.get(each.name)),
                private,
            )

        machine = cls(move(manifest.config), host=host, jail=jail)
        machine._factories = sources.trusted_factories(machine.config, factories or {}, models)
        saved: list[snapshots.Snapshot] = []
        try:
            machine._build(
                meanwhile=lambda memory: saved.append(snapshots.load(path, memory)),
                host_files=HostFiles(SavedFiles(path, manifest.disks, use, progress)),
            )
            saved_machine = replace(saved[0], config=move(saved[0].config))
            saving.take_up(machine.parts, saved_machine, path)
        except BaseException:
            machine.close()
            raise
        return machine

    # The end.

    def _settle(self) -> None:
        """Have every posted write done and every byte of output here before `run` returns."""
        if not self.suspended:
            try:
                self.suspend()
                self.resume()
            except DeviceFailure:
                pass  # it is reported by `Wiring.failed` already
            except DeviceError as error:
                self.parts.wiring.log(error.device, error.reason)

    def close(self) -> None:
        """Shut every device down, reap its process, release everything; harmless when repeated."""
        self._closed = True
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
