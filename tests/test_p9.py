"""The 9P device over the tests' own client: what each request does, and what is refused."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from p9_client import Client, P9Error, close_rigs, local_rig
from virtio_driver import F_INDIRECT, F_PACKED, NEEDS_RESET

from devices.errors import DeviceError, UserError
from devices.registry import parse_options
from devices.virtio.p9 import messages as m
from devices.virtio.p9 import protocol as p
from devices.virtio.p9.codec import Message
from devices.virtio.p9.device import MSIZE, P9

S = p.AttrValid


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The directory, with something beside it that nobody may see."""
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "shared"
    path.mkdir()
    (path / "file").write_bytes(b"contents")
    (path / "dir").mkdir()
    (path / "dir" / "inner").write_bytes(b"inner")
    (path / "out").symlink_to("../secret")
    (path / "up").symlink_to("..")
    (path / "abs").symlink_to("/etc")
    return path


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    close_rigs()


@pytest.fixture
def client(shared: Path) -> Client:
    return Client(local_rig(shared))


def fails(code: int, call: Callable[[], Any]) -> None:
    with pytest.raises(P9Error) as error:
        call()
    assert error.value.errno == code, error.value


# What it is.


@pytest.mark.parametrize("features", [0, F_INDIRECT, F_PACKED, F_PACKED | F_INDIRECT])
def test_configuration_and_version(shared: Path, features: int) -> None:
    client = Client(local_rig(shared, tag="a tag"), features=features)
    length = client.driver.config(0, 2)
    assert bytes(client.driver.config(2 + n, 1) for n in range(length)) == b"a tag"
    assert client.read(client.open("file")) == b"contents"
    large = client.ask(m.Version(1 << 30, b"9P2000.L"), m.Rversion)
    assert large.msize == MSIZE
    fails(errno.EBADF, lambda: client.stat("file"))  # fids are gone
    other = client.ask(m.Version(8192, b"9P2000.u"), m.Rversion)
    assert (other.msize, other.version) == (8192, b"unknown")
    fails(errno.EMSGSIZE, lambda: client.ask(m.Version(100, b"9P2000.L"), m.Rversion))


