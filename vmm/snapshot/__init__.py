"""Snapshot directories: the format (`layout`), written atomically and read with suspicion.

Nothing in one is ever executed or unpickled; every number is checked before it is used.
"""

from vmm.snapshot.layout import (
    FORMAT,
    ConsoleState,
    Extent,
    FileIdentity,
    FileInfo,
    Manifest,
    SavedDisk,
    Snapshot,
)
from vmm.snapshot.reading import load, load_manifest
from vmm.snapshot.writing import check_place, save

__all__ = [
    "FORMAT",
    "ConsoleState",
    "Extent",
    "FileIdentity",
    "FileInfo",
    "Manifest",
    "SavedDisk",
    "Snapshot",
    "check_place",
    "load",
    "load_manifest",
    "save",
]
