"""The one directory of the host that a device may have: all that its jail leaves of files.

With a mount namespace it becomes the root directory, so that there is nothing else: no path, no
"..", no symbolic link and no race leads to what the process cannot name. Landlock permits it, and
where there is no mount namespace Landlock alone keeps to it: nothing else can be opened, listed or
changed then, but whether another file is there, its size and its times can be found out.

The directory comes as a descriptor, and its name is never looked up: the process stands in it when
its mount namespace is made, and so is in the copy of it afterwards.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from proxy.jail import linux
from proxy.jail.plan import JailError


@dataclass(frozen=True)
class SharedDirectory:
    """A directory.

    Attributes:
        fd: of it, among the descriptors that are kept. In a root of its own it is replaced by one
            of that root, because "beneath" the one that came from outside there is also "above".
        writable: whether anything in it may be changed.
    """

    fd: int
    writable: bool

    def owner(self) -> tuple[int, int] | None:
        """The user and group that the device is, if root starts it: never root; None: nobody."""
        about = os.fstat(self.fd)
        return (about.st_uid, about.st_gid or about.st_uid) if about.st_uid else None

    def landlock_rights(self) -> int:
        """What Landlock permits beneath it; no program is run and no device node made."""
        return linux.LANDLOCK_READ | (linux.LANDLOCK_WRITE if self.writable else 0)

    def make_root(self, place: str) -> str:
        """Become the root directory, by way of a mount at `place`; the working directory is it.

        Mounts beneath it come along. Returns the evidence.

        Raises:
            OSError, JailError: it could not be done, or does not hold.
        """
        about = os.fstat(self.fd)
        linux.mount(".", place, None, linux.MS_BIND | linux.MS_REC, None)
        attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC
        if not self.writable:
            attributes |= linux.MOUNT_ATTR_RDONLY
        os.chdir(place)
        linux.mount_setattr(".", attributes)
        linux.pivot_root(".", ".")
        linux.umount2(".", linux.MNT_DETACH)
        os.chdir("/")
        own = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        os.dup2(own, self.fd, inheritable=False)
        os.close(own)
        return self._verify_root(about)

    def _verify_root(self, about: os.stat_result) -> str:
        for path in ("/", "/..", "/../.."):
            if not os.path.samestat(os.stat(path), about):
                raise JailError("root", f"{path} is not the shared directory")
        for path in ("..", "../.."):
            if not os.path.samestat(os.stat(path, dir_fd=self.fd), about):
                raise JailError("root", f"{path} of its descriptor is not the shared directory")
        flags = os.fstatvfs(self.fd).f_flag
        wanted = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
        if flags & wanted != wanted:
            raise JailError("root", "the shared directory has programs or devices")
        if self.writable:
            return "the shared directory, read and write"
        try:
            os.close(os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o600, dir_fd=self.fd))
        except OSError as error:
            if error.errno == errno.EROFS:
                return "the shared directory; create: read-only"
        raise JailError("root", "the shared directory is not read-only")

    def verify_landlock(self) -> str:
        """Something that it does not permit here, tried; the evidence.

        Raises:
            OSError, JailError: it could not be tried, or was permitted.
        """
        root = os.stat("/")
        if not os.path.samestat(root, os.fstat(self.fd)):
            # There is more than the directory.
            try:
                os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
            except PermissionError:
                return "files but the shared directory's"
            raise JailError("landlock", "the root directory could be opened")
        if self.writable:
            # What needs no privilege otherwise: a device node 0:0, the mark of an overlay.
            name = ".landlock-probe"
            try:
                os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.fd)
            except OSError:
                pass
            else:
                os.unlink(name, dir_fd=self.fd)
                raise JailError("landlock", "a device node could be made")
        return "files but the shared directory's"