@pytest.mark.parametrize("options", [{}, {"path": "x", "tag": ""}, {"path": "x", "tag": "t" * 63}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="device '9p'"):
        parse_options(P9, options)


# Walking.


def test_walk(client: Client, shared: Path) -> None:
    qids = client.ask(m.Walk(0, 1, (b"dir", b"inner")), m.Rwalk).qids
    assert [(q.kind, q.path) for q in qids] == [
        (p.QidKind.DIRECTORY, (shared / "dir").stat().st_ino),
        (0, (shared / "dir" / "inner").stat().st_ino),
    ]
    assert client.read(client.open("dir/inner")) == b"inner"
    # Part of the way: as many qids, and no fid.
    assert len(client.ask(m.Walk(0, 5, (b"dir", b"none", b"x")), m.Rwalk).qids) == 1
    fails(errno.EBADF, lambda: client.clunk(5))
    fails(errno.ENOENT, lambda: client.walk("none"))
    fails(errno.ENOTDIR, lambda: client.walk("x", client.walk("file")))
    fails(errno.EBADF, lambda: client.ask(m.Walk(0, 1, ()), m.Rwalk))  # in use
    fails(errno.EBADF, lambda: client.ask(m.Walk(77, 78, ()), m.Rwalk))
    fails(errno.EINVAL, lambda: client.ask(m.Walk(0, 9, (b"dir",) * 17), m.Rwalk))
    # In place.
    fid = client.walk("dir")
    client.ask(m.Walk(fid, fid, (b"inner",)), m.Rwalk)
    client.ask(m.Lopen(fid, 0), m.Rlopen)
    assert client.read(fid) == b"inner"


@pytest.mark.parametrize("path", ["..", "../..", "dir/../..", "dir/../../..", "../dir/.."])
def test_above_the_top_is_the_top(client: Client, shared: Path, path: str) -> None:
    assert client.stat(path).qid.path == shared.stat().st_ino
    fails(errno.ENOENT, lambda: client.walk(path + "/secret"))


@pytest.mark.parametrize("name", [b"", b".", b"/", b"/etc", b"dir/inner", b"a\0b", b"../secret"])
def test_no_name_is_a_path(client: Client, name: bytes) -> None:
    for request, kind in (
        (m.Walk(0, 9, (name,)), m.Rwalk),
        (m.Mkdir(0, name, 0o755, 0), m.Rmkdir),
        (m.Symlink(0, name, b"x", 0), m.Rsymlink),
        (m.Mknod(0, name, stat.S_IFREG, 0, 0, 0), m.Rmknod),
        (m.Unlinkat(0, name, 0), m.Runlinkat),
        (m.Renameat(0, name, 0, b"new"), m.Rrenameat),
        (m.Renameat(0, b"file", 0, name), m.Rrenameat),
        (m.Link(0, client.walk("file"), name), m.Rlink),
        (m.Lcreate(client.walk(), name, 2, 0o644, 0), m.Rlcreate),
    ):
        fails(errno.EINVAL, lambda request=request, kind=kind: client.ask(request, kind))


@pytest.mark.parametrize("link", ["out", "up", "abs"])
def test_links_are_the_clients_to_follow(client: Client, shared: Path, link: str) -> None:
    fid = client.walk(link)
    about = client.stat(link)
    assert stat.S_ISLNK(about.mode)
    assert about.qid.kind == p.QidKind.SYMLINK
    target = client.ask(m.Readlink(fid), m.Rreadlink).target
    assert target == os.fsencode(os.readlink(shared / link))
    fails(errno.EINVAL, lambda: client.ask(m.Lopen(fid, 0), m.Rlopen))
    fails(errno.ELOOP, lambda: client.walk("passwd", fid))
    # Nor is it followed when it is made, opened or changed by name.
    fails(errno.ELOOP, lambda: client.create(link))
    with pytest.raises(P9Error):
        client.setattr(fid, S.MODE, mode=0o600)
    with pytest.raises(P9Error):
        client.setattr(fid, S.SIZE, size=0)
    with pytest.raises(P9Error):
        client.ask(m.Mkdir(fid, b"made", 0o755, 0), m.Rmkdir)
    assert (shared.parent / "secret").read_text() == "secret"


def test_a_directory_that_becomes_a_link_meanwhile(client: Client, shared: Path) -> None:
    """The host, or another guest with the same directory, swaps it between two requests."""
    fid, inner = client.walk("dir"), client.walk("dir/inner")
    (shared / "dir").rename(shared / "moved")
    (shared / "dir").symlink_to("..")
    for call in (
        lambda: client.walk("secret", fid),
        lambda: client.ask(m.Lopen(inner, 0), m.Rlopen),
        lambda: client.ask(m.Lcreate(fid, b"made", 2, 0o644, 0), m.Rlcreate),
        lambda: client.ask(m.Unlinkat(fid, b"secret", 0), m.Runlinkat),
        lambda: client.ask(m.Renameat(fid, b"secret", 0, b"mine"), m.Rrenameat),
        lambda: client.ask(m.Link(0, inner, b"mine"), m.Rlink),
        lambda: client.setattr(inner, S.MODE, mode=0o777),
        lambda: client.ask(m.Getattr(inner, 0), m.Rgetattr),
    ):
        with pytest.raises(P9Error) as error:
            call()
        assert error.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert sorted(os.listdir(shared.parent)) == ["secret", "shared"]


# Files.


def test_read_and_write(client: Client, shared: Path) -> None:
    fid = client.open("file", p.OpenFlag.RDWR)
    assert client.read(fid, 3, 2) == b"te"
    assert client.read(fid, 8) == b""
    assert client.read(fid, 0, 0) == b""
    assert client.write(fid, b"CON") == 3
    assert client.write(fid, b"", 3) == 0
    assert client.write(fid, b"end", 1 << 20) == 3
    assert (shared / "file").read_bytes()[:8] == b"CONtents"
    assert client.read(fid, (1 << 20) - 1, 10) == b"\0end"
    most = client.msize - 11
    assert len(client.read(fid, 0, 1 << 31)) == most
    fails(errno.EINVAL, lambda: client.read(fid, (1 << 63) - 1))
    fails(errno.EINVAL, lambda: client.write(fid, b"x", (1 << 64) - 1))
    fails(errno.EBADF, lambda: client.read(client.walk("file")))
    fails(errno.EBADF, lambda: client.write(client.open("file"), b"x"))
    fails(errno.EISDIR, lambda: client.read(client.open("dir")))
    fails(errno.EISDIR, lambda: client.open("dir", p.OpenFlag.RDWR))
    fails(errno.EBADF, lambda: client.ask(m.Lopen(fid, 0), m.Rlopen))
    fails(errno.EINVAL, lambda: client.open("file", 3))
    fails(errno.ENOTDIR, lambda: client.open("file", p.OpenFlag.DIRECTORY))


def test_open_flags(client: Client, shared: Path) -> None:
    fid = client.open("file", p.OpenFlag.WRONLY | p.OpenFlag.TRUNC | p.OpenFlag.SYNC)
    assert (shared / "file").read_bytes() == b""
    client.write(fid, b"one")
    client.write(client.open("file", p.OpenFlag.WRONLY | p.OpenFlag.APPEND), b"two")
    assert (shared / "file").read_bytes() == b"onetwo"
    client.create("file")  # without EXCL it is there already
    fails(errno.EEXIST, lambda: client.create("file", flags=p.OpenFlag.RDWR | p.OpenFlag.EXCL))
    # O_CREAT, O_DIRECT, O_NOFOLLOW, ...: not for a server.
    assert client.read(client.open("file", 0o160100)) == b"onetwo"


def test_a_created_file_is_open(client: Client, shared: Path) -> None:
    fid = client.create("dir/made", 0o640)
    client.write(fid, b"made")
    assert (shared / "dir" / "made").read_bytes() == b"made"
    assert client.read(fid) == b"made"
    fails(errno.EBADF, lambda: client.ask(m.Lcreate(fid, b"x", 2, 0o644, 0), m.Rlcreate))
    client.clunk(fid)
    fails(errno.EBADF, lambda: client.clunk(fid))


def test_set_user_id_is_never_set(client: Client, shared: Path) -> None:
    old = os.umask(0)
    try:
        client.create("program", 0o6755)
        client.ask(m.Mkdir(0, b"made", 0o7777, 0), m.Rmkdir)
        client.setattr("file", S.MODE, mode=0o7711)
        client.ask(m.Mknod(0, b"fifo", stat.S_IFIFO | 0o6600, 0, 0, 0), m.Rmknod)
    finally:
        os.umask(old)
    modes = {name: (shared / name).lstat().st_mode for name in ("program", "made", "file", "fifo")}
    assert modes == {
        "program": stat.S_IFREG | 0o755,
        "made": stat.S_IFDIR | 0o1777,
        "file": stat.S_IFREG | 0o1711,
        "fifo": stat.S_IFIFO | 0o600,
    }


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, stat.S_IFLNK, 0o30000])
def test_no_device_nodes(client: Client, shared: Path, kind: int) -> None:
    fails(errno.EPERM, lambda: client.ask(m.Mknod(0, b"n", kind | 0o666, 0, 0, 0), m.Rmknod))
    assert not (shared / "n").exists()


