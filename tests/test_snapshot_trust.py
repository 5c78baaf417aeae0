"""Snapshots from elsewhere and other people's files: what is imported, deleted and waited for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from snapshot_rig import rewrite

from devices.bus import BusType
from devices.contract import Device, DeviceHost, Region
from devices.errors import DeviceFailure, UserError
from proxy.jail import JailUnavailable
from vmm import snapshot as snapshots
from vmm.config import MachineConfig
from vmm.cpu.state import CpuState
from vmm.machine import Machine
from vmm.memory import GuestMemory
from vmm.outcome import Ending


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good") / "saved"
    with Machine(memory="16M") as machine:
        machine.boot("hello")
        machine.snapshot(place)
    return place


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", "--sparse=always", str(good), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def _device(body: dict[str, Any], name: str) -> dict[str, Any]:
    return next(d for d in body["config"]["devices"] if d["name"] == name)


def _replace_state(place: Path, name: str, value: object) -> None:
    data = json.dumps(value).encode()
    (place / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(place, lambda body: body["files"].update({name: entry}))


# What a snapshot may replace.


def _write(path: Path, text: str = "precious") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _web_project(place: Path) -> None:
    shutil.rmtree(place)
    _write(place / "manifest.json", '{"name": "App", "icons": []}')
    _write(place / "index.html")


def _only_a_manifest(place: Path) -> None:
    shutil.rmtree(place)
    _write(place / "manifest.json", '{"name": "App", "icons": []}')


def _instead(place: Path, make: Callable[[Path], object]) -> None:
    """Another thing in a file's place."""
    place.unlink()
    make(place)


def _devices_elsewhere(place: Path) -> None:
    (place / "devices").rename(place.parent / "away")
    (place / "devices").symlink_to(place.parent / "away")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "web project": _web_project,
    "manifest of another kind": _only_a_manifest,
    "manifest that is not JSON": lambda p: _write(p / "manifest.json", "]"),
    "manifest that is a directory": lambda p: _instead(p / "manifest.json", Path.mkdir),
    "manifest that is a FIFO": lambda p: _instead(p / "manifest.json", os.mkfifo),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "one more file": lambda p: _write(p / "notes.txt"),
    "one more hidden file": lambda p: _write(p / ".git"),
    "one more directory": lambda p: (p / "src").mkdir(),
    "one more file among the devices": lambda p: _write(p / "devices" / "notes.txt"),
    "a directory among the devices": lambda p: (p / "devices" / "x.json").mkdir(),
    "a link for its memory": lambda p: _instead(
        p / "memory.bin", lambda file: file.symlink_to("/dev/null")
    ),
    "a link for its devices": _devices_elsewhere,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_directory_is_never_replaced(copy: Path, make: Callable[[Path], None]) -> None:
    make(copy)
    before = sorted((str(p), p.lstat().st_ino, p.lstat().st_mtime_ns) for p in copy.rglob("*"))
    memory = GuestMemory(1 << 20)
    saved = snapshots.Snapshot(MachineConfig(1 << 20), "test", CpuState(), {})
    with pytest.raises(UserError, match="not a snapshot"):
        snapshots.save(copy, saved, memory)
    memory.close()
    after = sorted((str(p), p.lstat().st_ino, p.lstat().st_mtime_ns) for p in copy.rglob("*"))
    assert after == before


def test_a_damaged_snapshot_may_be_replaced(copy: Path) -> None:
    (copy / "cpu.json").unlink()
    (copy / "memory.bin").write_bytes(b"")
    memory = GuestMemory(1 << 20)
    snapshots.save(copy, snapshots.Snapshot(MachineConfig(1 << 20), "test", CpuState(), {}), memory)
    assert snapshots.load(copy, memory).engine == "test"
    memory.close()


