"""cpio archives in the "newc" format, as the kernel unpacks them into its first root file system.

The same entries give the same bytes on every host: inode numbers count from 1, owner and times
are 0, nothing is read from a file system.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAGIC = b"070701"
_HEADER_SIZE = 110
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive.

    Attributes:
        name: its path, relative to the root and without a leading slash.
        mode: kind and permissions, as in ``st_mode``.
        data: the contents, or where a symbolic link points.
        device: major and minor number of a device node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> Entry:
    return Entry(name, stat.S_IFREG | 0o755, data)


def file(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | permissions, data)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int) -> Entry:
    return Entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries`, in their order; a directory must come before what is in it.

    Raises:
        ValueError: a name or a size that the format cannot hold.
    """
    archive = bytearray()
    for inode, entry in enumerate((*entries, Entry(_TRAILER, 0)), start=1):
        name = entry.name.encode() + b"\0"
        if entry.name.startswith("/") or b"\0" in name[:-1] or len(name) == 1:
            raise ValueError(f"no name for a file in a cpio archive: {entry.name!r}")
        if len(entry.data) >> 32:
            raise ValueError(f"{entry.name}: 4 GiB or more do not go into a cpio archive")
        major, minor = entry.device
        # c_ino, c_mode, c_uid, c_gid, c_nlink, c_mtime, c_filesize, c_maj, c_min, c_rmaj, c_rmin,
        # c_namesize, c_chksum
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
        archive += MAGIC + b"".join(b"%08X" % value for value in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def unpack(archive: bytes) -> list[Entry]:
    """The entries of an archive, without its trailer.

    Raises:
        ValueError: it is damaged.
    """
    entries: list[Entry] = []
    position = 0
    while True:
        header = archive[position : position + _HEADER_SIZE]
        if len(header) < _HEADER_SIZE or not header.startswith(MAGIC):
            raise ValueError(f"no cpio header at offset {position:#x}")
        fields = [int(header[at : at + 8], 16) for at in range(6, _HEADER_SIZE, 8)]
        mode, size, device, name_size = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name_end = position + _HEADER_SIZE + name_size
        data_start = name_end + -name_end % 4
        data_end = data_start + size
        if data_end > len(archive) or name_size == 0:
            raise ValueError(f"truncated cpio entry at offset {position:#x}")
        name = archive[position + _HEADER_SIZE : name_end - 1].decode()
        if name == _TRAILER:
            return entries
        entries.append(Entry(name, mode, archive[data_start:data_end], device))
        position = data_end + -data_end % 4
