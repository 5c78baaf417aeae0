"""A guest executes a page, a disk read overwrites it, and the new code runs: real disks, jailed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_rig import given

import guests
from vmm.cli.disks import disks
from vmm.config import ClockKind, HostOptions, MachineConfig, debug_exit, default_devices
from vmm.machine import Machine
from vmm.outcome import Ending, Outcome

SECTOR = 512
SECTORS = 32
EACH_DISK = pytest.mark.parametrize(
    ("options", "kind"),
    [("", "virtio"), (",dma=granted", "virtio"), (",isolation=none", "virtio"), (",if=ide", "IDE")],
    ids=["virtio", "virtio-granted", "virtio-in-process", "ide"],
)


def code(number: int) -> bytes:
    """``mov eax, number; ret``."""
    return b"\xb8" + number.to_bytes(4, "little") + b"\xc3"


@contextmanager
def machine_with(
    directory: Path, options: str, *, lane: bool = True, clock: ClockKind = ClockKind.REAL
) -> Iterator[Machine]:
    image = directory / "disk.img"
    image.write_bytes(b"".join(code(n).ljust(SECTOR, b"\xcc") for n in range(SECTORS)))
    found = disks(given("disk", f"{image},readonly{options}"), [])
    console = default_devices()[0]
    config = MachineConfig(16 << 20, (console, debug_exit(), *found), clock)
    with Machine(config, host=HostOptions(fast_lane=lane)) as machine:
        machine.boot(guests.patched("disk-code", sectors=SECTORS))
        yield machine


def ended(machine: Machine) -> tuple[Outcome, str]:
    outcome = machine.run(timeout=60)
    assert outcome.ending is Ending.GUEST_EXIT, outcome
    return outcome, machine.output.decode()


@EACH_DISK
@pytest.mark.parametrize("lane", [False, True], ids=["tube", "lane"])
def test_a_guest_executes_what_a_disk_read_wrote(
    tmp_path: Path, options: str, kind: str, lane: bool
) -> None:
    with machine_with(tmp_path, options, lane=lane) as machine:
        outcome, said = ended(machine)
        assert said == f"disk-code: {kind}, {SECTORS} sectors, all right\n"
        assert outcome.guest_value == 0
        isolated = "isolation=none" not in options
        assert len(machine.parts.proxies) == 1 + isolated, "the disk has a process of its own"


@EACH_DISK
def test_with_a_virtual_clock(tmp_path: Path, options: str, kind: str) -> None:
    with machine_with(tmp_path, options, clock=ClockKind.VIRTUAL) as machine:
        assert ended(machine)[0].guest_value == 0


@EACH_DISK
def test_the_test_can_fail(
    tmp_path: Path, options: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nobody drops what was translated of the pages that were read, the old code runs."""
    monkeypatch.setattr("vmm.cpu.engine.invalidate", lambda *_: None)
    with machine_with(tmp_path, options) as machine:
        outcome, said = ended(machine)
        assert said == f"disk-code: {kind}: sector 1 was read, and the code of 0 ran\n"
        assert outcome.guest_value == 1