def test_special_files_are_not_opened(client: Client, shared: Path) -> None:
    for name, kind in ((b"fifo", stat.S_IFIFO), (b"socket", stat.S_IFSOCK)):
        client.ask(m.Mknod(0, name, kind | 0o644, 0, 0, 0), m.Rmknod)
        assert client.kind(name.decode()) == kind
        for flags in (0, 1, 2):
            fails(errno.EINVAL, lambda name=name, flags=flags: client.open(name, flags))
        with pytest.raises(P9Error):
            client.create(name.decode())
    client.ask(m.Mknod(0, b"plain", 0o644, 0, 0, 0), m.Rmknod)
    assert client.kind("plain") == stat.S_IFREG


def test_names(client: Client, shared: Path) -> None:
    client.ask(m.Mkdir(0, b"new", 0o755, 0), m.Rmkdir)
    client.ask(m.Symlink(client.walk("new"), b"link", b"any/thing", 0), m.Rsymlink)
    assert os.readlink(shared / "new" / "link") == "any/thing"
    client.ask(m.Link(client.walk("new"), client.walk("file"), b"second"), m.Rlink)
    assert client.stat("file").links == 2
    # A link to a link is one to itself, not to what it points at.
    client.ask(m.Link(0, client.walk("new/link"), b"hard"), m.Rlink)
    assert (shared / "hard").is_symlink()
    fails(errno.ENOTEMPTY, lambda: client.ask(m.Unlinkat(0, b"new", 0x200), m.Runlinkat))
    fails(errno.EISDIR, lambda: client.ask(m.Unlinkat(0, b"new", 0), m.Runlinkat))
    fails(errno.ENOTDIR, lambda: client.ask(m.Unlinkat(0, b"file", 0x200), m.Runlinkat))
    for name in (b"link", b"second"):
        client.ask(m.Unlinkat(client.walk("new"), name, 0), m.Runlinkat)
    client.ask(m.Unlinkat(0, b"new", 0x200), m.Runlinkat)
    fid = client.walk("hard")
    client.ask(m.Remove(fid), m.Rremove)
    assert not os.path.lexists(shared / "hard")
    fails(errno.EBADF, lambda: client.clunk(fid))
    fid = client.walk("dir")
    fails(errno.ENOTEMPTY, lambda: client.ask(m.Remove(fid), m.Rremove))
    fails(errno.EBADF, lambda: client.clunk(fid))  # gone all the same
    fails(errno.EBUSY, lambda: client.ask(m.Remove(client.walk()), m.Rremove))
    fails(errno.EBUSY, lambda: client.ask(m.Rename(client.walk(), 0, b"x"), m.Rrename))
    assert client.stat("").qid.path == shared.stat().st_ino


