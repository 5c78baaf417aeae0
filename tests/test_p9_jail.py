"""The 9P device in its jail: as good as without one; taken over it has its directory alone.

The jails are those of a host with mount namespaces and of one without, where Landlock alone keeps
it to the directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from jail_tools import NAMESPACE_LAYERS, ORDINARY_UID
from p9_client import Client, P9Error, close_rigs, local_rig
from proxy_helpers import Recorder
from taken_over import Own, TakenOver, Takeover, Verdict, assert_caught, assert_stopped
from virtio_driver import RAM_SIZE

from devices.contract import DeviceHost
from devices.errors import DeviceError
from devices.virtio.p9 import messages as m
from devices.virtio.p9 import protocol as p
from devices.virtio.p9.device import P9Options
from proxy.device import ProxyDevice
from proxy.jail import JailMode, JailReport, linux, plan_jail
from proxy.jail.escape import ATTEMPTS, Attempt, bait
from proxy.warden import Warden
from vmm.memory import GuestMemory

PLANS: dict[str, tuple[str, ...]] = {
    "full": (),
    "landlock alone": (*NAMESPACE_LAYERS, "root"),
    "root alone": ("landlock",),
}


class ProxiedRig:
    """A `virtio_driver.Rig` of a device process."""

    def __init__(self, warden: Warden, directory: Path, **options: Any) -> None:
        self.warden, self.directory, self.options = warden, directory, options
        self.memory = GuestMemory(RAM_SIZE)
        self.ram: Any = self.memory.view
        self.events = Recorder()
        self._start()

    def _start(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        options = {"path": "shared", **self.options}
        child = self.warden.spawn("p9", "9p", options, fds={"path": fd}, guest_memory=RAM_SIZE)
        os.close(fd)
        ram = self.memory.for_devices()
        self.device = ProxyDevice(child, self.events, deadline=20, memory=ram)

    def read(self, bar: int, offset: int, size: int) -> int:
        return self.device.handlers()[bar].read(offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.device.handlers()[bar].write(offset, size, value)

    def read_config(self, register: int) -> int:
        return self.device.read_config(register)

    def write_config(self, register: int, value: int, size: int = 4, offset: int = 0) -> None:
        self.device.write_config(register, offset, value.to_bytes(size, "little"))

    def settle(self) -> None:
        self.device.drain()
        self.device.sync()

    @property
    def irq(self) -> bool:
        return bool(self.events.seen and self.events.seen[-1] == ("irq", 0, True))

    @property
    def messages(self) -> list[tuple[int, int]]:
        return []

    @property
    def logs(self) -> list[str]:
        return [each[1] for each in self.events.seen if each[0] == "log"]

    def snapshot(self) -> Any:
        self.device.sleep()
        return self.device.snapshot()

    def replace(self, saved: Any) -> None:
        self.device.shutdown()
        self._start()
        self.device.sleep()
        self.device.restore(saved)
        self.device.wake()

    def close(self) -> None:
        self.device.shutdown()
        self.memory.close()


def make_shared(tmp_path: Path) -> Path:
    """A directory that an ordinary user owns, with a secret beside it that all may read."""
    (tmp_path / "secret").write_text("secret")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "dir").mkdir()
    (shared / "file").write_bytes(b"contents")
    (shared / "out").symlink_to("../secret")
    (shared / "abs").symlink_to(tmp_path / "secret")
    (shared / "locked").write_bytes(b"x")
    (shared / "locked").chmod(0)
    for path in (shared, *shared.iterdir()):
        if os.geteuid() == 0:
            os.chown(path, ORDINARY_UID, ORDINARY_UID, follow_symlinks=False)
    return shared


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return make_shared(tmp_path)


@pytest.fixture(scope="module")
def wardens() -> Iterator[Callable[[str], Warden]]:
    made: dict[str, Warden] = {}

    def get(name: str) -> Warden:
        if name not in made:
            made[name] = Warden(plan=plan_jail(JailMode.AUTO, without=PLANS[name]))
        return made[name]

    yield get
    for warden in made.values():
        warden.close()


@contextmanager
def jailed(warden: Warden, shared: Path, **options: Any) -> Iterator[Client]:
    rig = ProxiedRig(warden, shared, **options)
    try:
        yield Client(rig)
    finally:
        rig.close()


# The device as it should be.


def story(client: Client, shared: Path) -> list[Any]:
    """One of everything, and what came of it."""
    told: list[Any] = []

    def tell(call: Callable[[], Any]) -> None:
        try:
            told.append(call())
        except P9Error as error:
            told.append(errno.errorcode[error.errno or 0])

    def about(name: str) -> Any:
        found = client.stat(name)
        return found.mode, found.uid, found.gid, found.size, found.links, found.mtime

    times = {"mtime": 7, "mtime_ns": 8}
    old = os.umask(0)  # a device in the process of its machine has that one's
    try:
        fid = client.create("made", 0o666)
        tell(lambda: client.write(fid, b"x" * 20_000))
        tell(lambda: client.read(fid, 19_990))
        tell(lambda: client.ask(m.Fsync(fid, 0), m.Rfsync))
        tell(lambda: client.setattr(fid, p.AttrValid.SIZE, size=100))
        tell(lambda: client.ask(m.Mkdir(0, b"new", 0o777, 0), m.Rmkdir) and 0)
        tell(lambda: client.ask(m.Symlink(0, b"sym", b"/etc", 0), m.Rsymlink) and 0)
        tell(lambda: client.ask(m.Mknod(0, b"fifo", stat.S_IFIFO | 0o640, 0, 0, 0), m.Rmknod) and 0)
        tell(lambda: client.ask(m.Mknod(0, b"dev", stat.S_IFCHR, 0, 0, 0), m.Rmknod) and 0)
    finally:
        os.umask(old)
    tell(lambda: client.ask(m.Link(client.walk("new"), client.walk("file"), b"hard"), m.Rlink))
    tell(lambda: client.ask(m.Renameat(0, b"made", client.walk("new"), b"moved"), m.Rrenameat))
    tell(lambda: client.ask(m.Rename(client.walk("file"), client.walk("dir"), b"f"), m.Rrename))
    tell(lambda: client.ask(m.Unlinkat(client.walk("new"), b"hard", 0), m.Runlinkat))
    tell(lambda: client.ask(m.Unlinkat(0, b"none", 0x200), m.Runlinkat))
    for name in ("new/moved", "new", "dir/f"):
        tell(lambda name=name: client.setattr(name, 0x1 | 0x20 | 0x100, mode=0o4751, **times))
    tell(lambda: client.setattr("dir/f", p.AttrValid.UID, uid=5))
    tell(lambda: client.ask(m.Readlink(client.walk("out")), m.Rreadlink).target)
    tell(lambda: client.walk("secret", client.walk("out")))
    tell(lambda: client.ask(m.Statfs(0), m.Rstatfs).kind)
    for name in ("new/moved", "new", "dir/f", "sym", "fifo"):
        tell(lambda name=name: about(name)[:5])
    for place in ("", "new", "dir"):
        tell(lambda place=place: sorted((n, k) for n, (k, _) in client.list(place).items()))
    for path, folders, names in os.walk(shared):
        told.append((os.path.relpath(path, shared), sorted(folders), sorted(names)))
    return told


def test_the_same_story_everywhere(wardens: Callable[[str], Warden], tmp_path: Path) -> None:
    stories = {}
    for name in ("in-process", *PLANS):
        (tmp_path / name).mkdir()
        shared = make_shared(tmp_path / name)
        if name == "in-process":
            # Its files are root's there if root runs this.
            for path in (shared, *shared.iterdir()):
                os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
            client = Client(local_rig(shared))
            stories[name] = story(client, shared)
            close_rigs()
        else:
            with jailed(wardens(name), shared) as client:
                stories[name] = story(client, shared)
    assert "EPERM" in stories["full"]
    for name in PLANS:
        assert stories[name] == stories["in-process"], name


@pytest.mark.parametrize("name", PLANS)
def test_the_root_is_the_directory(
    wardens: Callable[[str], Warden], shared: Path, name: str
) -> None:
    with jailed(wardens(name), shared) as client:
        report = msgspec.convert(client.rig.device.jail_report, JailReport)  # type: ignore[attr-defined]
        found = {layer.name: layer.detail for layer in report.layers}
        if name != "landlock alone":
            assert found["root"] == "the shared directory, read and write"
        if name != "root alone":
            assert "files but the shared directory's" in found["landlock"]
        if os.geteuid() == 0:
            assert found["uid"] == f"user {ORDINARY_UID}, group {ORDINARY_UID}"
        assert client.stat("").qid.path == shared.stat().st_ino
    assert not [each for each in os.listdir(shared) if "probe" in each]


@pytest.mark.parametrize("name", PLANS)
def test_what_cannot_be_opened(wardens: Callable[[str], Warden], shared: Path, name: str) -> None:
    """A file of mode 0 gets another mode, and a link times, where the directory is the root."""
    with jailed(wardens(name), shared) as client:
        with pytest.raises(P9Error) as error:
            client.open("locked")
        assert error.value.errno == errno.EACCES
        set_time = p.AttrValid.MTIME | p.AttrValid.MTIME_SET
        if name == "landlock alone":
            for path in ("locked", "out"):
                with pytest.raises(P9Error):
                    client.setattr(path, set_time, mtime=5)
            return
        client.setattr("out", set_time, mtime=5)
        assert (shared / "out").lstat().st_mtime == 5
        assert (shared.parent / "secret").stat().st_mtime > 5
        client.setattr("locked", p.AttrValid.MODE, mode=0o600)
        assert client.read(client.open("locked")) == b"x"
        with pytest.raises(P9Error):
            client.setattr("out", p.AttrValid.MODE, mode=0o777)


@pytest.mark.parametrize("name", PLANS)
def test_a_restore_in_a_new_process(
    wardens: Callable[[str], Warden], shared: Path, name: str
) -> None:
    with jailed(wardens(name), shared) as client:
        fid = client.open("file", p.OpenFlag.RDWR)
        client.rig.replace(client.rig.snapshot())
        assert client.write(fid, b"CON") == 3
        assert client.rig.logs == []
    assert (shared / "file").read_bytes() == b"CONtents"


def test_an_fsync_beside_the_guest(wardens: Callable[[str], Warden], shared: Path) -> None:
    with jailed(wardens("full"), shared) as client:
        fid = client.open("file", p.OpenFlag.RDWR)
        for data_only in (0, 1):
            client.write(fid, b"x")
            client.ask(m.Fsync(fid, data_only), m.Rfsync)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is made another user")
def test_a_directory_of_root_is_nobodys(wardens: Callable[[str], Warden], tmp_path: Path) -> None:
    """Its device may do there what others may."""
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("for all")
    (tmp_path / "own").write_text("for root")
    (tmp_path / "own").chmod(0o600)
    with jailed(wardens("full"), tmp_path) as client:
        assert client.read(client.open("file")) == b"for all"
        assert client.stat("file").uid == 65534
        for call in (lambda: client.open("own"), lambda: client.create("new")):
            with pytest.raises(P9Error) as error:
                call()
            assert error.value.errno == errno.EACCES
    tmp_path.chmod(0o700)
    with pytest.raises(DeviceError, match=r"jail layer root: .*Permission denied"):
        ProxiedRig(wardens("full"), tmp_path)


# The device taken over.


def _openat2(fd: int, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> int:
    how = struct.pack("=QQQ", flags, mode, 0)
    return linux.syscall("openat2", 437, fd, path.encode(), how, 24)


def _read(host: DeviceHost, path: str, fd: int | None = None) -> str:
    opened = _openat2(host.fds["path"] if fd is None else fd, path)
    return os.read(opened, 100).decode()


def _names(fd: int) -> str:
    buffer = ctypes.create_string_buffer(4096)
    count = linux.syscall("getdents64", 217 if linux.IS_X86_64 else 61, fd, buffer, 4096)
    return buffer.raw[:count].decode(errors="replace")


def _above(host: DeviceHost) -> str:
    fd = host.fds["path"]
    for _ in range(40):
        fd = _openat2(fd, "..", os.O_RDONLY | os.O_DIRECTORY)
    return _names(fd)


def _moved(host: DeviceHost) -> str:
    """It keeps a directory open that the host then moves out of the shared one."""
    fd = _openat2(host.fds["path"], "dir", os.O_RDONLY | os.O_DIRECTORY)
    host.log("open")
    while "moved" not in _names_of_root(host):
        pass
    return _read(host, "../secret", fd)


def _names_of_root(host: DeviceHost) -> str:
    fd = _openat2(host.fds["path"], ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _names(fd)
    finally:
        os.close(fd)


def _swap(host: DeviceHost) -> str:
    """A component that is a directory at one moment and a link to above at the next."""
    root = host.fds["path"]
    os.mkdir("real", dir_fd=root)
    os.symlink("../..", "trap", dir_fd=root)
    for _ in range(300):
        for path in ("real/../../secret", "trap/secret", "trap/../secret"):
            try:
                return _read(host, path)
            except OSError:
                pass
        os.rename("real", "t", src_dir_fd=root, dst_dir_fd=root)
        os.rename("trap", "real", src_dir_fd=root, dst_dir_fd=root)
        os.rename("t", "trap", src_dir_fd=root, dst_dir_fd=root)
    raise OSError(errno.ENOENT, "not once")


def _create(host: DeviceHost) -> str:
    os.close(_openat2(host.fds["path"], "made", os.O_CREAT | os.O_WRONLY, 0o600))
    return "made a file"


def _outside(host: DeviceHost) -> str:
    os.close(_openat2(-100, f"{Shared.beside}/made", os.O_CREAT | os.O_WRONLY, 0o666))
    return "made a file outside"


def _truncate(host: DeviceHost) -> str:
    os.close(_openat2(host.fds["path"], "file", os.O_TRUNC | os.O_WRONLY))
    return "truncated a file"


def _chmod(host: DeviceHost) -> str:
    os.fchmod(_openat2(host.fds["path"], "file"), 0o4755)
    return "made it set-user-ID"


def _links_out(host: DeviceHost) -> str:
    os.link(f"{Shared.beside}/secret", "mine", dst_dir_fd=host.fds["path"], follow_symlinks=False)
    return _read(host, "mine")


def _renames_in(host: DeviceHost) -> str:
    os.rename(f"{Shared.beside}/secret", "mine", dst_dir_fd=host.fds["path"])
    return _read(host, "mine")


def _node(host: DeviceHost) -> str:
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=host.fds["path"])
    return "made a device node"


def _whiteout(host: DeviceHost) -> str:
    os.mknod("null", stat.S_IFBLK | 0o666, 0, dir_fd=host.fds["path"])
    return "made a device node"


def _chown(host: DeviceHost) -> str:
    os.chown("file", 0, 0, dir_fd=host.fds["path"])
    return "gave it to root"


def _xattr(host: DeviceHost) -> str:
    os.setxattr(host.fds["path"], "user.x", b"x")
    return "set an attribute"


READS: dict[str, Callable[[DeviceHost], str]] = {
    "absolute": lambda host: _read(host, f"{Shared.beside}/secret"),
    "passwd": lambda host: _read(host, "/etc/passwd"),
    "dots": lambda host: _read(host, "../secret"),
    "many dots": lambda host: _read(host, "../" * 40 + Shared.beside[1:] + "/secret"),
    "from cwd": lambda host: _read(host, "../secret", -100),
    "link": lambda host: _read(host, "out"),
    "absolute link": lambda host: _read(host, "abs"),
    "proc": lambda host: _read(host, "/proc/1/environ"),
    "swap": _swap,
}
CHANGES = {"create": _create, "truncate": _truncate, "chmod": _chmod}
CAUGHT: dict[str, tuple[Callable[[DeviceHost], str], str]] = {
    "device node": (_node, "mknodat"),
    "whiteout": (_whiteout, "mknodat"),
    "chown": (_chown, "fchownat"),
    "xattr": (_xattr, "fsetxattr"),
}
OTHERS = {
    "above": _above,
    "moved": _moved,
    "outside": _outside,
    "links out": _links_out,
    "renames in": _renames_in,
}
OWN: tuple[Own, ...] = (
    *READS.values(),
    *CHANGES.values(),
    *(c for c, _ in CAUGHT.values()),
    *OTHERS.values(),
)


class Shared(TakenOver):
    Options = P9Options
    beside: ClassVar[str] = ""
    own = OWN

    def __init__(self, host: DeviceHost) -> None:
        super().__init__(host, P9Options("shared", readonly=os.environ["TEST_READONLY"] == "1"))


class Bench:
    """A directory, and devices that have it and were taken over."""

    def __init__(self, directory: Path, plan: str, readonly: bool) -> None:
        self.plan = plan
        directory.chmod(0o777)
        self.shared = make_shared(directory)
        Shared.beside = str(directory)
        os.environ["TEST_READONLY"] = "1" if readonly else "0"
        self.fd = os.open(self.shared, os.O_RDONLY | os.O_DIRECTORY)
        self._devices = Takeover(Shared, "9p", plan_jail(JailMode.AUTO, without=PLANS[plan]))

    def attempt(self, what: Attempt | Own, meanwhile: Callable[[], None] | None = None) -> Verdict:
        events = Recorder()
        if meanwhile is not None:
            log = events.log
            events.log = lambda name, text: (log(name, text), meanwhile())  # type: ignore
        return self._devices.attempt(what, {"path": self.fd}, events=events)

    def close(self) -> None:
        self._devices.close()
        os.close(self.fd)


@pytest.fixture(scope="module", params=PLANS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Bench]:
    with bait() as Shared.targets:
        made = Bench(tmp_path_factory.mktemp("escape"), request.param, False)
        yield made
        made.close()


@pytest.fixture(scope="module", params=PLANS)
def readonly_bench(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Bench]:
    with bait() as Shared.targets:
        made = Bench(tmp_path_factory.mktemp("escape"), request.param, True)
        yield made
        made.close()


@pytest.mark.parametrize("tried", ATTEMPTS, ids=lambda each: each.name)
def test_no_way_out_is_open(bench: Bench, tried: Attempt) -> None:
    assert_stopped(tried, bench.attempt(tried))


def test_its_directory_is_its_own(bench: Bench) -> None:
    """What is tried below would work, if only it were in the directory."""
    for change in (_create, _truncate):
        got, said, failure = bench.attempt(change)
        assert got, (said, failure)
    (bench.shared / "file").write_bytes(b"contents")
    (bench.shared / "made").unlink()


@pytest.mark.parametrize("name", READS)
def test_nothing_outside_can_be_read(bench: Bench, name: str) -> None:
    got, said, failure = bench.attempt(READS[name])
    assert not got, said
    assert not failure
    assert "secret" not in said


@pytest.mark.parametrize("change", [_outside, _links_out, _renames_in])
def test_nothing_outside_can_be_changed(bench: Bench, change: Any) -> None:
    got, said, failure = bench.attempt(change)
    assert not got, said
    assert not failure
    outside = bench.shared.parent
    assert sorted(os.listdir(outside)) == ["secret", "shared"]
    assert (outside / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", CAUGHT)
def test_what_no_9p_needs_is_caught(bench: Bench, name: str) -> None:
    function, call = CAUGHT[name]
    assert_caught(bench.attempt(function), call)


def test_above_its_directory_is_its_directory_or_nothing(bench: Bench) -> None:
    got, said, failure = bench.attempt(_above)
    assert not failure
    if bench.plan == "landlock alone":
        assert not got, said
    else:
        assert "locked" in said
        assert "secret" not in said


def test_a_directory_that_is_moved_out_leads_nowhere(bench: Bench) -> None:
    """The host moves a directory that the device has open: from there is no way up."""

    def move() -> None:
        if (bench.shared / "dir").exists():
            (bench.shared / "dir").rename(bench.shared.parent / "dir")
            (bench.shared / "moved").touch()

    got, said, failure = bench.attempt(_moved, move)
    assert not got, said
    assert not failure
    (bench.shared.parent / "dir").rename(bench.shared / "dir")
    (bench.shared / "moved").unlink()


@pytest.mark.parametrize("name", CHANGES)
def test_read_only_is_read_only(readonly_bench: Bench, name: str) -> None:
    before = sorted(os.listdir(readonly_bench.shared))
    got, said, failure = readonly_bench.attempt(CHANGES[name])
    assert not got, said
    if name == "chmod":
        assert "forbidden system call 'fchmod'" in failure
    else:
        assert not failure
    assert sorted(os.listdir(readonly_bench.shared)) == before
    assert (readonly_bench.shared / "file").read_bytes() == b"contents"
