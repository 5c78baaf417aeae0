"""Extracted kernels between runs. A cache: whatever goes wrong here only costs time.

A file is a header (magic, format version, SHA-256 of the rest) and the kernel. It is written beside
its place and renamed, so that nobody sees half of one; one that fails its checksum is
removed. The oldest go when there are more than `KEEP`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

KEEP = 8
_MAGIC = b"vmlinux\x01"
_SUFFIX = ".vmlinux"


def directory() -> Path | None:
    """Where they are kept; None if there is no home for such things."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "jailed-vmm", "kernels") if os.path.isabs(base) else None


def read(key: str, size: int) -> bytes | None:
    """The kernel under `key`, if an undamaged one of `size` bytes is there."""
    place = directory()
    if place is None:
        return None
    path = place / (key + _SUFFIX)
    try:
        with open(path, "rb") as file:
            head = file.read(len(_MAGIC) + hashlib.sha256().digest_size)
            data = file.read(size + 1)
        if head == _head(data) and len(data) == size:
            # The time of the last use decides which one goes.
            os.utime(path)
            return data
        path.unlink()
    except OSError:
        pass
    return None


def write(key: str, data: bytes) -> None:
    """Keep `data` under `key`."""
    place = directory()
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=place)
        try:
            with open(descriptor, "wb") as file:
                file.write(_head(data))
                file.write(data)
            os.replace(name, place / (key + _SUFFIX))
        except BaseException:
            os.unlink(name)
            raise
        _prune(place)


def _head(data: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(data).digest()


def _prune(place: Path) -> None:
    kernels = sorted(place.glob("*" + _SUFFIX), key=lambda path: path.stat().st_mtime)
    for path in kernels[:-KEEP]:
        path.unlink()
