"""Snapshots: taken anywhere, restored in a fresh process, refused when they are not whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_rig import rewrite

import guests
from devices.errors import DeviceError, UserError
from vmm import snapshot as snapshots
from vmm.boot.options import BootOptions
from vmm.config import MachineConfig
from vmm.cpu.state import CpuState
from vmm.machine import Machine
from vmm.memory import GuestMemory
from vmm.outcome import Ending
from vmm.vcpu import InterruptWindow

COUNTED = "".join(f"counter {n}\n" for n in range(1, 31)).encode()


def _counter() -> bytes:
    return guests.patched("counter", limit=30, delay=20_000)


def _golden(image: bytes | str) -> tuple[bytes, Ending, int | None]:
    with Machine(memory="16M") as machine:
        machine.boot(image)
        outcome = machine.run(timeout=60)
        return machine.output, outcome.ending, outcome.guest_value


@pytest.mark.parametrize("seed", range(3))
def test_counter_through_snapshots_at_random_places(tmp_path: Path, seed: int) -> None:
    """Three times: run a little, save, throw the machine away, go on in another."""
    rng = random.Random(seed)
    output = b""
    machine = Machine(memory="16M")
    try:
        machine.boot(_counter())
        for turn in range(3):
            machine.run(budget=rng.randrange(1, 400_000))
            machine.run(steps=rng.randrange(1, 40))
            machine.snapshot(tmp_path / str(turn))
            output += machine.output
            machine.close()
            machine = Machine.restore(tmp_path / str(turn))
        assert machine.run(timeout=60).ending is Ending.HALTED
        output += machine.output
    finally:
        machine.close()
    assert output == COUNTED


@pytest.mark.parametrize("guest", ["stress", "pci-scan", "long-mode", "echo", "elf32-high"])
def test_guests_cannot_tell(tmp_path: Path, guest: str) -> None:
    """Golden output with a snapshot and restore, and with suspends, at random instructions."""
    expected = _golden(guest)
    rng = random.Random(guest)
    with Machine(memory="16M") as machine:
        machine.boot(guest)
        machine.run(budget=rng.randrange(1, 20_000))
        machine.run(steps=rng.randrange(1, 30))
        before = machine.output
        machine.snapshot(tmp_path / "one")
        for _ in range(5):
            machine.suspend()
            machine.suspend()
            machine.resume()
            outcome = machine.run(budget=rng.randrange(1, 5_000))
            if outcome.ending is not Ending.PAUSED:
                break
        else:
            outcome = machine.run(timeout=60)
        assert (machine.output, outcome.ending, outcome.guest_value) == expected
    with Machine.restore(tmp_path / "one") as machine:
        outcome = machine.run(timeout=60)
        assert (before + machine.output, outcome.ending, outcome.guest_value) == expected


def test_input_that_was_typed_before_is_not_lost(tmp_path: Path) -> None:
    """Typed before the guest has run at all: part waits in the device, part in the machine."""
    lines = [f"line {n:03}" for n in range(600)]  # more than the device takes at once
    with Machine(memory="16M") as machine:
        machine.boot("serial-poll")
        machine.send("".join(line + "\r" for line in lines) + "quit\r")
        machine.run(budget=3_000)
        before = machine.output
        machine.snapshot(tmp_path / "saved")
        assert machine.console.pending
    with Machine.restore(tmp_path / "saved") as machine:
        assert machine.run(timeout=60).ending is Ending.HALTED
        output = (before + machine.output).decode()
    answers = [part.split()[0] for part in output.split("You said: line ")[1:]]
    assert answers == [line.split()[1] for line in lines]


def test_a_pending_interrupt_is_delivered_after_restore(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot("serial-echo")
        end = time.monotonic() + 30
        while not machine.parts.cpu.halted:  # until it waits for what is typed
            assert time.monotonic() < end
            machine.run(timeout=0.3)
        machine.send("x\rquit\r")
        machine._push_input()  # the device has it and raises its line; the guest does not run
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        assert machine.run(timeout=30).ending is Ending.HALTED
        assert b"x" in machine.output


def test_bars_stay_where_the_guest_put_them(tmp_path: Path) -> None:
    """Saved in the middle of pci-scan's relocations, decoding perhaps off, and at its end."""
    with Machine(memory="16M") as machine:
        machine.boot("pci-scan")
        machine.run(until="BAR 0", timeout=30)
        before = machine.output
        machine.snapshot(tmp_path / "middle")
    with Machine.restore(tmp_path / "middle") as machine:
        machine.run(timeout=30)
        assert (before + machine.output) == _golden("pci-scan")[0]
        places = {entry.range for bus in machine.parts.buses.values() for entry in bus}
        machine.snapshot(tmp_path / "end")
    with Machine.restore(tmp_path / "end") as machine:
        again = {entry.range for bus in machine.parts.buses.values() for entry in bus}
    assert again == places


