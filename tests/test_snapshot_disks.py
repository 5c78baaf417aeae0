"""What a snapshot keeps of disks, and on what disks a restored machine runs."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy_helpers import open_descriptors
from snapshot_rig import rewrite

from devices.bus import BusType
from devices.contract import Device, Region
from devices.errors import UserError
from devices.files import HostFile
from proxy.jail import policy
from vmm import disks
from vmm.cli import output
from vmm.machine import Machine
from vmm.outcome import Ending

PORT = 0xE00
SIZE = 3 << 20


@dataclass(frozen=True)
class ByteOptions:
    """What a user may set.

    Attributes:
        file: the disk.
        readonly: do not write it.
    """

    file: Annotated[str, HostFile(read_only_if="readonly")] = ""
    readonly: bool = False


class Bytes(Device):
    """A port for each of the first eight bytes of its file."""

    model: ClassVar[str] = "bytes"
    Options = ByteOptions

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", BusType.PIO, 8, PORT),)

    def read(self, offset: int, size: int) -> int:
        return os.pread(self.host.fds["file"], 1, offset)[0]

    def write(self, offset: int, size: int, value: int) -> None:
        os.pwrite(self.host.fds["file"], bytes([value]), offset)


EITHER_WAY = pytest.mark.parametrize("isolated", [False, True], ids=["in-process", "jailed"])


@pytest.fixture(autouse=True)
def may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policy._OWN, f"{__name__}:Bytes", policy.DISK)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"12345678")
    os.truncate(path, SIZE)
    return path


def machine_with(disk: Path, isolated: bool = False, **options: Any) -> Machine:
    machine = Machine(memory="16M", devices=())
    machine.add_device(Bytes, "disk", isolated=isolated, file=str(disk), **options)
    machine.boot("hello")
    return machine


def restored(place: Path, **how: Any) -> Machine:
    return Machine.restore(place, models=[Bytes], **how)


def get(machine: Machine, at: int = 0) -> int:
    machine.resume()
    return machine.parts.buses[BusType.PIO].read(PORT + at, 1)


def put(machine: Machine, value: int, at: int = 0) -> None:
    machine.resume()
    machine.parts.buses[BusType.PIO].write(PORT + at, 1, value)
    assert get(machine, at) == value


def refused(place: Path, **how: Any) -> str:
    before = open_descriptors()
    with pytest.raises(UserError) as caught:
        restored(place, **how)
    assert open_descriptors() == before
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"snapshot {place}: device 'disk': file=")
    return text


@EITHER_WAY
def test_restored_twice_it_has_the_same_disk_twice(
    tmp_path: Path, disk: Path, isolated: bool
) -> None:
    saved = tmp_path / "saved"
    with machine_with(disk, isolated) as machine:
        put(machine, 11)
        lines = machine.snapshot(saved)
        put(machine, 22)
    assert len(lines) == 1
    assert lines[0].startswith("disk disk.file: ")
    with restored(saved) as first, restored(saved) as second:
        assert (get(first), get(second)) == (11, 11)
        put(first, 33)
        assert (get(first), get(second)) == (33, 11)
        assert "ends with this machine" in first.parts.host_files.notes[0]
    with restored(saved) as third:
        assert get(third) == 11
    assert disk.read_bytes()[0] == 22, "the file itself is nobody's"
    told: list[tuple[str, int, int]] = []
    restored(saved, progress=lambda *how: told.append(how)).close()
    assert told == [("disk.file", 0, SIZE)]
    disk.unlink()
    with restored(saved) as fourth:
        assert get(fourth) == 11
    assert sorted(each.name for each in (saved / "disks").iterdir()) == ["disk.file"]


@EITHER_WAY
def test_a_machine_goes_on_with_the_file_itself(tmp_path: Path, disk: Path, isolated: bool) -> None:
    saved = tmp_path / "saved"
    with machine_with(disk, isolated) as machine:
        put(machine, 11)
        machine.snapshot(saved)
    with restored(saved, disks="original") as machine:
        assert machine.parts.host_files.notes == []
        assert get(machine) == 11
        with pytest.raises(UserError, match="in use by another machine"):
            restored(saved, disks="original")
        put(machine, 12)
    assert disk.read_bytes()[0] == 12
    text = refused(saved, disks="original")
    assert "has changed since the snapshot: 3145728 bytes, written 2" in text
    assert "leave --disks original out" in text
    with restored(saved) as machine:
        assert get(machine) == 11


def test_a_chain_of_snapshots_of_private_disks(tmp_path: Path, disk: Path) -> None:
    with machine_with(disk) as machine:
        machine.snapshot(tmp_path / "0")
    for turn in range(3):
        with restored(tmp_path / str(turn)) as machine:
            assert [get(machine, at) for at in range(turn)] == [100 + at for at in range(turn)]
            put(machine, 100 + turn, turn)
            with pytest.raises(UserError, match=r"disk disk\.file .*ends with this machine"):
                machine.snapshot(tmp_path / "no", disks="none")
            machine.snapshot(tmp_path / str(turn + 1))
    # In its own place, too.
    with restored(tmp_path / "3") as machine:
        put(machine, 99, 7)
        machine.snapshot(tmp_path / "3")
    with restored(tmp_path / "3") as machine:
        assert (get(machine, 0), get(machine, 7)) == (100, 99)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0", "1", "2", "3", "disk.img"]


def test_left_out_it_is_needed_as_it_was(tmp_path: Path, disk: Path) -> None:
    saved = tmp_path / "saved"
    with machine_with(disk) as machine:
        put(machine, 11)
        lines = machine.snapshot(saved, disks="none")
    assert lines == [f"disk disk.file: left out; a restore needs {disk} as it is now"]
    assert not list((saved / "disks").iterdir())
    for _ in range(2):
        with restored(saved) as machine:
            assert get(machine) == 11
            put(machine, 12)
    assert disk.read_bytes()[0] == 11
    disk.touch()
    assert "has changed since the snapshot" in refused(saved)
    disk.unlink()
    assert "No such file" in refused(saved)


@EITHER_WAY
def test_a_read_only_disk_is_a_reference(tmp_path: Path, disk: Path, isolated: bool) -> None:
    saved = tmp_path / "saved"
    with machine_with(disk, isolated, readonly=True) as machine:
        lines = machine.snapshot(saved)
    assert lines == [f"disk disk.file: read-only; a restore needs {disk} as it is"]
    for how in ("private", "original"):
        with restored(saved, disks=how) as machine:
            assert get(machine) == ord("1")
    then = os.stat(disk)
    disk.write_bytes(b"x")
    assert "has changed since the snapshot: 3145728 bytes" in refused(saved)
    disk.write_bytes(b"x" * SIZE)
    assert "has changed since the snapshot" in refused(saved)
    os.utime(disk, ns=(then.st_atime_ns, then.st_mtime_ns))
    with restored(saved) as machine:
        assert get(machine) == ord("x"), "only size and time are looked at"


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


def _instead(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "No such file"),
    "empty": (lambda f: f.write_bytes(b""), "has 0 bytes instead of 3145728"),
    "longer": (lambda f: os.truncate(f, SIZE + 1), "has 3145729 bytes"),
    "changed": (_flip, "is damaged: its checksum does not match"),
    "FIFO": (lambda f: _instead(f, os.mkfifo), "is not a file"),
    "directory": (lambda f: _instead(f, os.mkdir), "is not a file"),
    "link": (lambda f: _instead(f, lambda at: at.symlink_to("/etc/passwd")), "symbolic links"),
}


@pytest.fixture
def saved(tmp_path: Path, disk: Path) -> Path:
    with machine_with(disk) as machine:
        machine.snapshot(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("harm", DAMAGE)
def test_damage_is_named(saved: Path, harm: str) -> None:
    spoil, complaint = DAMAGE[harm]
    spoil(saved / "disks" / "disk.file")
    text = refused(saved)
    assert complaint in text
    assert str(saved / "disks" / "disk.file") in text


def test_a_copied_snapshot_is_known_by_its_content(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy", copy_function=shutil.copyfile)
    with restored(tmp_path / "copy") as machine:
        assert get(machine) == ord("1")


def test_a_copied_clone_needs_its_times(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(target: int, _request: int, source: int) -> None:
        os.pwrite(target, os.pread(source, SIZE, 0), 0)

    saved = tmp_path / "saved"
    with machine_with(disk) as machine:
        monkeypatch.setattr(disks.fcntl, "ioctl", clone)
        (line,) = machine.snapshot(saved)
        assert line.startswith("disk disk.file: cloned in ")
        with restored(saved) as again:
            assert get(again) == ord("1")
    shutil.copytree(saved, tmp_path / "copy")  # with times
    with restored(tmp_path / "copy") as machine:
        assert get(machine) == ord("1")
    (tmp_path / "copy" / "disks" / "disk.file").touch()
    assert "copy snapshots with their times (cp -a)" in refused(tmp_path / "copy")


def test_a_real_clone(tmp_path: Path) -> None:
    """On a file system that can, if this host lets us make one."""
    mkfs = shutil.which("mkfs.btrfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    place = tmp_path / "mounted"
    place.mkdir()
    volume = tmp_path / "volume"
    volume.touch()
    os.truncate(volume, 512 << 20)
    if mkfs is None or subprocess.run([mkfs, "-q", volume], check=False, timeout=60).returncode:
        pytest.skip("no mkfs.btrfs here")
    mount = ["mount", "-o", "loop", volume, place]
    if subprocess.run(mount, check=False, timeout=60, capture_output=True).returncode:
        pytest.skip("no mount of a loop device here")
    try:
        disk = place / "disk.img"
        disk.write_bytes(os.urandom(16 << 20))
        first = disk.read_bytes()[0]
        with machine_with(disk) as machine:
            (line,) = machine.snapshot(place / "saved")
            assert "cloned" in line
            put(machine, first ^ 1)
        for _ in range(2):
            with restored(place / "saved") as machine:
                assert "cloned" in machine.parts.host_files.notes[0]
                assert get(machine) == first
                put(machine, first ^ 2)
        assert disk.read_bytes()[0] == first ^ 1
    finally:
        subprocess.run(["umount", "-l", place], check=True, timeout=60)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda b: b["disks"].clear(), "the snapshot says nothing of it"),
        (lambda b: b.pop("disks"), "the snapshot says nothing of it"),
        (lambda b: b["disks"].update({"../x.file": b["disks"]["disk.file"]}), "no device's disk"),
        (lambda b: b["disks"]["disk.file"]["copy"].update(written="x"), "manifest.json"),
        (lambda b: b["disks"]["disk.file"].update(sha256="", copy={"size": SIZE, "written": 0}),
         "not 1970"),
        (lambda b: b["disks"]["disk.file"].update(
            sha256="", copy={"size": SIZE, "written": 1 << 62}), "not 2116"),
        (lambda b: b["disks"]["disk.file"].update(copy=None), ""),
    ],
)  # fmt: skip
def test_a_manifest_that_lies(saved: Path, change: Callable[[Any], None], complaint: str) -> None:
    rewrite(saved, change)
    if not complaint:
        restored(saved).close()  # the file itself, which is as it was
        return
    with pytest.raises(UserError, match=complaint) as caught:
        restored(saved)
    assert "\n" not in str(caught.value)


@EITHER_WAY
def test_every_drive_of_a_controller_is_kept(tmp_path: Path, disk: Path, isolated: bool) -> None:
    """Also those of models that know nothing of snapshots' disks; a log is no disk."""
    second, log = tmp_path / "second.img", tmp_path / "log"
    second.write_bytes(b"second".ljust(512, b"\0"))
    log.write_bytes(b"a line\n")
    saved = tmp_path / "saved"
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device("ata", "ide", isolated=isolated, disk0=str(disk), disk3=str(second))
        machine.add_device("console", isolated=isolated, log=str(log))
        machine.boot("hello")
        machine.snapshot(saved)
    names = ["ide.disk0", "ide.disk3"]
    assert sorted(each.name for each in (saved / "disks").iterdir()) == names
    assert (saved / "disks" / "ide.disk3").read_bytes() == second.read_bytes()
    log.write_bytes(b"a line\nanother\n")
    second.unlink()
    for _ in range(2):
        with restored(saved) as machine:
            assert len(machine.parts.host_files.notes) == 2
    assert log.read_bytes() == b"a line\nanother\n"
    with pytest.raises(UserError, match=r"disk3=.*second\.img: No such file"):
        restored(saved, disks="original")


