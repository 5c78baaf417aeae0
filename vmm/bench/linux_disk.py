"""A disk from inside Linux, ours beside QEMU's TCG: virtio-blk, the same kernel, an image each.

The image lies in the host's page cache, so what is measured is the way there. `dd` goes past the
guest's own cache (O_DIRECT): 64 MiB in requests of 1 MiB, and 4 KiB at a time, where each read
waits for the one before: that is the latency of one request as the guest has it. Where on the
disk it lies makes no difference to either. (`disk` measures the device alone.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from vmm.bench import linux

SIZE = 64 << 20
SMALL, SMALL_COUNT = 4096, 8192
WORK: Mapping[str, tuple[str, str]] = {
    "sequential read": ("dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct", "MiB/s"),
    "sequential write": (
        "dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct conv=fsync",
        "MiB/s",
    ),
    "4 KiB reads": (
        f"dd if=/dev/vda of=/dev/null bs={SMALL} count={SMALL_COUNT} iflag=direct",
        "us",
    ),
}
"""What the guest does, and in what its figure is."""


def commands(directory: Path, images: Path) -> dict[str, list[str]]:
    """How each is started, with an image of its own in `images`."""
    found = linux.commands(directory)
    for name, command in found.items():
        image = images / f"{name}.img"
        with image.open("wb") as file:
            for _ in range(SIZE >> 20):
                file.write(bytes(1 << 20))  # no holes: they would be read from nowhere
        if name == "qemu":
            drive = f"file={image},format=raw,if=none,id=disk,cache=writeback"
            command += ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
        else:
            command += ["--disk", str(image)]
    return found


def measure(directory: Path) -> dict[str, float]:
    """One round of everything there is; with QEMU also the ratios of speed.

    Raises:
        UserError: there is no Linux guest in `directory`, or it does not come up.
    """
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vmm-bench-") as images:
        for name, command in commands(directory, Path(images)).items():
            with closing(linux.Shell(command)) as shell:
                shell.wait_for(linux.PROMPT)
                for work, _ in WORK.values():
                    shell.seconds_for(f"{work} count=8 2>/dev/null")  # code is translated once
                for what, (work, unit) in WORK.items():
                    seconds = shell.seconds_for(f"{work} 2>/dev/null")
                    figures[f"{name} {what}"] = _figure(seconds, unit)
    for what, (_, unit) in WORK.items():
        if f"qemu {what}" in figures:
            ours, theirs = figures[f"vmm {what}"], figures[f"qemu {what}"]
            figures[f"ratio {what}"] = theirs / ours if unit == "us" else ours / theirs
    return figures


def _figure(seconds: float, unit: str) -> float:
    return seconds / SMALL_COUNT * 1e6 if unit == "us" else (SIZE >> 20) / seconds
