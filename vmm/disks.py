"""The content of disks: cloned where the file system can share it, else copied without its holes.

A clone (a reflink, ``FICLONE``) shares the blocks of both files until one is written: it takes
milliseconds and no space, whatever the size. Btrfs, XFS, bcachefs and others have it, ext4 and
tmpfs do not.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from devices import host_io

_FICLONE = 0x4004_9409
"""Linux, include/uapi/linux/fs.h: _IOW(0x94, 9, int)."""
_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)

Progress = Callable[[int, int], None]
"""Called with bytes done, and of how many, every now and then; may raise to end it."""


@dataclass(frozen=True)
class Transfer:
    """How a disk's content was taken over.

    Attributes:
        cloned: it shares its blocks with the original.
        data: bytes that were copied: those that are not zero, in blocks of 1 MiB; 0 for a clone.
        seconds: how long it took.
        sha256: of what was copied, as `digest` has it; "" for a clone, or if it was not wanted.
    """

    cloned: bool
    data: int
    seconds: float
    sha256: str

    def __str__(self) -> str:
        took = f"in {self.seconds:.2f} s"
        return f"cloned {took}" if self.cloned else f"{_mib(self.data)} copied {took}"


def nothing(_done: int, _of: int) -> None:
    """No progress to be told."""


def transfer(
    source: int, target: int, progress: Progress = nothing, *, digested: bool = True
) -> Transfer:
    """Give the empty file `target` the content of `source`, by whatever is quickest.

    Args:
        digested: whether the digest of a copy is wanted.

    Raises:
        OSError: it cannot be read or written.
    """
    began = monotonic()
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        data, sha256 = _copy(source, target, progress, digested)
        return Transfer(False, data, monotonic() - began, sha256)
    return Transfer(True, 0, monotonic() - began, "")


def digest(fd: int) -> str:
    """SHA-256 over the blocks of 1 MiB that are not all zeros, each after its number in 8 bytes.

    So it does not depend on which zeros are holes.

    Raises:
        OSError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    for offset, block in _blocks(fd, os.lseek(fd, 0, os.SEEK_END), nothing):
        _add(sha256, offset, block)
    return sha256.hexdigest()


def private_file(beside: Path) -> int:
    """A new file without a name, in the directory `beside` or where temporary files go.

    Raises:
        OSError: there is no place for it.
    """
    try:
        with tempfile.TemporaryFile(dir=beside) as file:
            return os.dup(file.fileno())
    except OSError:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _copy(source: int, target: int, progress: Progress, digested: bool) -> tuple[int, str]:
    size = os.lseek(source, 0, os.SEEK_END)
    os.ftruncate(target, size)
    sha256 = hashlib.sha256()
    data = 0
    for offset, block in _blocks(source, size, progress):
        if digested:
            _add(sha256, offset, block)
        data += len(block)
        host_io.write_all(target, [memoryview(block)], offset)
    return data, sha256.hexdigest() if digested else ""


def _add(sha256: hashlib._Hash, offset: int, block: bytes) -> None:
    sha256.update((offset // _BLOCK).to_bytes(8, "little"))
    sha256.update(block)


def _blocks(fd: int, size: int, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each block that is not all zeros."""
    offset = 0
    while (offset := _next_data(fd, offset, size)) < size:
        progress(offset, size)
        block = _read(fd, min(_BLOCK, size - offset), offset)
        if block != _ZEROS[: len(block)]:
            yield offset, block
        offset += _BLOCK


def _next_data(fd: int, offset: int, size: int) -> int:
    """The block at or after `offset` in which there may be data."""
    if offset >= size:
        return size
    try:
        found = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno != errno.EINVAL:  # a block device cannot tell
            raise
        found = offset
    return found // _BLOCK * _BLOCK


def _read(fd: int, length: int, offset: int) -> bytes:
    block = os.pread(fd, length, offset)
    while len(block) < length:
        more = os.pread(fd, length - len(block), offset + len(block))
        if not more:
            raise OSError(errno.EIO, "it became shorter while it was read")
        block += more
    return block


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