def test_restoring_twice_gives_the_same_twice(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot(_counter())
        machine.run(until="counter 9\n", timeout=30)
        machine.snapshot(tmp_path / "saved")
    outputs = []
    for _ in range(2):
        with Machine.restore(tmp_path / "saved") as machine:
            machine.run(timeout=30)
            outputs.append(machine.output)
    assert outputs[0] == outputs[1]
    assert outputs[0].endswith(b"counter 30\n")


def test_saving_a_restored_machine_gives_the_same_files(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot("stress")
        machine.run(budget=30_000)
        machine.snapshot(tmp_path / "one")
    with Machine.restore(tmp_path / "one") as machine:
        machine.snapshot(tmp_path / "two")
    for file in sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_in_another_process(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot(_counter())
        machine.run(until="counter 4\n", timeout=30)
        before = machine.output
        machine.snapshot(tmp_path / "saved")
    script = (
        "import sys; from vmm.machine import Machine\n"
        "with Machine.restore(sys.argv[1]) as m:\n"
        "    m.run(timeout=30); sys.stdout.buffer.write(m.output)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")], capture_output=True, check=True
    )
    assert before + done.stdout == COUNTED


def test_disk_use_is_what_was_touched(tmp_path: Path) -> None:
    with Machine(memory="128M") as machine:
        machine.boot("hello")
        machine.parts.memory.write(64 << 20, random.Random(1).randbytes(2 << 20))
        machine.snapshot(tmp_path / "saved")
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "saved").rglob("*"))
    assert (tmp_path / "saved" / "memory.bin").stat().st_size == 128 << 20
    assert 2 << 20 <= used < 3 << 20


# Writing.