def test_fids_follow_what_the_client_renames(client: Client, shared: Path) -> None:
    folder, inner = client.walk("dir"), client.walk("dir/inner")
    beside = client.walk("file")
    client.ask(m.Renameat(0, b"dir", 0, b"moved"), m.Rrenameat)
    assert client.read(client.ask(m.Lopen(inner, 0), m.Rlopen) and inner) == b"inner"
    client.walk("inner", folder)
    client.ask(m.Rename(beside, folder, b"file2"), m.Rrename)
    client.ask(m.Getattr(beside, 0), m.Rgetattr)
    assert sorted(os.listdir(shared / "moved")) == ["file2", "inner"]
    # Into itself, over something.
    fails(errno.EINVAL, lambda: client.ask(m.Rename(folder, folder, b"x"), m.Rrename))
    client.ask(m.Renameat(folder, b"file2", folder, b"inner"), m.Rrenameat)
    assert client.read(client.open("moved/inner")) == b"contents"


def test_an_open_file_outlives_its_name(client: Client, shared: Path) -> None:
    fid = client.open("file", p.OpenFlag.RDWR)
    client.ask(m.Unlinkat(0, b"file", 0), m.Runlinkat)
    client.write(fid, b"still", 0)
    assert client.read(fid) == b"stillnts"
    assert client.ask(m.Getattr(fid, 0), m.Rgetattr).links == 0
    client.setattr(fid, S.SIZE, size=2)
    assert client.read(fid) == b"st"
    client.setattr(fid, S.MTIME | S.MTIME_SET, mtime=5)
    assert client.ask(m.Getattr(fid, 0), m.Rgetattr).mtime == 5


# Attributes.


def test_getattr(client: Client, shared: Path) -> None:
    about = (shared / "file").stat()
    found = client.stat("file")
    assert (found.mode, found.links, found.size) == (about.st_mode, about.st_nlink, 8)
    assert (found.blocks, found.block_size) == (about.st_blocks, about.st_blksize)
    assert found.mtime * 10**9 + found.mtime_ns == about.st_mtime_ns
    assert found.ctime * 10**9 + found.ctime_ns == about.st_ctime_ns
    assert found.qid.path == about.st_ino
    assert found.qid.version != 0
    assert (found.uid, found.gid) == (0, 0)  # the device's own user is root there
    if os.geteuid() == 0:
        os.chown(shared / "file", 7, 8)
        found = client.stat("file")
        assert (found.uid, found.gid) == (65534, 65534)
    (shared / "file").write_bytes(b"other")
    assert client.stat("file").qid.version != found.qid.version