def _save_and_die(place: Path, nth: int) -> None:
    """In a process of its own: save, and be killed at the `nth` thing that touches the disk."""
    left = nth

    def dies(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for module, name in (
        *((os, each) for each in ("fsync", "pwrite", "rename", "replace", "ftruncate", "chmod")),
        *((os, each) for each in ("rmdir", "unlink")),
        (shutil, "rmtree"),
    ):
        setattr(module, name, dies(getattr(module, name)))
    memory = GuestMemory(1 << 20)
    memory.write(0, b"new")
    saved = snapshots.Snapshot(MachineConfig(1 << 20), "new", CpuState(), {"a": 1, "b": 2})
    snapshots.save(place, saved, memory)


def test_a_replacement_that_is_killed_anywhere_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    place = tmp_path / "saved"
    memory = GuestMemory(1 << 20)
    memory.write(0, b"old")
    old = snapshots.Snapshot(MachineConfig(1 << 20), "old", CpuState(), {"a": 1})
    found = []
    for nth in range(100):
        snapshots.save(place, old, memory)
        pid = os.fork()
        if pid == 0:
            try:
                _save_and_die(place, nth)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        again = GuestMemory(1 << 20)
        found.append(snapshots.load(place, again).engine)
        assert bytes(again.view[:3]).decode() == found[-1]
        again.close()
        if status == 0:
            break
    memory.close()
    # Killed before the swap, after it, and at last not at all.
    assert status == 0
    assert found == sorted(found, reverse=True)
    assert {"old", "new"} == set(found)
    assert found.count("new") >= 2
    assert found.count("old") >= 5


def test_the_old_snapshot_goes_only_when_the_new_one_is_in_its_place(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rmtree = shutil.rmtree

    def spy(path: Any, *args: Any, **kwargs: Any) -> None:
        if os.path.exists(path):
            seen.append((snapshots.load_manifest(copy).engine, str(path) == str(copy)))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", spy)
    memory = GuestMemory(1 << 20)
    snapshots.save(copy, snapshots.Snapshot(MachineConfig(1 << 20), "new", CpuState(), {}), memory)
    memory.close()
    assert seen == [("new", False)]
    assert os.listdir(copy.parent) == ["copy"]


# What a snapshot may ask for.


class Tally(Device):
    model: ClassVar[str] = "tally"

    def regions(self) -> tuple[Region, ...]:
        return (Region("count", BusType.PIO, 4, start=0x540),)

    def read(self, offset: int, size: int) -> int:
        return 9


def _make_tally(host: DeviceHost) -> Device:
    return Tally(host)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("jail", ["auto", "off"])
def test_a_snapshot_does_not_choose_what_is_imported(
    copy: Path, monkeypatch: pytest.MonkeyPatch, isolated: bool, jail: str
) -> None:
    (copy.parent / "evil_model.py").write_text(EVIL)
    monkeypatch.syspath_prepend(copy.parent)
    monkeypatch.delitem(sys.modules, "evil_model", raising=False)
    change = {"model": "evil_model:Evil", "isolated": isolated}
    rewrite(copy, lambda body: _device(body, "echo").update(change))
    with pytest.raises(UserError, match=r"'echo'.*evil_model:Evil.*--allow-model"):
        Machine.restore(copy, jail=jail)
    assert not (copy.parent / "imported").exists()
    with pytest.raises(UserError, match="evil_model:Evil"):
        Machine.restore(copy, models=["evil_model:Other", "evil_model"])
    assert not (copy.parent / "imported").exists()
    with pytest.raises(UserError, match="cannot be loaded"):
        Machine.restore(copy, models=["evil_model:Evil"])  # named, so it is imported
    assert (copy.parent / "imported").exists()


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("how", ["class", "text", "factory", "factory class"])
def test_models_of_ones_own_come_back_by_name(tmp_path: Path, isolated: bool, how: str) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(Tally, isolated=isolated)
        machine.boot(bytes.fromhex("66ba4005ed66baf400ee"))
        machine.snapshot(tmp_path / "saved")
    ways: dict[str, dict[str, Any]] = {
        "class": {"models": [Tally]},
        "text": {"models": [f"{__name__}:Tally"]},
        "factory": {"factories": {"tally": _make_tally}},
        "factory class": {"factories": {"tally": Tally}},
    }
    with Machine.restore(tmp_path / "saved", **ways[how]) as machine:
        assert machine.run(timeout=30).guest_value == 9


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from devices.contract import Device\nclass Mine(Device):\n    model = 'mine'\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{tmp_path}"}

    def vmm(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vmm", *args],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    boot = ["boot", "hello", "--mem", "16M", "--device", "mine:Mine"]
    assert vmm(*boot, "--snapshot", "s", "--snapshot-at", "end").returncode == 0
    refused = vmm("restore", "s")
    assert refused.returncode == 2
    assert "--allow-model mine:Mine" in refused.stderr
    assert vmm("restore", "s", "--allow-model", "mine:Mine").returncode == 0


def test_a_snapshot_cannot_switch_off_the_jail_silently(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(copy, lambda body: _device(body, "echo").update({"isolated": False}))
    with Machine.restore(copy) as machine:
        assert "'echo'" in machine.parts.jail_line
    monkeypatch.setattr("proxy.jail.plan.JailPlan.check", lambda self: None)
    with pytest.raises(JailUnavailable, match="'echo'"):
        Machine.restore(copy, jail="strict")


def test_another_engine_is_said(copy: Path, good: Path) -> None:
    with Machine.restore(good) as machine:
        assert not [text for _, text in machine.parts.wiring.log_lines if "unicorn" in text]
    rewrite(copy, lambda body: body.update({"engine": "unicorn 1.0.0"}))
    with Machine.restore(copy) as machine:
        assert [text for _, text in machine.parts.wiring.log_lines if "unicorn 1.0.0" in text]
        assert machine.run(timeout=30).ending is Ending.HALTED


# What is read.


NAMES = ["manifest.json", "cpu.json", "memory.bin", "devices/serial.json", "devices/pit.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "endless"])
def test_what_is_no_file_is_named_and_not_waited_for(copy: Path, name: str, kind: str) -> None:
    file = copy / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to("/dev/tty" if kind == "device" else "/dev/zero")
    script = "import sys; from vmm.machine import Machine; Machine.restore(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert "UserError" in last
    assert name in last


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("devices/echo.json", {"data": 5}),
        ("devices/debug-exit.json", {"no": "such"}),
        ("devices/pic.json", {}),
    ],
)
def test_a_refused_state_is_an_error_of_the_snapshot(copy: Path, name: str, value: object) -> None:
    _replace_state(copy, name, value)
    with pytest.raises(UserError) as refused:
        Machine.restore(copy)
    assert str(copy) in str(refused.value)
    assert name in str(refused.value)


def test_a_bottomless_state_is_an_error_of_the_snapshot(copy: Path) -> None:
    data = b"[" * 100_000 + b"]" * 100_000
    (copy / "devices" / "echo.json").write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(copy, lambda body: body["files"].update({"devices/echo.json": entry}))
    with pytest.raises(UserError, match=r"devices/echo.json"):
        Machine.restore(copy)


class Mortal(Tally):
    def restore(self, saved: Any) -> None:
        os._exit(3)


def test_a_device_that_dies_of_its_state_is_a_failure(tmp_path: Path) -> None:
    with Machine(memory="16M") as machine:
        machine.add_device(Mortal, "mortal")
        machine.build()
        machine.snapshot(tmp_path / "saved")
    with pytest.raises(DeviceFailure, match="mortal"):
        Machine.restore(tmp_path / "saved", models=[Mortal])
