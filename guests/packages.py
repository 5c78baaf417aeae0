"""Files out of a Debian or Ubuntu system's packages, without installing anything or being root.

The packages are downloaded by apt, which checks their signatures.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from guests import cpio

_MEMBER_LIMIT = 256 << 20
_LIBRARY = re.compile(r"(usr/)?lib(64|/[a-z0-9_]+-linux-gnu)?/[^/]+\.so[^/]*")
_NOT_NEEDED = re.compile(r"usr/share/(doc|man|info|locale|lintian|bug)/.*")


class GuestError(Exception):
    """The guest cannot be made ready; the text says why and what helps."""


def check_tools() -> None:
    """See that this is a system with packages.

    Raises:
        GuestError: it is not.
    """
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise GuestError(
                f"there is no {tool} here: this needs a Debian or Ubuntu system. Elsewhere give "
                "`python -m vmm boot` any x86-64 kernel, and copy an initramfs from such a system"
            )


def find(candidates: Sequence[str], real: str) -> str:
    """The first candidate that apt knows, or what it depends on if it is only a name for that.

    Args:
        real: pattern of the names of packages that hold files.

    Raises:
        GuestError: apt knows none of them.
    """
    foreign = run("dpkg", "--print-architecture").strip() != "amd64"
    for candidate in candidates:
        name = f"{candidate}:amd64" if foreign and ":" not in candidate else candidate
        if re.match(real, name):
            if "Package:" in run("apt-cache", "show", "--no-all-versions", name, check=False):
                return name
            continue
        found = [each for each in depends(name) if re.match(real, each)]
        if found:
            return found[0]
    hint = "dpkg --add-architecture amd64 && apt-get update" if foreign else "apt-get update"
    raise GuestError(f"apt knows no package {' or '.join(candidates)}; as root: {hint}")


def depends(name: str) -> list[str]:
    """The packages that one depends on, as apt lists them; none if apt does not know it."""
    found = []
    for line in run("apt-cache", "depends", name, check=False).splitlines():
        kind, _, dependency = line.strip(" |").partition(": ")
        if kind in ("Depends", "PreDepends"):
            found.append(dependency)
    return found


def libraries(name: str) -> list[str]:
    """The packages with the shared libraries that one needs, those of libraries included."""
    found: dict[str, None] = {}
    wanted = [name]
    while wanted:
        for dependency in depends(wanted.pop()):
            # What a package needs beside libraries are programs for its installation.
            if re.match("z?lib", dependency) and dependency not in found:
                found[dependency] = None
                wanted.append(dependency)
    return list(found)


class Package:
    """A downloaded package.

    Attributes:
        version: as dpkg writes it.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.version = run("dpkg-deb", "--field", str(file), "Version").strip()
        self._file = file

    def members(self, pattern: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Files and symbolic links whose whole name matches, the name without a leading ``./``.

        Raises:
            GuestError: the package is damaged.
        """
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(self._file)], stdout=subprocess.PIPE
        ) as process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    for info in archive:
                        info.name = info.name.removeprefix("./")
                        if not re.fullmatch(pattern, info.name):
                            continue
                        if info.isfile():
                            file = archive.extractfile(info)
                            assert file is not None
                            yield info, file.read(_MEMBER_LIMIT)
                        elif info.issym():
                            yield info, b""
            except (tarfile.TarError, EOFError) as error:
                raise GuestError(f"{self._file.name} is damaged: {error}") from error
            finally:
                process.kill()

    def entries(self, *, libraries_only: bool) -> list[cpio.Entry]:
        """What a root file system gets of it: all but documentation, or only shared libraries."""
        entries = []
        for info, data in self.members(r".*"):
            wanted = (
                _LIBRARY.fullmatch(info.name)
                if libraries_only
                else not _NOT_NEEDED.fullmatch(info.name)
            )
            if wanted and info.issym():
                entries.append(cpio.symlink(info.name, info.linkname))
            elif wanted:
                entries.append(cpio.file(info.name, data, info.mode & 0o777))
        return entries


def download(name: str, directory: Path) -> Package:
    """Fetch a package into `directory`, which is empty.

    Raises:
        GuestError: apt could not.
    """
    # The sandbox user of apt may not be allowed into the directory; only root has one.
    run("apt-get", "--quiet", "-o", "APT::Sandbox::User=root", "download", name, cwd=directory)
    packages = list(directory.glob("*.deb"))
    if len(packages) != 1:
        raise GuestError(f"apt-get download {name} left {len(packages)} packages, not one")
    return Package(name, packages[0])


def work_directory(beside: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary one on the file system that is known to have room."""
    return tempfile.TemporaryDirectory(prefix=".packages-", dir=beside)


def run(*command: str, check: bool = True, cwd: Path | None = None) -> str:
    """What a command prints, in the C locale.

    Raises:
        GuestError: it failed; without `check` it then printed nothing.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise GuestError(f"{' '.join(command)}: {reason[-1]}")
    return done.stdout if done.returncode == 0 else ""