def test_setattr(client: Client, shared: Path) -> None:
    file = shared / "file"
    client.setattr("file", S.MODE, mode=0o600)
    assert file.stat().st_mode == stat.S_IFREG | 0o600
    client.setattr("file", S.SIZE, size=3)
    assert file.read_bytes() == b"con"
    client.setattr("file", S.ATIME | S.ATIME_SET, atime=5, atime_ns=7)
    client.setattr("file", S.MTIME | S.MTIME_SET, mtime=(1 << 64) - 3, mtime_ns=9)
    about = file.stat()
    assert (about.st_atime_ns, about.st_mtime_ns) == (5 * 10**9 + 7, -3 * 10**9 + 9)
    client.setattr("file", S.MTIME)
    assert file.stat().st_mtime > 10**9
    assert file.stat().st_atime_ns == 5 * 10**9 + 7
    client.setattr("file", S.UID | S.GID, uid=0, gid=0)
    client.setattr("dir", S.MODE | S.MTIME | S.MTIME_SET, mode=0o700, mtime=8)
    assert (shared / "dir").stat().st_mtime == 8
    for valid, fields, code in (
        (S.UID, {"uid": 1}, errno.EPERM),
        (S.GID, {"gid": 1}, errno.EPERM),
        (S.SIZE, {"size": 1 << 63}, errno.EINVAL),
        (S.MTIME | S.MTIME_SET, {"mtime_ns": 10**9}, errno.EINVAL),
    ):
        fails(code, lambda v=valid, f=fields: client.setattr("file", v, **f))
    fails(errno.EINVAL, lambda: client.setattr("dir", S.SIZE, size=0))


def test_statfs(client: Client, shared: Path) -> None:
    about = os.statvfs(shared)
    for fid in (0, client.open("file")):
        found = client.ask(m.Statfs(fid), m.Rstatfs)
        assert (found.block_size, found.blocks) == (about.f_frsize, about.f_blocks)
        assert (found.kind, found.longest_name) == (0x01021997, about.f_namemax)


# Directories.


@pytest.mark.parametrize("count", [64, 300, 4096, 1 << 31])
def test_readdir(client: Client, shared: Path, count: int) -> None:
    names = {f"{'x' * (n % 30)}{n}" for n in range(300)}
    for name in names:
        (shared / "dir" / name).touch()
    found = client.list("dir", count)
    assert {os.fsdecode(name) for name in found} == {*names, "inner", ".", ".."}
    top = client.list("", 4096)
    assert top[b".."][1] == top[b"."][1] == shared.stat().st_ino
    assert top[b"out"] == (10, (shared / "out").lstat().st_ino)
    assert (top[b"dir"][0], top[b"file"][0]) == (4, 8)


def test_readdir_errors(client: Client) -> None:
    fid = client.open("dir")
    fails(errno.EINVAL, lambda: client.ask(m.Readdir(fid, 0, 10), m.Rreaddir))
    fails(errno.EINVAL, lambda: client.ask(m.Readdir(fid, 1 << 63, 4096), m.Rreaddir))
    fails(errno.EBADF, lambda: client.ask(m.Readdir(client.walk("dir"), 0, 4096), m.Rreaddir))
    fails(errno.ENOTDIR, lambda: client.ask(m.Readdir(client.open("file"), 0, 4096), m.Rreaddir))


def test_any_bytes_make_a_name(client: Client, shared: Path) -> None:
    name = bytes(range(1, 256)).replace(b"/", b"")
    fid = client.walk()
    client.ask(m.Lcreate(fid, name, 2, 0o644, 0), m.Rlcreate)
    assert name in client.list()
    assert name in os.listdir(os.fsencode(shared))
    client.rig.replace(client.rig.snapshot())
    assert client.write(fid, b"kept") == 4


# The rest.


