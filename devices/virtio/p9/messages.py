"""The messages of 9P2000.L: a request has an even number, its reply the next one.

Sources: Linux, include/net/9p/9p.h and net/9p/client.c; diod, protocol.md.
"""

from __future__ import annotations

from devices.virtio.p9.codec import U8, U16, U32, U64, Data, Message, Names, QidField, Qids, Text


class Rlerror(Message, frozen=True):
    """The answer to any request that failed; `code` is an errno of Linux."""

    number = 7
    code: U32


class Statfs(Message, frozen=True):
    number = 8
    fid: U32


class Rstatfs(Message, frozen=True):
    number = 9
    kind: U32
    block_size: U32
    blocks: U64
    free: U64
    available: U64
    files: U64
    files_free: U64
    fsid: U64
    longest_name: U32


class Lopen(Message, frozen=True):
    number = 12
    fid: U32
    flags: U32


class Rlopen(Message, frozen=True):
    """`io_unit`: bytes of one read or write at most; 0: what fits in a message."""

    number = 13
    qid: QidField
    io_unit: U32


class Lcreate(Message, frozen=True):
    """Make a file in the directory `fid`, which stands for the open file afterwards."""

    number = 14
    fid: U32
    name: Text
    flags: U32
    mode: U32
    gid: U32


class Rlcreate(Message, frozen=True):
    number = 15
    qid: QidField
    io_unit: U32


class Symlink(Message, frozen=True):
    number = 16
    fid: U32
    name: Text
    target: Text
    gid: U32


class Rsymlink(Message, frozen=True):
    number = 17
    qid: QidField


class Mknod(Message, frozen=True):
    number = 18
    fid: U32
    name: Text
    mode: U32
    major: U32
    minor: U32
    gid: U32


class Rmknod(Message, frozen=True):
    number = 19
    qid: QidField


class Rename(Message, frozen=True):
    number = 20
    fid: U32
    directory: U32
    name: Text


class Rrename(Message, frozen=True):
    number = 21


class Readlink(Message, frozen=True):
    number = 22
    fid: U32


class Rreadlink(Message, frozen=True):
    number = 23
    target: Text


class Getattr(Message, frozen=True):
    number = 24
    fid: U32
    mask: U64


class Rgetattr(Message, frozen=True):
    number = 25
    valid: U64
    qid: QidField
    mode: U32
    uid: U32
    gid: U32
    links: U64
    rdev: U64
    size: U64
    block_size: U64
    blocks: U64
    atime: U64
    atime_ns: U64
    mtime: U64
    mtime_ns: U64
    ctime: U64
    ctime_ns: U64
    btime: U64
    btime_ns: U64
    generation: U64
    data_version: U64


class Setattr(Message, frozen=True):
    number = 26
    fid: U32
    valid: U32
    mode: U32
    uid: U32
    gid: U32
    size: U64
    atime: U64
    atime_ns: U64
    mtime: U64
    mtime_ns: U64


class Rsetattr(Message, frozen=True):
    number = 27


class Xattrwalk(Message, frozen=True):
    number = 30
    fid: U32
    new_fid: U32
    name: Text


class Xattrcreate(Message, frozen=True):
    number = 32
    fid: U32
    name: Text
    size: U64
    flags: U32


class Readdir(Message, frozen=True):
    """`offset`: 0, or that of the last entry that was read."""

    number = 40
    fid: U32
    offset: U64
    count: U32


class Rreaddir(Message, frozen=True):
    """`data`: entries, each ``qid[13] offset[8] type[1] name[s]``."""

    number = 41
    data: Data


class Fsync(Message, frozen=True):
    number = 50
    fid: U32
    data_only: U32


class Rfsync(Message, frozen=True):
    number = 51


class Lock(Message, frozen=True):
    number = 52
    fid: U32
    kind: U8
    flags: U32
    start: U64
    length: U64
    process: U32
    client: Text


class Rlock(Message, frozen=True):
    number = 53
    status: U8


class Getlock(Message, frozen=True):
    number = 54
    fid: U32
    kind: U8
    start: U64
    length: U64
    process: U32
    client: Text


class Rgetlock(Message, frozen=True):
    number = 55
    kind: U8
    start: U64
    length: U64
    process: U32
    client: Text


class Link(Message, frozen=True):
    number = 70
    directory: U32
    fid: U32
    name: Text


class Rlink(Message, frozen=True):
    number = 71


class Mkdir(Message, frozen=True):
    number = 72
    fid: U32
    name: Text
    mode: U32
    gid: U32


class Rmkdir(Message, frozen=True):
    number = 73
    qid: QidField


class Renameat(Message, frozen=True):
    number = 74
    old_directory: U32
    old_name: Text
    new_directory: U32
    new_name: Text


class Rrenameat(Message, frozen=True):
    number = 75


class Unlinkat(Message, frozen=True):
    number = 76
    fid: U32
    name: Text
    flags: U32


class Runlinkat(Message, frozen=True):
    number = 77


class Version(Message, frozen=True):
    """Begin a session: all fids are forgotten. `msize`: bytes of the longest message."""

    number = 100
    msize: U32
    version: Text


class Rversion(Message, frozen=True):
    number = 101
    msize: U32
    version: Text


class Attach(Message, frozen=True):
    number = 104
    fid: U32
    auth: U32
    user: Text
    tree: Text
    uid: U32


class Rattach(Message, frozen=True):
    number = 105
    qid: QidField


class Flush(Message, frozen=True):
    """Answered after the request with `old_tag` was, or is never to be."""

    number = 108
    old_tag: U16


class Rflush(Message, frozen=True):
    number = 109


class Walk(Message, frozen=True):
    number = 110
    fid: U32
    new_fid: U32
    names: Names


class Rwalk(Message, frozen=True):
    """Fewer qids than names: the next name is not there, and there is no new fid."""

    number = 111
    qids: Qids


class Read(Message, frozen=True):
    number = 116
    fid: U32
    offset: U64
    count: U32


class Rread(Message, frozen=True):
    number = 117
    data: Data


class Write(Message, frozen=True):
    number = 118
    fid: U32
    offset: U64
    data: Data


class Rwrite(Message, frozen=True):
    number = 119
    count: U32


class Clunk(Message, frozen=True):
    """Let go of a fid."""

    number = 120
    fid: U32


class Rclunk(Message, frozen=True):
    number = 121


class Remove(Message, frozen=True):
    """Delete the file, and let go of the fid in any case."""

    number = 122
    fid: U32


class Rremove(Message, frozen=True):
    number = 123


MESSAGES = {
    each.number: each
    for each in list(globals().values())
    if isinstance(each, type) and issubclass(each, Message) and each.number
}
"""By number."""
