"""Kernel modules for an initramfs: chosen by name, with all that they depend on.

A distribution's package has no ``modules.dep`` and ``modules.alias``: those are made when it is
installed. Here they are made from what each module says of itself in its ``.modinfo`` section,
NUL-terminated ``key=value`` texts (Linux, include/linux/module.h, MODULE_INFO).
"""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from guests import cpio
from guests.packages import GuestError

PATH = r"(?:usr/)?lib/modules/([^/]+)/kernel/.*/([^/]+)\.ko(?:\.(xz|gz|zst))?"
"""Where a package has modules: release, name, compression."""

_INFO = re.compile(rb"(?<=\0)(depends|alias)=([^\0]*)\0")


@dataclass(frozen=True)
class Module:
    """One module as it is in the package.

    Attributes:
        release: of the kernel that it is for.
        name: with underscores, as the kernel has it.
        data: the ELF file.
    """

    release: str
    name: str
    data: bytes

    def info(self, key: str) -> list[str]:
        """The values that it gives for `key`: "depends" or "alias"."""
        texts = _INFO.findall(self.data)
        return [value.decode("ascii", "replace") for k, value in texts if k == key.encode()]

    def depends(self) -> list[str]:
        """The modules that must be there before it."""
        return [_name(each) for text in self.info("depends") for each in text.split(",") if each]


def read(path: str, data: bytes) -> Module:
    """A module from a file of a package.

    Raises:
        GuestError: it is compressed in a way that cannot be read here.
    """
    match = re.fullmatch(PATH, path)
    assert match is not None
    try:
        match match[3]:
            case "xz":
                data = lzma.decompress(data)
            case "gz":
                data = gzip.decompress(data)
            case "zst":
                data = _zstd(data)
    except (lzma.LZMAError, OSError, EOFError, ImportError, ValueError) as error:
        raise GuestError(f"{path} cannot be unpacked: {error}") from error
    return Module(match[1], _name(match[2]), data)


def _zstd(data: bytes) -> bytes:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd
    unpacked: bytes = zstd.decompress(data)
    return unpacked


def select(paths: Mapping[str, bytes], wanted: Iterable[str]) -> tuple[list[Module], list[str]]:
    """The wanted modules and what they depend on, each after what it needs; and those not there.

    Args:
        paths: the module files of a package.
    """
    files = {}
    for path in paths:
        match = re.fullmatch(PATH, path)
        if match is not None:
            files[_name(match[2])] = path
    found: dict[str, Module] = {}
    missing: list[str] = []

    def take(name: str) -> None:
        if name in found or name in missing:
            return
        if name not in files:
            missing.append(name)
            return
        module = read(files[name], paths[files[name]])
        for needed in module.depends():
            take(needed)
        found[name] = module

    for each in wanted:
        take(_name(each))
    return list(found.values()), missing


def entries(modules: Iterable[Module]) -> list[cpio.Entry]:
    """The files under ``lib/modules/RELEASE`` that modprobe needs; none if there are no modules."""
    modules = list(modules)
    if not modules:
        return []
    by_name = {module.name: module for module in modules}
    directory = f"lib/modules/{modules[0].release}"
    lines, aliases = [], []
    for module in modules:
        needs = [f"{name}.ko" for name in _closure(module, by_name)]
        lines.append(f"{module.name}.ko: {' '.join(needs)}".rstrip())
        aliases += [f"alias {alias} {module.name}" for alias in module.info("alias")]
    return [
        *(cpio.file(f"{directory}/{module.name}.ko", module.data) for module in modules),
        cpio.file(f"{directory}/modules.dep", "".join(f"{line}\n" for line in lines).encode()),
        cpio.file(f"{directory}/modules.alias", "".join(f"{a}\n" for a in aliases).encode()),
    ]


def _closure(module: Module, by_name: Mapping[str, Module]) -> list[str]:
    """All that it needs, the nearest first, as depmod writes them."""
    found: list[str] = []
    queue = module.depends()
    while queue:
        name = queue.pop(0)
        if name in by_name:
            if name in found:
                found.remove(name)
            found.append(name)
            queue += by_name[name].depends()
    return found


def _name(text: str) -> str:
    return text.replace("-", "_")
