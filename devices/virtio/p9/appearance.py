"""How the host's files look to the client: qids, attributes, entries of directories."""

from __future__ import annotations

import os
import stat
import struct

from devices.virtio.p9 import messages as m
from devices.virtio.p9 import protocol as p
from devices.virtio.p9.codec import QID_SIZE, Qid
from devices.virtio.p9.tree import Entry, Stat

NOBODY = 65534
MAGIC = 0x0102_1997
"""`Rstatfs.kind`: V9FS_MAGIC."""
_ENTRY = struct.Struct("<BIQQBH")  # qid, offset, kind, length of the name
_QWORD = (1 << 64) - 1
_DT = {4: p.QidKind.DIRECTORY, 10: p.QidKind.SYMLINK}


class Appearance:
    """What is told of files.

    Args:
        root: the directory at the top.
    """

    def __init__(self, root: Stat) -> None:
        self._root = root
        self.find_ids()

    def find_ids(self) -> None:
        """Find out who this process is; once more when the jail is up."""
        self._uid, self._gid = os.geteuid(), os.getegid()

    def owner(self, about: Stat) -> tuple[int, int]:
        """The user and group that the guest sees: root for the device's own, else nobody."""
        return (
            0 if about.uid == self._uid else NOBODY,
            0 if about.gid == self._gid else NOBODY,
        )

    def qid(self, about: Stat) -> Qid:
        """What identifies a file."""
        kind = 0
        if stat.S_ISDIR(about.mode):
            kind = p.QidKind.DIRECTORY
        elif stat.S_ISLNK(about.mode):
            kind = p.QidKind.SYMLINK
        version = (about.mtime.seconds * 10**9 + about.mtime.ns) ^ about.size << 8
        # Linux caches nothing of a file whose version is 0.
        return Qid(int(kind), version & 0xFFFF_FFFF or 1, self._number(about.ino, about.dev))

    def _number(self, ino: int, dev: tuple[int, int]) -> int:
        """An inode number; those of other file systems in the tree are put elsewhere."""
        if dev == self._root.dev:
            return ino
        return (ino ^ (dev[0] << 20 | dev[1]) * 0x9E37_79B9_7F4A_7C15) & _QWORD

    def attributes(self, about: Stat) -> m.Rgetattr:
        """The reply to Getattr."""
        uid, gid = self.owner(about)
        return m.Rgetattr(
            valid=p.GETATTR_BASIC | p.GETATTR_BTIME,
            qid=self.qid(about),
            mode=about.mode,
            uid=uid,
            gid=gid,
            links=about.links,
            rdev=os.makedev(*about.rdev),
            size=about.size,
            block_size=about.block_size,
            blocks=about.blocks,
            atime=about.atime.seconds & _QWORD,
            atime_ns=about.atime.ns,
            mtime=about.mtime.seconds & _QWORD,
            mtime_ns=about.mtime.ns,
            ctime=about.ctime.seconds & _QWORD,
            ctime_ns=about.ctime.ns,
            btime=about.btime.seconds & _QWORD,
            btime_ns=about.btime.ns,
            generation=0,
            data_version=0,
        )

    def space(self, about: os.statvfs_result) -> m.Rstatfs:
        """The reply to Statfs."""
        return m.Rstatfs(
            kind=MAGIC,
            block_size=about.f_frsize & 0xFFFF_FFFF,
            blocks=about.f_blocks,
            free=about.f_bfree,
            available=about.f_bavail,
            files=about.f_files,
            files_free=about.f_ffree,
            fsid=about.f_fsid & _QWORD,
            longest_name=about.f_namemax,
        )

    def entry(self, entry: Entry, directory: Stat) -> bytes:
        """An entry of a directory; what is above the top is the top."""
        ino, offset, kind, name = entry
        if name == b".." and (directory.ino, directory.dev) == (self._root.ino, self._root.dev):
            ino = directory.ino
        number = self._number(ino, directory.dev)
        return _ENTRY.pack(int(_DT.get(kind, 0)), 0, number, offset, kind, len(name)) + name


ENTRY_SIZE = _ENTRY.size
assert ENTRY_SIZE == QID_SIZE + 11
