"""The constants of 9P2000.L; sources as for `messages`."""

from __future__ import annotations

import enum

VERSION = b"9P2000.L"
NO_FID = 0xFFFF_FFFF
NO_TAG = 0xFFFF


class QidKind(enum.IntFlag):
    """`Qid.kind`; a plain file has no bit."""

    DIRECTORY = 0x80
    SYMLINK = 0x02


class OpenFlag(enum.IntFlag):
    """`Lopen.flags`, `Lcreate.flags`: O_* as most processors number them."""

    WRONLY = 0o1
    RDWR = 0o2
    CREATE = 0o100
    EXCL = 0o200
    TRUNC = 0o1000
    APPEND = 0o2000
    DSYNC = 0o10000
    DIRECTORY = 0o200000
    SYNC = 0o4000000


class AttrValid(enum.IntFlag):
    """`Setattr.valid`: what is to be set. A time without its _SET is to be now."""

    MODE = 0x1
    UID = 0x2
    GID = 0x4
    SIZE = 0x8
    ATIME = 0x10
    MTIME = 0x20
    CTIME = 0x40
    ATIME_SET = 0x80
    MTIME_SET = 0x100


GETATTR_BASIC, GETATTR_BTIME = 0x7FF, 0x800
"""`Rgetattr.valid`: the fields of stat(2), and when the file was made."""
UNLINK_DIRECTORY = 0x200
"""`Unlinkat.flags`: AT_REMOVEDIR."""
LOCK_SUCCESS, UNLOCKED = 0, 2
"""`Rlock.status`; the type of no lock (F_UNLCK)."""