def test_a_snapshot_replaces_another_and_leaves_nothing_beside(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot(_counter())
        for _ in range(2):
            machine.run(budget=100_000)
            machine.snapshot(tmp_path / "saved")
        executed = machine.parts.cpu.executed
    assert os.listdir(tmp_path) == ["saved"]
    assert snapshots.load_manifest(tmp_path / "saved").executed == executed


@pytest.mark.parametrize("make", ["file", "directory", "link"])
def test_what_is_no_snapshot_is_never_overwritten(tmp_path: Path, make: str) -> None:
    place = tmp_path / "mine"
    if make == "file":
        place.write_text("precious")
    elif make == "directory":
        place.mkdir()
        (place / "precious").write_text("precious")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    with Machine(memory="16M") as machine:
        machine.boot("hello")
        with pytest.raises(UserError, match="not a snapshot"):
            machine.snapshot(place)
        assert machine.run(timeout=30).ending is Ending.HALTED  # the guest lost nothing
    assert len(os.listdir(tmp_path)) == (2 if make == "link" else 1)


def test_a_place_that_does_not_exist(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot("hello")
        with pytest.raises(UserError, match="No such file"):
            machine.snapshot(tmp_path / "no" / "where")


def test_a_device_that_does_not_sleep_stops_the_snapshot_only(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.boot(_counter())
        machine.run(until="counter 2\n", timeout=30)
        proxy = next(p for p in machine.parts.proxies if p.name == "config-space")
        refusing = DeviceError("config-space", "busy")

        def refuse() -> None:
            raise refusing

        proxy.sleep, real = refuse, proxy.sleep  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match=r"config-space.*busy"):
            machine.snapshot(tmp_path / "saved")
        proxy.sleep = real  # type: ignore[method-assign]
        assert not os.listdir(tmp_path)
        assert machine.run(timeout=30).ending is Ending.HALTED
        assert machine.output == COUNTED


# Reading what is not whole.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good") / "saved"
    with Machine(memory="16M") as machine:
        machine.boot("stress")
        machine.run(budget=30_000)
        machine.snapshot(place)
    return place


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Iterator[Path]:
    # cp keeps the holes of memory.bin
    subprocess.run(["cp", "-r", "--sparse=always", str(good), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def _files(good: Path) -> list[str]:
    return sorted(str(path.relative_to(good)) for path in good.rglob("*") if path.is_file())


_BOARD = (
    *("acpi-pm", "debug-console", "hpet", "i8042", "ioapic", "lapic", "pci", "pic", "pit"),
    *("port92", "post", "reset", "rtc", "screen"),
)
ALL_FILES = sorted(
    [
        "cpu.json",
        *(f"devices/{name}.json" for name in ("config-space", "debug-exit", "echo", "serial")),
        *(f"devices/{name}.json" for name in _BOARD),
        "manifest.json",
        "memory.bin",
    ]
)


def test_the_files_of_a_snapshot(good: Path) -> None:
    assert _files(good) == ALL_FILES
    for name in ALL_FILES[:-1]:
        json.loads((good / name).read_text())


@pytest.mark.parametrize(
    "name", ["cpu.json", "devices/serial.json", "devices/pit.json", "manifest.json", "memory.bin"]
)
@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "longer", "flipped"])
def test_a_damaged_file_is_named(copy: Path, name: str, harm: str) -> None:
    file = copy / name
    data = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "longer":
        file.write_bytes(data + b" x")
    else:
        start = 0x100000 if name == "memory.bin" else len(data) // 2
        at = next(n for n in range(start, len(data)) if data[n])
        with open(file, "r+b") as opened:
            opened.seek(at)
            opened.write(bytes([data[at] ^ 1]))
    with pytest.raises(UserError, match=name):
        Machine.restore(copy)


def _end(body: dict[str, Any]) -> int:
    """Where the memory stretches of a manifest end."""
    last = body["memory"][-1]
    return int(last["offset"]) + int(last["length"])


def test_a_newer_format_is_refused(copy: Path) -> None:
    rewrite(copy, lambda body: None, version=3)
    with pytest.raises(UserError, match=r"format 3.*update"):
        Machine.restore(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda b: b["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}),
            "no snapshot has",
        ),
        (
            lambda b: b["files"].update({"devices/../x.json": {"size": 1, "sha256": ""}}),
            "no device",
        ),
        (lambda b: b["memory"].append({"offset": 1 << 40, "length": 4096, "sha256": ""}), "past"),
        (lambda b: b["memory"].append({"offset": 0, "length": 4096, "sha256": ""}), "out of order"),
        (lambda b: b["memory"].append(dict(b["memory"][-1])), "out of order"),
        (
            lambda b: b["memory"].append({**b["memory"][-1], "offset": _end(b) - 4096}),
            "out of order",
        ),
        (lambda b: b["config"].update({"memory": 1 << 50}), "memory"),
        (lambda b: b["config"].update({"memory": 32 << 20}), "memory.bin"),
        (lambda b: b["config"].update({"devices": []}), "nobody owns"),
        (lambda b: b["config"]["devices"][0].update({"name": "../x"}), "device name"),
        (lambda b: b["config"]["devices"][0].update({"model": "os:system"}), "allow"),
        (lambda b: b["files"].pop("cpu.json"), "cpu.json"),
        (lambda b: b["files"].pop("devices/echo.json"), "lacks device 'echo'"),
        (lambda b: b.pop("config"), "config"),
        (lambda b: b.update({"executed": -5}), "executed"),
    ],
)
def test_a_manifest_that_lies(
    copy: Path, change: Callable[[dict[str, object]], None], complaint: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(UserError, match=complaint):
        Machine.restore(copy)


def _replace_file(place: Path, name: str, value: object) -> None:
    """Another content for a file, with a manifest that agrees."""
    import hashlib

    data = json.dumps(value).encode()
    (place / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(place, lambda body: body["files"].update({name: entry}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("devices/echo.json", {"data": "AAAA"}),
        ("devices/echo.json", {"data": 5}),
        ("devices/echo.json", []),
        ("devices/echo.json", {}),
        ("devices/serial.json", {"no": "such"}),
        ("devices/pic.json", {}),
        ("devices/pci.json", {"address": -1}),
        ("devices/config-space.json", {"config": {"registers": [0] * 64}}),
    ],
)
def test_a_state_that_a_device_refuses(copy: Path, name: str, value: object) -> None:
    _replace_file(copy, name, value)
    with pytest.raises((DeviceError, UserError), match=r"restore|state"):
        Machine.restore(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"rip": -1},
        {"gpr": [0] * 15},
        {"cr0": 1 << 70},
        {"cs": {"selector": 1 << 20, "base": 0, "limit": 0, "attributes": 0}},
        {"efer": "x"},
        {"dr": []},
        {"vectors": ["zz"]},
        {"msrs": {"5": 5}},
        {"halted": 3},
    ],
)
def test_a_cpu_state_that_cannot_be(copy: Path, change: dict[str, object]) -> None:
    state = json.loads((copy / "cpu.json").read_text())
    _replace_file(copy, "cpu.json", state | change)
    with pytest.raises(UserError):
        Machine.restore(copy)


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory"])
def test_what_is_no_snapshot_at_all(tmp_path: Path, what: str) -> None:
    place = tmp_path / "x"
    if what == "a file":
        place.write_text("x")
    elif what != "nothing":
        place.mkdir()
    with pytest.raises(UserError, match="snapshot"):
        Machine.restore(place)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_to_the_manifest_is_one_clear_error(good: Path, data: st.DataObject) -> None:
    original = (good / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    spoiled = original[:at] + data.draw(st.binary(max_size=4)) + original[at + 1 :]
    place = good.parent / f"spoiled-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "manifest.json").write_bytes(spoiled)
    try:
        snapshots.load_manifest(place)
    except UserError:
        return
    finally:
        shutil.rmtree(place)
    # What is read in spite of it says the same.
    assert json.loads(spoiled) == json.loads(original)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    writes=st.dictionaries(st.integers(0, 255), st.binary(min_size=1, max_size=64), max_size=8),
    gpr=st.lists(st.integers(0, (1 << 64) - 1), min_size=16, max_size=16),
    state=st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=8,
    ),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    writes: dict[int, bytes],
    gpr: list[int],
    state: object,
) -> None:
    place = tmp_path_factory.mktemp("trip") / "saved"
    memory, again = GuestMemory(1 << 20), GuestMemory(1 << 20)
    for page, data in writes.items():
        memory.write(page << 12, data)
    saved = snapshots.Snapshot(MachineConfig(1 << 20), "test", CpuState(gpr=gpr), {"a": state}, 7)
    snapshots.save(place, saved, memory)
    loaded = snapshots.load(place, again)
    assert bytes(again.view) == bytes(memory.view)
    assert loaded == saved
    assert msgspec.json.encode(loaded.cpu) == msgspec.json.encode(saved.cpu)
    memory.close()
    again.close()
    shutil.rmtree(place)


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_a_closed_a20_gate_stays_closed(tmp_path: Path, clock: str) -> None:
    code = bytes.fromhex(
        # xor eax, eax; out 0x92, al; nop; nop; nop; nop
        "31c0e69290909090"
        # mov byte [0], 0; mov byte [0x100000], 1
        "c6050000000000c6050000100001"
        # mov al, [0]; mov dx, 0xf4; out dx, al; cli; hlt
        "a00000000066baf400eefaf4"
    )
    with Machine(memory="16M", clock=clock) as machine:
        machine.boot(code, BootOptions(load_addr=0x8000))
        machine.run(steps=3)
        machine.snapshot(tmp_path / "closed")
        assert machine.run(timeout=20).guest_value == 1
    with Machine.restore(tmp_path / "closed") as machine:
        assert machine.run(timeout=20).guest_value == 1


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_an_interrupt_that_waits_is_offered_at_the_same_count(tmp_path: Path, clock: str) -> None:
    """A repeatable run depends on it, however the window stands when the snapshot is taken."""
    window = InterruptWindow(size=2048, look_at=123_456)
    with Machine(memory="16M", clock=clock) as machine:
        machine.boot("hello")
        machine.parts.vcpu.window = window
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        assert machine.parts.vcpu.window == window
