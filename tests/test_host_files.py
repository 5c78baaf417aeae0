"""Files of the host that a device's options name: opened by the machine, handed over, checked."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from proxy_helpers import open_descriptors

from devices.bus import BusType
from devices.contract import Device, Region
from devices.errors import UserError
from devices.files import HostFile, host_files
from devices.options import describe
from vmm.config import DeviceConfig
from vmm.host_files import HostFiles
from vmm.machine import Machine
from vmm.outcome import Ending

READ_AND_EXIT = bytes.fromhex("66ba000eec66baf400eef4")
"""mov dx, 0xe00; in al, dx; mov dx, 0xf4; out dx, al; hlt"""


@dataclass(frozen=True)
class ReaderOptions:
    """What a user may set.

    Attributes:
        file: what is read, and perhaps
            written.
        folder: a directory.
        readonly: do not open `file` for writing.
        direct: past the host's cache.
    """

    file: Annotated[str, HostFile(read_only_if="readonly", direct_if="direct")] = ""
    folder: Annotated[str, HostFile(directory=True)] = ""
    readonly: bool = False
    direct: bool = False


class Reader(Device):
    """A port that reads as the first byte of its file."""

    model: ClassVar[str] = "reader"
    Options = ReaderOptions

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", BusType.PIO, 1, 0xE00),)

    def read(self, offset: int, size: int) -> int:
        return os.pread(self.host.fds["file"], 1, 0)[0]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\x2a" + bytes(4095))
    return path


def opened(**options: Any) -> dict[str, int]:
    files = HostFiles()
    try:
        return files.open(DeviceConfig("disk", "reader", options, isolated=False), Reader)
    finally:
        files.close()


def close(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)


def test_which_options_name_files() -> None:
    assert set(host_files(ReaderOptions)) == {"file", "folder"}
    file, folder, readonly, _ = describe(ReaderOptions)
    assert (file.kind, file.meaning) == ("FILE", "what is read, and perhaps written")
    assert (folder.kind, readonly.kind, readonly.default) == ("DIRECTORY", "true|false", "false")


def test_rights_follow_the_options(disk: Path) -> None:
    for text, rights in (("true", os.O_RDONLY), ("false", os.O_RDWR)):
        fds = opened(file=str(disk), readonly=text, folder=str(disk.parent))
        assert fcntl.fcntl(fds["file"], fcntl.F_GETFL) & os.O_ACCMODE == rights
        assert fcntl.fcntl(fds["folder"], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert not os.get_inheritable(fds["file"])
        close(fds)
    assert opened() == {}


@pytest.mark.parametrize("isolated", [True, False])
def test_a_device_reads_its_file(disk: Path, isolated: bool) -> None:
    before = open_descriptors()
    with Machine(memory="16M", devices=()) as machine:
        machine.add_device(Reader, "disk", isolated=isolated, file=str(disk))
        machine.add_device("debug-exit", isolated=False, may_exit=True)
        machine.boot(READ_AND_EXIT)
        held = [
            fcntl.fcntl(int(fd), fcntl.F_GETFL) & os.O_ACCMODE
            for fd in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(disk)
        ]
        # The machine keeps one for reading, for snapshots; to write is the device's alone.
        assert sorted(held) == ([os.O_RDONLY] if isolated else [os.O_RDONLY, os.O_RDWR])
        outcome = machine.run(timeout=20)
        assert (outcome.ending, outcome.guest_value) == (Ending.GUEST_EXIT, 0x2A)
        with pytest.raises(UserError, match="in use by another machine"):
            opened(file=str(disk))
    close(opened(file=str(disk)))
    assert open_descriptors() == before


def test_readers_share_and_a_writer_does_not(disk: Path) -> None:
    first, second = opened(file=str(disk), readonly=True), opened(file=str(disk), readonly=True)
    with pytest.raises(UserError, match=r"device 'disk': file=.*disk\.img: is in use by another"):
        opened(file=str(disk))
    close(first)
    close(second)
    writer = opened(file=str(disk))
    with pytest.raises(UserError, match="in use"):
        opened(file=str(disk), readonly=True)
    close(writer)


def test_what_cannot_be_opened_is_one_line(tmp_path: Path, disk: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = open_descriptors()
    for options, about in (
        ({"file": str(tmp_path / "none")}, "No such file"),
        ({"file": str(tmp_path)}, "Is a directory"),
        ({"file": str(tmp_path), "readonly": True}, "neither a file nor a block device"),
        ({"file": str(tmp_path / "pipe")}, "neither a file nor a block device"),
        ({"file": "/dev/null"}, "neither a file nor a block device"),
        ({"file": "a\0b"}, "null"),
        ({"folder": str(disk), "file": str(disk)}, "is not a directory"),
    ):
        with pytest.raises(UserError, match=about) as caught:
            opened(**options)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("device 'disk': ")
    assert open_descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's devices are somebody else")
def test_a_directory_of_root_is_refused_unless_its_device_can_use_it(tmp_path: Path) -> None:
    class SharerOptions(ReaderOptions):
        folder: Annotated[str, HostFile(directory=True, read_only_if="readonly")] = ""

    class Sharer(Reader):
        Options = dataclass(frozen=True)(SharerOptions)

    def share(readonly: bool, isolated: bool = True) -> None:
        options = {"folder": str(tmp_path), "readonly": readonly}
        close(HostFiles().open(DeviceConfig("p9", "sharer", options, isolated=isolated), Sharer))

    for mode, readonly, mend in ((0o755, False, "read-only"), (0o750, True, "chmod")):
        tmp_path.chmod(mode)
        with pytest.raises(UserError, match=f"folder=.*belongs to root, .*chown.*{mend}"):
            share(readonly)
    tmp_path.chmod(0o755)
    share(readonly=True)
    tmp_path.chmod(0o777)
    share(readonly=False)
    tmp_path.chmod(0o700)
    share(readonly=False, isolated=False)
    os.chown(tmp_path, 7, 8)
    share(readonly=False)


def test_a_file_system_without_o_direct_is_named(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: str, flags: int, *_: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(errno.EINVAL, "Invalid argument")

    device = DeviceConfig("disk", "reader", {"file": str(disk), "direct": True})
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        with pytest.raises(
            UserError, match=r"its file system, \w+, has no O_DIRECT; leave direct off"
        ):
            HostFiles().open(device, Reader)
