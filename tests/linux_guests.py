"""Linux guests by what is in them: two can be made ready, see CONTRIBUTING.md."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

MAKE_IT = (
    "run 'python -m guests.linux --kernel linux-image-amd64 --with socat DIR' "
    "and set VMM_TEST_LINUX_FULL=DIR"
)


def find_guest(*needed: bytes) -> Path | None:
    """The directory of a guest whose initramfs has all of these names in it."""
    for name in ("VMM_TEST_LINUX_FULL", "VMM_TEST_LINUX"):
        directory = os.environ.get(name)
        initramfs = Path(directory or "/none") / "initramfs.cpio.gz"
        if initramfs.exists():
            data = gzip.decompress(initramfs.read_bytes())
            if all(each in data for each in needed):
                return Path(directory or "")
    return None
