"""pvpanic: what the guest writes, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path

from cli_rig import run
from fakes import FakeHost

from devices.pvpanic import PvPanic
from vmm.machine import Machine
from vmm.outcome import Ending


def test_events() -> None:
    host = FakeHost()
    device = PvPanic(host)
    assert device.read_config(0) == 0x0011_1B36
    assert device.read_bar(0, 0, 1) == 3
    for offset, value in ((0, 0), (0, 4), (1, 1), (8, 1)):
        device.write_bar(0, offset, 1, value)
    assert host.calls == []
    device.write_bar(0, 0, 1, 2)
    assert host.count("request_exit") == 0
    assert host.count("log") == 1
    device.write_bar(0, 0, 1, 1)
    assert ("request_exit", 1) in host.calls


PANIC = bytes.fromhex(
    # mov eax, 0x80001810; mov dx, 0xcf8; out dx, eax; mov dx, 0xcfc; in eax, dx   (its BAR 0)
    # and eax, -16; mov byte [eax], event; jmp $
    "b810180080 66baf80c ef 66bafc0c ed 83e0f0 c60001 ebfe"
)


def test_a_panic_ends_the_run_with_a_status_of_its_own(tmp_path: Path) -> None:
    image = tmp_path / "panic.bin"
    image.write_bytes(PANIC)
    device = ["--device", "pvpanic,slot=3"]
    status, out, _ = run("boot", str(image), *device, "--timeout", "20", "--json")
    assert (status, json.loads(out)["ending"]) == (14, "panicked")
    status, _, said = run("boot", str(image), *device, "--timeout", "20")
    assert status == 14
    assert b"vmm: panicked" in said
    assert b"vmm: pvpanic: the guest's kernel has panicked" in said
    image.write_bytes(PANIC[:-3] + b"\2" + PANIC[-2:])  # it goes on, and saves a dump
    assert run("boot", str(image), *device, "--timeout", "0.5")[0] == 8


def test_in_a_machine_it_needs_no_permission() -> None:
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("pvpanic", slot=3)
        machine.boot(PANIC)
        outcome = machine.run(timeout=20)
        assert (outcome.ending, outcome.guest_value) == (Ending.PANICKED, None)
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("pvpanic", slot=3, may_exit=False)
        machine.boot(PANIC)
        assert machine.run(timeout=0.3).ending is Ending.TIMEOUT