def test_fsync_and_flush(client: Client) -> None:
    fid = client.open("file", p.OpenFlag.RDWR)
    sync, tag = client.send(m.Fsync(fid, 0))
    flush, flush_tag = client.send(m.Flush(tag))
    read, read_tag = client.send(m.Read(fid, 0, 10))
    client.ask(m.Clunk(fid), m.Rclunk)  # it does not take the file from under the fsync
    assert client.answer(read, read_tag, m.Rread).data == b"contents"
    client.answer(sync, tag, m.Rfsync)
    client.answer(flush, flush_tag, m.Rflush)
    client.ask(m.Flush(1234), m.Rflush)
    client.ask(m.Fsync(client.open("dir"), 1), m.Rfsync)
    fails(errno.EBADF, lambda: client.ask(m.Fsync(0, 0), m.Rfsync))


def test_an_fsync_that_fails(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", fail)
    fid = client.open("file", p.OpenFlag.RDWR)
    fails(errno.EIO, lambda: client.ask(m.Fsync(fid, 0), m.Rfsync))
    client.ask(m.Fsync(fid, 1), m.Rfsync)


def test_locks_are_granted(client: Client) -> None:
    fid = client.open("file")
    lock = m.Lock(fid, 1, 1, 0, 0, 5, b"client")
    assert client.ask(lock, m.Rlock).status == p.LOCK_SUCCESS
    found = client.ask(m.Getlock(fid, 1, 0, 0, 5, b"client"), m.Rgetlock)
    assert (found.kind, found.client) == (p.UNLOCKED, b"client")
    fails(errno.EBADF, lambda: client.ask(m.Lock(0, 1, 1, 0, 0, 5, b""), m.Rlock))


def test_what_there_is_not(client: Client) -> None:
    for request in (m.Xattrwalk(0, 9, b"user.x"), m.Xattrcreate(0, b"user.x", 1, 0)):
        fails(errno.EOPNOTSUPP, lambda r=request: client.ask(r, m.Rclunk))
    for number in (0, 6, 7, 42, 102, 112, 119, 255):
        request = client.raw(struct.pack("<IBH", 7, number, 9))
        assert request.written(client.driver.ram)[4:7] == b"\x07\x09\x00", number


CHANGES: list[tuple[Message, type[Message]]] = [
    (m.Mkdir(0, b"n", 0o755, 0), m.Rmkdir),
    (m.Symlink(0, b"n", b"x", 0), m.Rsymlink),
    (m.Mknod(0, b"n", stat.S_IFIFO, 0, 0, 0), m.Rmknod),
    (m.Link(0, 1, b"n"), m.Rlink),
    (m.Unlinkat(0, b"file", 0), m.Runlinkat),
    (m.Renameat(0, b"file", 0, b"n"), m.Rrenameat),
    (m.Rename(1, 0, b"n"), m.Rrename),
    (m.Setattr(1, int(S.MODE), 0o600, 0, 0, 0, 0, 0, 0, 0), m.Rsetattr),
    (m.Lopen(1, 1), m.Rlopen),
    (m.Lopen(1, 2), m.Rlopen),
    (m.Lopen(1, int(p.OpenFlag.TRUNC)), m.Rlopen),
    (m.Lcreate(0, b"n", 0, 0o644, 0), m.Rlcreate),
    (m.Remove(1), m.Rremove),
]


@pytest.mark.parametrize(("request_", "kind"), CHANGES, ids=lambda each: str(each)[:14])
def test_readonly(shared: Path, request_: Message, kind: type[Message]) -> None:
    client = Client(local_rig(shared, readonly=True))
    client.ask(m.Walk(0, 1, (b"file",)), m.Rwalk)
    before = sorted(os.listdir(shared)), (shared / "file").lstat()
    fails(errno.EROFS, lambda: client.ask(request_, kind))
    assert (sorted(os.listdir(shared)), (shared / "file").lstat()) == before
    assert client.read(client.open("file")) == b"contents"
    assert client.list()[b"dir"]


# Bad clients.


@pytest.mark.parametrize(
    ("data", "room"),
    [(b"", 64), (b"\x07\0\0\0\x65", 64), (struct.pack("<IBH", 7, 120, 1), 10)],
    ids=["no request", "no header", "no room"],
)
def test_no_request_at_all(client: Client, data: bytes, room: int) -> None:
    queue = client.driver.queues[0]
    queue.send([data] if data else [], [room])
    client.rig.settle()
    assert client.driver.status & NEEDS_RESET
    assert "9P request" in client.rig.logs[0]


@pytest.mark.parametrize(
    "size", [0, 6, 7, 10, 12, 13, 1 << 31, 0xFFFF_FFFF], ids=lambda n: f"size {n}"
)
def test_sizes_that_lie(client: Client, size: int) -> None:
    request = client.raw(struct.pack("<IBHI", size, m.Clunk.number, 5, 0))
    answer = request.written(client.driver.ram)
    assert answer == struct.pack("<IBHI", 11, 7, 5, errno.EBADMSG)
    client.stat("file")  # fid 0 is still there


def test_writes_whose_counts_lie(client: Client, shared: Path) -> None:
    fid = client.open("file", p.OpenFlag.RDWR)
    for count in (0, 2, 4, 0xFFFF_FFFF):
        body = struct.pack("<IQI", fid, 0, count) + b"new"
        request = client.raw(struct.pack("<IBH", 7 + len(body), 118, 5) + body)
        assert request.written(client.driver.ram)[4] == m.Rlerror.number
    assert (shared / "file").read_bytes() == b"contents"


def test_an_answer_that_does_not_fit(client: Client, shared: Path) -> None:
    client.mount(4096)
    (shared / "long").symlink_to("x" * 4095)
    fails(errno.EMSGSIZE, lambda: client.ask(m.Readlink(client.walk("long")), m.Rreadlink))
    fid = client.open("file")
    request = client.raw(struct.pack("<IBHIQI", 23, 116, 5, fid, 0, 100), room=11 + 4)
    assert request.written(client.driver.ram)[11:] == b"cont"


def test_fids_without_end(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from devices.virtio.p9 import fids

    monkeypatch.setattr(fids, "MOST_FIDS", 10)
    monkeypatch.setattr(fids, "MOST_OPEN", 3)
    opened = [client.open("file") for _ in range(3)]
    fails(errno.EMFILE, lambda: client.open("file"))
    client.clunk(opened[0])
    client.open("file")
    monkeypatch.setattr(fids, "MOST_PATH_BYTES", 30)
    fails(errno.ENFILE, lambda: [client.walk("dir/inner") for _ in range(9)])
    fails(errno.ENFILE, lambda: client.ask(m.Renameat(0, b"file", 0, b"x" * 9), m.Rrenameat))
    monkeypatch.setattr(fids, "MOST_PATH_BYTES", 1 << 20)
    fails(errno.ENFILE, lambda: [client.walk() for _ in range(11)])


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 1 << 32))
def test_random_requests(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Half plausible, half not; every one is answered, and nothing outside changes."""
    chance = random.Random(seed)
    outside = tmp_path_factory.mktemp("random")
    (outside / "secret").write_text("secret")
    shared = outside / "shared"
    shared.mkdir()
    (shared / "up").symlink_to("..")
    client = Client(local_rig(shared))
    names = [b"a", b"b", b"up", b"..", b".", b"", b"a/b", b"../secret", b"secret", b"x" * 300]
    kinds = [kind for kind in m.MESSAGES.values() if kind.number % 2 == 0 and kind is not m.Version]
    for _ in range(150):
        kind = chance.choice(kinds)
        values: list[Any] = []
        for name in kind.__struct_fields__:
            if name in ("fid", "new_fid", "directory", "old_directory", "new_directory"):
                values.append(chance.randrange(4))
            elif name == "names":
                values.append(tuple(chance.choices(names, k=chance.randrange(3))))
            elif name in ("name", "old_name", "new_name", "target"):
                values.append(chance.choice(names))
            elif name in ("user", "tree", "client", "data"):
                values.append(bytes(chance.randrange(9)))
            elif name == "kind":
                values.append(chance.randrange(3))
            elif name == "old_tag":
                values.append(chance.randrange(1 << 16))
            else:
                values.append(chance.choice([0, 1, 2, 0o644, 0o100644, 0o40755, 4096, 0xFFFF_FFFF]))
        request, _ = client.send(kind(*values), settle=True)
        assert request.length is not None
        if chance.random() < 0.02:
            client.rig.replace(client.rig.snapshot())
    shared.chmod(0o755)  # for whoever deletes it all
    for above, folders, _ in os.walk(shared):
        for name in folders:
            if not (Path(above) / name).is_symlink():
                (Path(above) / name).chmod(0o755)
    assert not client.driver.status & NEEDS_RESET
    assert sorted(os.listdir(outside)) == ["secret", "shared"]
    assert (outside / "secret").read_text() == "secret"
    close_rigs()


# Snapshots.


def test_a_restore_opens_the_files_again(client: Client, shared: Path) -> None:
    write = client.open("file", p.OpenFlag.RDWR)
    there, folder = client.walk("dir/inner"), client.open("dir")
    made = client.create("made", flags=p.OpenFlag.WRONLY | p.OpenFlag.TRUNC | p.OpenFlag.EXCL)
    client.write(made, b"kept")
    first = client.ask(m.Readdir(folder, 0, 30), m.Rreaddir).data
    client.rig.replace(client.rig.snapshot())
    assert client.rig.logs == []
    assert client.write(write, b"again") == 5
    assert (shared / "made").read_bytes() == b"kept"  # not truncated again
    assert client.write(made, b"more", 4) == 4
    client.ask(m.Lopen(there, 0), m.Rlopen)
    offset = int.from_bytes(first[13:21], "little")
    rest = client.ask(m.Readdir(folder, offset, 4096), m.Rreaddir).data
    assert len(first + rest) == sum(24 + len(n) for n in (b".", b"..", b"inner"))
    assert client.read(client.open("file")) == b"againnts"


def test_what_a_restore_loses_is_named(client: Client, shared: Path) -> None:
    gone, replaced = client.open("file"), client.open("dir/inner")
    unopened = client.walk("dir/inner")
    client.ask(m.Unlinkat(0, b"file", 0), m.Runlinkat)
    saved = client.rig.snapshot()
    (shared / "new").write_bytes(b"other")
    (shared / "new").rename(shared / "dir" / "inner")
    client.rig.device.close()  # type: ignore[attr-defined]
    client.rig.replace(saved)
    assert len(client.rig.logs) == 2
    assert all(line.startswith("open file lost: ") for line in client.rig.logs)
    for fid in (gone, replaced):
        fails(errno.ESTALE, lambda fid=fid: client.read(fid))
        fails(errno.ESTALE, lambda fid=fid: client.ask(m.Getattr(fid, 0), m.Rgetattr))
    client.rig.replace(client.rig.snapshot())  # lost for good, and said once
    assert client.rig.logs == []
    fails(errno.ESTALE, lambda: client.read(gone))
    client.clunk(gone)
    client.clunk(replaced)
    client.ask(m.Lopen(unopened, 0), m.Rlopen)
    assert client.read(unopened) == b"other"


def test_an_fsync_is_over_in_a_snapshot(client: Client) -> None:
    fid = client.open("file", p.OpenFlag.RDWR)
    sync, tag = client.send(m.Fsync(fid, 0))
    saved = client.rig.snapshot()
    client.driver.queues[0].collect()
    client.answer(sync, tag, m.Rfsync)
    client.rig.replace(saved)
    client.stat("file")


@pytest.mark.parametrize(
    "spoil",
    [
        {"path": "Li4="},  # ..
        {"path": "YS8uLi8uLg=="},  # a/../..
        {"path": "L2V0Yw=="},  # /etc
        {"path": "YQBi"},  # a\0b
        {"flags": os.O_CREAT},
        {"flags": os.O_RDWR | os.O_TRUNC},
        {"flags": os.O_PATH},
        {"inode": []},
        {"inode": [1, 2]},
        {"inode": [1, 2, 1 << 64]},
        {"number": 0},
        {"flags": -1},
        {"lost": 1},
    ],
    ids=str,
)
def test_states_that_cannot_be(client: Client, spoil: dict[str, Any]) -> None:
    client.open("file")
    saved = client.rig.snapshot()
    saved["fids"][1].update(spoil)
    with pytest.raises(DeviceError):
        client.rig.device.restore(saved)  # type: ignore[attr-defined]


def test_a_reset_lets_go_of_everything(client: Client) -> None:
    client.open("file")
    client.send(m.Fsync(client.open("file"), 0))
    before = len(os.listdir("/proc/self/fd"))
    client.driver.reset()
    assert len(os.listdir("/proc/self/fd")) == before - 3
    assert client.rig.snapshot()["fids"] == []
