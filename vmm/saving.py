"""Snapshot and restore of a whole machine: the order in which its parts are saved and taken up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from devices.errors import DeviceError, DeviceFailure, UserError
from vmm import snapshot as snapshots
from vmm.config import difference
from vmm.cpu.library import VERSION
from vmm.host_files import DiskKeeping, DiskProgress
from vmm.parts import Parts
from vmm.snapshot import SavedDisk

_ENGINE = f"unicorn {VERSION}"


def save(
    parts: Parts,
    path: Path,
    keeping: DiskKeeping = DiskKeeping.COPY,
    progress: DiskProgress = lambda _name, _done, _of: None,
) -> list[str]:
    """Save everything as the directory `path`; the machine goes on as it was.

    Args:
        keeping: what is kept of disks; `progress` hears of it.

    Returns:
        What became of each disk, in words.

    Raises:
        DeviceError: a device cannot be saved; nothing was written.
        UserError: the directory cannot be written, or a disk not be kept.
    """
    lines: list[str] = []

    def keep_disks(directory: Path) -> dict[str, SavedDisk]:
        found, text = parts.host_files.keep(directory, keeping, progress)
        lines.extend(text)
        return found

    was_suspended = parts.vcpu.suspended
    parts.suspend()
    try:
        saved = snapshots.Snapshot(
            config=parts.config,
            engine=_ENGINE,
            cpu=parts.cpu.get_state(),
            devices={each.name: each.snapshot() for each in parts.stateful()},
            executed=parts.cpu.executed,
            clock=parts.clock.snapshot(),
            window=replace(parts.vcpu.window),
            console=snapshots.ConsoleState(parts.console.pending),
        )
        snapshots.save(path, saved, parts.memory, keep_disks)
    finally:
        if not was_suspended:
            parts.resume()
    return lines


def take_up(parts: Parts, saved: snapshots.Snapshot, path: Path) -> None:
    """Take up a snapshot whose memory is loaded; the machine is suspended afterwards.

    Args:
        path: where it came from, for messages.

    Raises:
        UserError: it does not fit this machine, or a device refuses its state.
        DeviceFailure: a device failed over it.
    """
    change = difference(saved.config, parts.config)
    if change is not None:
        raise UserError(f"snapshot {path} does not fit this machine: {change}")
    expected = {each.name for each in parts.stateful()}
    for name in sorted(expected ^ saved.devices.keys()):
        lacks = "lacks" if name in expected else "has a state that nobody owns:"
        raise UserError(f"snapshot {path} {lacks} device '{name}'")
    if saved.engine != _ENGINE:
        # It has the state of the architecture, not of the engine; so this is no reason to refuse.
        text = f"taken with {saved.engine}, goes on with {_ENGINE}: speed and timing may differ"
        parts.wiring.log("snapshot", text)
    parts.suspend()
    # Time first: devices plan their alarms by it. The board's devices last: see `Board`.
    parts.cpu.executed = saved.executed
    parts.clock.start_at(saved.clock.now)
    parts.vcpu.window = saved.window
    for each in parts.stateful():
        try:
            each.restore(saved.devices[each.name])
        except DeviceFailure:
            raise
        except DeviceError as error:
            raise UserError(f"snapshot {path}: devices/{each.name}.json: {error.reason}") from error
        parts.drain()
    parts.pci.remap()
    try:
        parts.cpu.set_state(saved.cpu)
    except (ValueError, UserError) as error:
        raise UserError(f"snapshot {path}: cpu.json: {error}") from error
    parts.console.feed(saved.console.pending_input)
