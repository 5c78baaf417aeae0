"""What an idle Linux costs the host that drives every kind of device at once.

The machine, its devices' processes and passt together; the guest waits at its prompt.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep

from vmm.bench import linux
from vmm.network.user import find_program

SETTLE, SECONDS = 4.0, 10.0
_IMAGE = 16 << 20


def command(directory: Path, files: Path) -> list[str]:
    """How it is started, with what its devices need in `files`."""
    found = linux.commands(directory)["vmm"]
    for name in ("virtio.img", "ide.img"):
        with (files / name).open("wb") as image:
            image.truncate(_IMAGE)
    (files / "shared").mkdir()
    found += ["--disk", f"{files}/virtio.img", "--disk", f"{files}/ide.img,if=ide"]
    found += ["--net", "user" if find_program() else "none"]
    for device in ("rng", "console", "balloon", "pvpanic"):
        found += ["--device", device]
    found += [
        "--device",
        f"9p,path={files}/shared,readonly=true",
        "--device",
        f"vsock,path={files}/vsock",
    ]
    return found


def measure(directory: Path) -> float:
    """CPU time in percent of the wall time.

    Raises:
        UserError: there is no Linux guest in `directory`, or it does not come up.
    """
    with (
        tempfile.TemporaryDirectory(prefix="vmm-bench-") as files,
        closing(linux.Shell(command(directory, Path(files)))) as shell,
    ):
        shell.wait_for(linux.PROMPT)
        sleep(SETTLE)
        pids = _family(shell.pid)
        began, before = monotonic(), _cpu_seconds(pids)
        sleep(SECONDS)
        return 100 * (_cpu_seconds(pids) - before) / (monotonic() - began)


def _family(ancestor: int) -> list[int]:
    """A process, its children, theirs and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                parents[int(entry.name)] = int(fields[1])
    family = [ancestor]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def _cpu_seconds(pids: list[int]) -> float:
    """In user and kernel mode together."""
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in map(_stat, pids) if fields)
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """From the state on (proc(5), /proc/pid/stat); nothing for one that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []
