"""The kernel proper (vmlinux) out of a bzImage, decompressed by the host and cached.

A bzImage decompresses itself in the guest, which takes seconds on an emulated CPU. The payload is a
whole ELF file, compressed by one of the kernel's usual methods, with its size as four bytes at the
end.

LZ4 and zstd are as fast as reading a file and checking it; the results of the slower methods are
kept in ``$XDG_CACHE_HOME/jailed-vmm/kernels`` (``~/.cache`` by default), each under the hash of
its payload. A file there counts only if its own checksum is right.

Sources: Linux, scripts/Makefile.lib ("size_append") and lib/decompress.c (magic numbers);
lz4_Frame_format.md, "Legacy frame".
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

from devices.errors import UserError
from vmm.boot import kernel_cache

SIZE_LIMIT = 1 << 30
"""No kernel is larger."""

_ELF = b"\x7fELF"
_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
_SIZE_FIELD = 4


class CannotExtract(Exception):
    """This payload is of a kind that is not known here; the kernel can do it by itself."""


def vmlinux(payload: memoryview) -> bytes:
    """The ELF file in a payload.

    Raises:
        CannotExtract: the compression is not known, or its library is not installed.
        UserError: the payload is damaged.
    """
    if bytes(payload[:4]) == _ELF:
        return bytes(payload)
    if len(payload) <= _SIZE_FIELD:
        raise CannotExtract("the header names no payload")
    name, decompress, slow = _method(payload)
    (size,) = struct.unpack("<I", payload[-_SIZE_FIELD:])
    if size > SIZE_LIMIT:
        raise UserError(f"a damaged kernel: its payload claims {size:#x} bytes of vmlinux")
    key = hashlib.sha256(payload).hexdigest() if slow else ""
    if slow:
        cached = kernel_cache.read(key, size)
        if cached is not None:
            return cached
    try:
        data = decompress(payload, size)
    except CannotExtract:
        raise
    except Exception as error:  # each library has its own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"a damaged kernel: its {name} payload: {reason}") from error
    if len(data) != size:
        more = "more" if len(data) > size else "only"
        raise UserError(
            f"a damaged kernel: its {name} payload holds {more} {len(data):#x} bytes of the "
            f"{size:#x} it claims"
        )
    if not data.startswith(_ELF):
        raise UserError(f"a damaged kernel: its {name} payload is no ELF file")
    if slow:
        kernel_cache.write(key, data)
    return data


_Decompress = Callable[[memoryview, int], bytes]


def _method(payload: memoryview) -> tuple[str, _Decompress, bool]:
    """The name of the compression, how to undo it, and whether that is slow."""
    start = bytes(payload[:6])
    for magic, name, decompress, slow in _METHODS:
        if start.startswith(magic):
            return name, decompress, slow
    if start.startswith(b"\x89LZO"):
        raise CannotExtract("it is compressed with LZO")
    raise CannotExtract(f"its compression is not known (magic {start[:4].hex(' ')})")


def _gzip(payload: memoryview, size: int) -> bytes:
    # The size field is gzip's own trailer here.
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(payload, size + 1)


def _bzip2(payload: memoryview, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload[:-_SIZE_FIELD], size + 1)


def _lzma(payload: memoryview, size: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=SIZE_LIMIT)
    return decompressor.decompress(payload[:-_SIZE_FIELD], size + 1)


def _zstd(payload: memoryview, size: int) -> bytes:
    try:
        zstd = _zstd_module()
    except ImportError as error:
        raise CannotExtract("it is compressed with zstd: install backports.zstd") from error
    data: bytes = zstd.ZstdDecompressor().decompress(payload[:-_SIZE_FIELD], size + 1)
    return data


def _zstd_module() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _lz4(payload: memoryview, size: int) -> bytes:
    """The legacy frame: a magic number, then blocks of at most 8 MiB, each after its length."""
    try:
        import lz4.block
    except ImportError as error:
        raise CannotExtract("it is compressed with LZ4: install lz4") from error
    blocks: list[bytes] = []
    total = 0
    end = len(payload) - _SIZE_FIELD
    position = len(_LZ4_MAGIC)
    while position < end and total <= size:
        (length,) = struct.unpack_from("<I", payload, position)
        position += 4
        if payload[position - 4 : position] == _LZ4_MAGIC:
            continue
        if not 0 < length <= end - position:
            raise ValueError(f"a block of {length:#x} bytes at {position:#x} leads past its end")
        block = payload[position : position + length]
        blocks.append(lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK))
        total += len(blocks[-1])
        position += length
    return b"".join(blocks)


_METHODS: tuple[tuple[bytes, str, _Decompress, bool], ...] = (
    (b"\x1f\x8b", "gzip", _gzip, True),
    (b"BZh", "bzip2", _bzip2, True),
    (b"\x5d\0\0", "LZMA", _lzma, True),
    (b"\xfd7zXZ\0", "xz", _lzma, True),
    (_LZ4_MAGIC, "LZ4", _lz4, False),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd, False),
)