# What goes wrong while a snapshot is written.


class Halfway(Exception):
    pass


def test_what_is_interrupted_leaves_nothing(tmp_path: Path, disk: Path) -> None:
    def end(name: str, done: int, total: int) -> None:
        seen.append((name, done, total))
        if done:
            raise Halfway

    disk.write_bytes(os.urandom(SIZE))
    seen: list[tuple[str, int, int]] = []
    with machine_with(disk) as machine:
        with pytest.raises(Halfway):
            machine.snapshot(tmp_path / "saved", progress=end)
        assert seen == [("disk.file", 0, SIZE), ("disk.file", 1 << 20, SIZE)]
        assert os.listdir(tmp_path) == ["disk.img"]
        assert machine.run(timeout=20).ending is Ending.HALTED


def test_ctrl_c_ends_a_long_snapshot(tmp_path: Path, disk: Path) -> None:
    def interrupt(_name: str, _done: int, _total: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    disk.write_bytes(os.urandom(SIZE))
    errors: list[str] = []

    def snapshot() -> None:
        if not errors:
            with pytest.raises(UserError) as caught:
                machine.snapshot(tmp_path / "saved", progress=interrupt)
            errors.append(str(caught.value))

    with machine_with(disk) as machine:
        machine.between = snapshot
        machine.parts.request_attention()
        with pytest.raises(KeyboardInterrupt):
            machine.run(timeout=20)
        assert errors == [f"snapshot {tmp_path / 'saved'}: SIGINT"]
        assert os.listdir(tmp_path) == ["disk.img"]
        machine.snapshot(tmp_path / "saved")


def test_a_full_disk_is_one_line(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, _views: object, _offset: int) -> None:
        os.pwrite(fd, b"half", 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with machine_with(disk) as machine:
        with monkeypatch.context() as patch:
            patch.setattr(disks, "host_io", SimpleNamespace(write_all=full))
            with pytest.raises(UserError) as caught:
                machine.snapshot(tmp_path / "saved")
        assert f"disk disk.file ({disk}): No space left on device" in str(caught.value)
        assert "--snapshot-disks none" in str(caught.value)
        assert os.listdir(tmp_path) == ["disk.img"]
        machine.snapshot(tmp_path / "saved", disks="none")


def test_progress_is_a_line_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(output, "monotonic", lambda: now)
    said: list[str] = []
    tell = output.disk_progress(said.append)
    for second in (0.0, 0.5, 1.0, 1.5, 2.5):
        now = 10.0 + second
        tell("blk.path", int(second * 10) << 20, 30 << 20)
    assert said == ["disk blk.path: 10 of 30 MiB", "disk blk.path: 25 of 30 MiB"]


# Content.


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 5 << 20),
    pieces=st.lists(st.tuples(st.integers(0, 5 << 20), st.binary(max_size=64)), max_size=5),
    zeros=st.lists(st.tuples(st.integers(0, 5 << 20), st.integers(1, 1 << 20)), max_size=2),
)
def test_content_is_the_same_and_known_again(
    size: int, pieces: list[tuple[int, bytes]], zeros: list[tuple[int, int]]
) -> None:
    source, target = os.memfd_create("source"), os.memfd_create("target")
    plain = os.memfd_create("plain")
    try:
        for at, length in zeros:
            os.pwrite(source, bytes(length), at)
        for at, piece in pieces:
            os.pwrite(source, piece, at)
        os.truncate(source, size)
        content = os.pread(source, size + 1, 0)
        done = disks.transfer(source, target)
        assert os.pread(target, size + 1, 0) == content
        os.pwrite(plain, content, 0)  # without holes
        assert done.sha256 == disks.digest(target) == disks.digest(source) == disks.digest(plain)
        assert done.data >= sum(1 for byte in content if byte)
        if content.strip(b"\0"):
            first = content.index(content.strip(b"\0")[0])
            os.pwrite(plain, bytes([content[first] ^ 1]), first)
            assert disks.digest(plain) != done.sha256
    finally:
        for fd in (source, target, plain):
            os.close(fd)


def test_holes_take_no_space(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.touch()
    os.truncate(source, 1 << 40)
    with open(source, "r+b") as file, open(target, "w+b") as copy:
        file.seek(1 << 39)
        file.write(b"x")
        file.flush()
        assert disks.transfer(file.fileno(), copy.fileno()).data <= 1 << 20
    assert target.stat().st_size == 1 << 40
    assert target.stat().st_blocks << 9 <= 2 << 20


def test_no_place_beside_it_is_no_reason(tmp_path: Path) -> None:
    fd = disks.private_file(tmp_path / "none")
    os.close(fd)
