"""What the requests of 9P2000.L do to a tree of files; reading, writing and fsync apart.

Decided here, and told in docs/devices.md:

- **Who owns what.** The device's process is one user of the host. Its files belong to the guest's
  root, everybody else's to 65534; so nothing can be given away (EPERM).
- **Modes** are the host's, but set-user-ID and set-group-ID are never set: a program that the
  guest wrote must not run as the device's user when somebody else on the host starts it.
- **Special files**: FIFOs and sockets can be made, device nodes cannot, and none is ever opened.
- **Locks** are granted: the guest's kernel keeps those of its processes apart. The host's
  processes do not see them.
- **Extended attributes**: none.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from devices.virtio.p9 import messages as m
from devices.virtio.p9 import protocol as p
from devices.virtio.p9.appearance import Appearance
from devices.virtio.p9.codec import Message, Qid
from devices.virtio.p9.fids import CLOSED, Fids, FidState, is_name
from devices.virtio.p9.tree import UTIME_NOW, UTIME_OMIT, Stat, Time, Tree

MOST_NAMES = 16
"""In one walk (MAXWELEM)."""
_MODE_BITS = 0o1777
_CHUNK, _ONE_ENTRY = 1 << 16, 280
"""Bytes of entries that are asked for at once, and that one may have."""

_FLAGS = {
    p.OpenFlag.EXCL: os.O_EXCL,
    p.OpenFlag.TRUNC: os.O_TRUNC,
    p.OpenFlag.APPEND: os.O_APPEND,
    p.OpenFlag.DIRECTORY: os.O_DIRECTORY,
    p.OpenFlag.SYNC: os.O_SYNC,
}
_ACCESS = {0: os.O_RDONLY, 1: os.O_WRONLY, 2: os.O_RDWR}
_KINDS = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)
"""What `Mknod` makes."""


class Session:
    """One client's view of a tree; every request raises OSError if it cannot be done.

    Args:
        tree: the files.
        readonly: refuse what changes anything.

    Attributes:
        most: bytes of data that one reply may have.
    """

    def __init__(self, tree: Tree, readonly: bool) -> None:
        self.tree = tree
        self.fids = Fids()
        self._readonly = readonly
        self.looks = Appearance(tree.stat_of(tree.fd))
        self.most = 0
        self._requests: dict[type[Message], Callable[[Any], Message]] = {
            m.Statfs: self._statfs,
            m.Lopen: self._lopen,
            m.Lcreate: self._lcreate,
            m.Symlink: self._symlink,
            m.Mknod: self._mknod,
            m.Rename: self._rename,
            m.Readlink: self._readlink,
            m.Getattr: self._getattr,
            m.Setattr: self._setattr,
            m.Readdir: self._readdir,
            m.Lock: self._lock,
            m.Getlock: self._getlock,
            m.Link: self._link,
            m.Mkdir: self._mkdir,
            m.Renameat: self._renameat,
            m.Unlinkat: self._unlinkat,
            m.Attach: self._attach,
            m.Walk: self._walk,
            m.Clunk: self._clunk,
            m.Remove: self._remove,
        }

    def carry_out(self, request: Message) -> Message:
        """Do what a request asks; its reply.

        Raises:
            OSError: it cannot be done; EOPNOTSUPP for a request that there is not.
        """
        method = self._requests.get(type(request))
        if method is None:
            raise OSError(errno.EOPNOTSUPP, type(request).__name__)
        return method(request)

    def restore(self, saved: list[FidState]) -> list[str]:
        """Take up the fids of a snapshot; the paths of open files that are lost."""
        self.fids.clear()
        lost = []
        for fid in saved:
            self.fids.add(FidState(fid.number, fid.path, fid.flags, fid.inode, fid.lost))
        for fid in self.fids:
            if fid.flags != CLOSED and not fid.lost and not self._reopen(fid):
                fid.lost = True
                lost.append(os.fsdecode(fid.path) or ".")
        return lost

    def _reopen(self, fid: FidState) -> bool:
        try:
            self.fids.check_room()
            fd = self.tree.open(fid.path, fid.flags)
        except OSError:
            return False
        if _inode(self.tree.stat_of(fd)) != fid.inode:
            os.close(fd)
            return False
        self.fids.open(fid, fd, fid.flags, fid.inode)
        return True

    # Walking.

    def _attach(self, request: m.Attach) -> Message:
        about = self.tree.stat(b"")
        self.fids.add(FidState(request.fid, b""))
        return m.Rattach(self.looks.qid(about))

    def _walk(self, request: m.Walk) -> Message:
        fid = self.fids.get(request.fid)
        if len(request.names) > MOST_NAMES:
            raise OSError(errno.EINVAL, "too many names")
        path, qids = fid.path, []
        for name in request.names:
            try:
                path = self._step(path, name)
                qids.append(self.looks.qid(self.tree.stat(path)))
            except OSError:
                if not qids:
                    raise
                return m.Rwalk(tuple(qids))
        if request.new_fid == request.fid:
            self.fids.move(request.fid, path)
        else:
            self.fids.add(FidState(request.new_fid, path))
        return m.Rwalk(tuple(qids))

    def _step(self, path: bytes, name: bytes) -> bytes:
        if name != b"..":
            return _join(path, name)
        if path and not stat.S_ISDIR(self.tree.stat(path).mode):
            raise OSError(errno.ENOTDIR, "no directory")
        return path.rpartition(b"/")[0]

    def _clunk(self, request: m.Clunk) -> Message:
        self.fids.remove(request.fid)
        return m.Rclunk()

    # Opening.

    def _lopen(self, request: m.Lopen) -> Message:
        fid = self._closed(request.fid)
        flags = self._flags(request.flags) & ~os.O_EXCL
        mode = self.tree.stat(fid.path).mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "neither a file nor a directory")
        return m.Rlopen(self._open(fid, fid.path, flags, 0), 0)

    def _lcreate(self, request: m.Lcreate) -> Message:
        fid = self._closed(request.fid)
        path = _join(fid.path, request.name)
        self._writes()
        flags = self._flags(request.flags) | os.O_CREAT
        return m.Rlcreate(self._open(fid, path, flags, request.mode & _MODE_BITS), 0)

    def _open(self, fid: FidState, path: bytes, flags: int, mode: int) -> Qid:
        self.fids.check_room()
        fd = self.tree.open(path, flags, mode)
        try:
            about = self.tree.stat_of(fd)
            if not (stat.S_ISREG(about.mode) or stat.S_ISDIR(about.mode)):
                raise OSError(errno.EINVAL, "neither a file nor a directory")
            if path != fid.path:
                self.fids.move(fid.number, path)
        except BaseException:
            os.close(fd)
            raise
        self.fids.open(fid, fd, flags, _inode(about))
        return self.looks.qid(about)

    def _closed(self, number: int) -> FidState:
        fid = self.fids.get(number)
        if fid.flags != CLOSED:
            raise OSError(errno.EBADF, "it is open already")
        return fid

    def _flags(self, wanted: int) -> int:
        """The host's open flags; what makes no sense for a server is left out."""
        access = _ACCESS.get(wanted & 3)
        if access is None:
            raise OSError(errno.EINVAL, "no such access mode")
        flags = access
        for ours, hosts in _FLAGS.items():
            if wanted & ours == ours:
                flags |= hosts
        if wanted & p.OpenFlag.DSYNC:
            flags |= os.O_DSYNC
        if access != os.O_RDONLY or flags & os.O_TRUNC:
            self._writes()
        return flags

    def _writes(self) -> None:
        if self._readonly:
            raise OSError(errno.EROFS, "read-only")

    # Asking.

    def _stat(self, fid: FidState) -> Stat:
        fd = self.fids.fd(fid)
        return self.tree.stat(fid.path) if fd is None else self.tree.stat_of(fd)

    def _getattr(self, request: m.Getattr) -> Message:
        return self.looks.attributes(self._stat(self.fids.get(request.fid)))

    def _statfs(self, request: m.Statfs) -> Message:
        fid = self.fids.get(request.fid)
        fd = self.fids.fd(fid)
        if fd is not None:
            return self.looks.space(os.fstatvfs(fd))
        with self.tree.opened(fid.path, os.O_PATH) as own:
            return self.looks.space(os.fstatvfs(own))

    def _readlink(self, request: m.Readlink) -> Message:
        return m.Rreadlink(self.tree.readlink(self.fids.get(request.fid).path))

    def _readdir(self, request: m.Readdir) -> Message:
        fd = self.fids.opened(request.fid)
        directory = self.tree.stat_of(fd)
        offset, left = request.offset, min(request.count, self.most)
        if offset >= 1 << 63:
            raise OSError(errno.EINVAL, "no such offset")
        found: list[bytes] = []
        while True:
            # An entry is a little larger for the client than for the kernel, so perhaps not all of
            # them fit; the next request reads the rest again.
            entries = self.tree.entries(fd, offset, min(max(left, _ONE_ENTRY), _CHUNK))
            for entry in entries:
                data = self.looks.entry(entry, directory)
                if len(data) > left:
                    if not found:
                        raise OSError(errno.EINVAL, "no room for one entry")
                    return m.Rreaddir(b"".join(found))
                found.append(data)
                offset, left = entry.offset, left - len(data)
            if not entries:
                return m.Rreaddir(b"".join(found))

    def _lock(self, request: m.Lock) -> Message:
        self.fids.opened(request.fid)
        return m.Rlock(p.LOCK_SUCCESS)

    def _getlock(self, request: m.Getlock) -> Message:
        self.fids.opened(request.fid)
        return m.Rgetlock(
            p.UNLOCKED, request.start, request.length, request.process, request.client
        )

    # Changing.

    def _setattr(self, request: m.Setattr) -> Message:
        self._writes()
        fid, valid = self.fids.get(request.fid), request.valid
        fd, about = self.fids.fd(fid), self._stat(fid)
        uid, gid = self.looks.owner(about)
        if valid & p.AttrValid.UID and request.uid != uid:
            raise OSError(errno.EPERM, "nothing can be given away")
        if valid & p.AttrValid.GID and request.gid != gid:
            raise OSError(errno.EPERM, "nothing can be given away")
        if valid & p.AttrValid.MODE:
            self.tree.chmod(fid.path, fd, request.mode & _MODE_BITS)
        if valid & p.AttrValid.SIZE:
            self._truncate(fid, about, request.size)
        if valid & (p.AttrValid.ATIME | p.AttrValid.MTIME):
            atime = _time(valid, p.AttrValid.ATIME, request.atime, request.atime_ns)
            mtime = _time(valid, p.AttrValid.MTIME, request.mtime, request.mtime_ns)
            self.tree.utimens(fid.path, fd, atime, mtime)
        return m.Rsetattr()

    def _truncate(self, fid: FidState, about: Stat, size: int) -> None:
        if not stat.S_ISREG(about.mode) or size >= 1 << 63:
            raise OSError(errno.EINVAL, "no file, or no such size")
        fd = self.fids.fd(fid)
        if fd is not None and fid.flags & os.O_ACCMODE != os.O_RDONLY:
            os.ftruncate(fd, size)
            return
        with self.tree.opened(fid.path, os.O_WRONLY) as own:
            os.ftruncate(own, size)

    def _made(self, number: int, name: bytes) -> tuple[FidState, bytes]:
        """The directory of what is to be made, and the path of it."""
        self._writes()
        fid = self.fids.get(number)
        return fid, _join(fid.path, name)

    def _mkdir(self, request: m.Mkdir) -> Message:
        _, path = self._made(request.fid, request.name)
        with self.tree.parent(path) as (above, name):
            os.mkdir(name, request.mode & _MODE_BITS, dir_fd=above)
        return m.Rmkdir(self.looks.qid(self.tree.stat(path)))

    def _symlink(self, request: m.Symlink) -> Message:
        _, path = self._made(request.fid, request.name)
        if b"\0" in request.target:
            raise OSError(errno.EINVAL, "a target with a zero byte")
        with self.tree.parent(path) as (above, name):
            os.symlink(request.target, name, dir_fd=above)
        return m.Rsymlink(self.looks.qid(self.tree.stat(path)))

    def _mknod(self, request: m.Mknod) -> Message:
        _, path = self._made(request.fid, request.name)
        kind = stat.S_IFMT(request.mode) or stat.S_IFREG
        if kind not in _KINDS:
            raise OSError(errno.EPERM, "no device nodes")
        with self.tree.parent(path) as (above, name):
            os.mknod(name, kind | request.mode & _MODE_BITS, dir_fd=above)
        return m.Rmknod(self.looks.qid(self.tree.stat(path)))

    def _link(self, request: m.Link) -> Message:
        _, path = self._made(request.directory, request.name)
        old = self.fids.get(request.fid).path
        with self.tree.parent(old) as (source, old_name), self.tree.parent(path) as (above, name):
            os.link(old_name, name, src_dir_fd=source, dst_dir_fd=above, follow_symlinks=False)
        return m.Rlink()

    def _rename(self, request: m.Rename) -> Message:
        _, path = self._made(request.directory, request.name)
        self._rename_to(self.fids.get(request.fid).path, path)
        return m.Rrename()

    def _renameat(self, request: m.Renameat) -> Message:
        _, old = self._made(request.old_directory, request.old_name)
        _, new = self._made(request.new_directory, request.new_name)
        self._rename_to(old, new)
        return m.Rrenameat()

    def _rename_to(self, old: bytes, new: bytes) -> None:
        moving = self.fids.renamed(old, new)
        with self.tree.parent(old) as (source, name), self.tree.parent(new) as (above, new_name):
            os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=above)
        self.fids.rename(moving, old, new)

    def _unlinkat(self, request: m.Unlinkat) -> Message:
        _, path = self._made(request.fid, request.name)
        self._unlink(path, bool(request.flags & p.UNLINK_DIRECTORY))
        return m.Runlinkat()

    def _remove(self, request: m.Remove) -> Message:
        fid = self.fids.get(request.fid)
        try:
            self._writes()
            self._unlink(fid.path, stat.S_ISDIR(self.tree.stat(fid.path).mode))
        finally:
            self.fids.remove(request.fid)
        return m.Rremove()

    def _unlink(self, path: bytes, directory: bool) -> None:
        with self.tree.parent(path) as (above, name):
            (os.rmdir if directory else os.unlink)(name, dir_fd=above)


def _join(path: bytes, name: bytes) -> bytes:
    if not is_name(name):
        raise OSError(errno.EINVAL, "no name of a file")
    return path + b"/" + name if path else name


def _inode(about: Stat) -> list[int]:
    return [about.ino, *about.dev]


def _time(valid: int, which: p.AttrValid, seconds: int, ns: int) -> Time:
    if not valid & which:
        return Time(0, UTIME_OMIT)
    if not valid & which << 3:
        return Time(0, UTIME_NOW)
    if ns >= 10**9:
        raise OSError(errno.EINVAL, "no such time")
    return Time(seconds - (seconds >> 63 << 64), ns)
