"""The files of the host that devices' options name (`devices.files`), from start to snapshot.

They are opened and checked here, because a device's process can open nothing. The machine keeps a
descriptor of its own, for reading: a snapshot has the content of every file that a device can
write, so that memory and disk fit together however often it is restored, and references to the
others. Directories, and files that devices only write (logs), are no part of the machine.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from devices import registry
from devices.contract import Device
from devices.errors import Subject, concerning
from devices.files import HostFile, host_files
from proxy.tube import close_all
from vmm import disks
from vmm.config import DeviceConfig
from vmm.opening import HostFileError, check_rights, describe, flags_for, open_file
from vmm.snapshot import FileIdentity, SavedDisk

_EXPLAIN = dict.fromkeys(
    (errno.ENOSPC, errno.EFBIG), "; --snapshot-disks none leaves the content of disks out"
)


class DiskKeeping(enum.StrEnum):
    """What a snapshot keeps of files that devices write: their content, or where they are."""

    COPY = "copy"
    NONE = "none"


class DiskUse(enum.StrEnum):
    """On what disks a restored machine runs.

    PRIVATE: on copies of what the snapshot has, which end with the machine, so that it can be
    restored any number of times, also side by side. ORIGINAL: on the files themselves, which must
    still be as they were then.
    """

    PRIVATE = "private"
    ORIGINAL = "original"


DiskProgress = Callable[[str, int, int], None]
"""Called with a disk's name, bytes done and their total every now and then; may raise to end it."""


@dataclass
class _Used:
    """A file that a device has: the machine's descriptor of it, for reading."""

    name: str
    path: str
    fd: int
    writable: bool
    private: bool = False

    @property
    def subject(self) -> Subject:
        device, _, option = self.name.rpartition(".")
        return Subject(option, device)


@dataclass(frozen=True)
class SavedFiles:
    """What a snapshot has of the files of its machine.

    Attributes:
        snapshot: its directory.
        disks: by name, what its manifest says.
        use: what the restored machine gets.
        progress: hears of what takes time.
    """

    snapshot: Path
    disks: Mapping[str, SavedDisk]
    use: DiskUse
    progress: DiskProgress = lambda _name, _done, _of: None


class HostFiles:
    """The files that the devices of one machine use.

    Args:
        saved: None: the machine does not come from a snapshot.

    Attributes:
        notes: lines for the user on what the guest's disks are.
        held: by device name: each option with what its descriptor is, in words.
    """

    def __init__(self, saved: SavedFiles | None = None) -> None:
        self.notes: list[str] = []
        self.held: dict[str, list[str]] = {}
        self._saved = saved
        self._used: list[_Used] = []
        self._outputs: list[_Used] = []
        """Files that devices only write: they are no part of a snapshot."""
        self._fresh: list[int] = []
        """Descriptors of what is empty when the machine begins to run."""

    def open(self, device: DeviceConfig, kind: type[Device]) -> dict[str, int]:
        """The descriptors for a device, by option; the caller owns them.

        Raises:
            HostFileError: one cannot be opened, is of the wrong kind, is in use by somebody else,
                or is not what the snapshot says.
        """
        wanted = host_files(kind.Options)
        if not wanted:
            return {}
        options = registry.parse_options(kind, device.options)
        opened: dict[str, int] = {}
        try:
            for option, file in wanted.items():
                path = getattr(options, option)
                if path:
                    where = f"device '{device.name}': {option.replace('_', '-')}={path}"
                    flags = flags_for(file, options)
                    name = f"{device.name}.{option}"
                    movable = device.name if file.directory or file.output else ""
                    with concerning(Subject(option, device.name)):
                        with self.naming_snapshot(movable):
                            opened[option] = self._open(name, path, file, flags, where)
                        if file.directory and device.isolated and os.geteuid() == 0:
                            check_rights(opened[option], file.may_write(options), where)
        except BaseException:
            close_all(list(opened.values()))
            raise
        for option, fd in opened.items():
            self.hold(device.name, option, fd, wanted[option].may_write(options))
        return opened

    @contextlib.contextmanager
    def naming_snapshot(self, movable: str = "") -> Iterator[None]:
        """What cannot be had in here is missed by the snapshot, if the machine is from one; the
        device `movable` may have something else instead."""
        try:
            yield
        except HostFileError as error:
            if self._saved is None:
                raise
            mend = movable and f"; restore --device {movable},OPTION=VALUE gives another place"
            problem = f"snapshot {self._saved.snapshot}: {error}{mend}"
            raise HostFileError(problem, *error.about) from error

    def hold(self, device: str, option: str, fd: int, writable: bool = True) -> None:
        """Note that a device has this descriptor."""
        self.held.setdefault(device, []).append(f"{option} ({describe(fd, writable)})")

    def _open(self, name: str, path: str, file: HostFile, flags: int, where: str) -> int:
        if file.directory:
            return open_file(path, file, flags, where)
        if file.output:
            return self._open_output(_Used(name, path, -1, True), file, flags, where)
        used = _Used(name, path, -1, flags & os.O_ACCMODE != os.O_RDONLY)
        record = None
        if self._saved is not None:
            record = self._saved.disks.get(name)
            if record is None:
                raise HostFileError(f"{where}: the snapshot says nothing of it")
            used.private = used.writable and self._saved.use is DiskUse.PRIVATE
        if used.private:
            fd = self._private(used, file, flags, where)
        else:
            self._refuse_twice(used, where)
            fd = open_file(path, file, flags, where)
        try:
            if record is not None and not used.private:
                _check_unchanged(fd, record, where)
            used.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(fd)
            raise
        self._used.append(used)
        return fd

    def _open_output(self, used: _Used, file: HostFile, flags: int, where: str) -> int:
        self._refuse_twice(used, where)
        fd = open_file(used.path, file, flags, where)
        used.fd = os.dup(fd)
        self._outputs.append(used)
        if self._saved is None and stat.S_ISREG(os.fstat(fd).st_mode):
            self._fresh.append(used.fd)  # a restored machine goes on with it
        return fd

    def begin(self) -> None:
        """The machine runs: empty the files that devices only write; harmless when repeated.

        Not when they are opened: a start that is refused must lose nothing.
        """
        while self._fresh:
            os.ftruncate(self._fresh.pop(), 0)

    def user_of(self, path: str) -> Subject | None:
        """The device and option that has this file of the host."""
        with contextlib.suppress(OSError, ValueError):
            about = os.stat(path)
            for used in (*self._used, *self._outputs):
                if os.path.samestat(os.fstat(used.fd), about):
                    return used.subject
        return None

    def _refuse_twice(self, wanted: _Used, where: str) -> None:
        """One file for two devices: say so, instead of blaming another machine for the lock."""
        with contextlib.suppress(OSError, ValueError):
            about = os.stat(wanted.path)
            for used in (*self._used, *self._outputs):
                alone = wanted.writable or used.writable
                if alone and os.path.samestat(os.fstat(used.fd), about):
                    raise HostFileError(
                        f"{where}: is given twice: device '{used.subject.device}' has it, too; "
                        "give each a file of its own, or both read-only",
                        wanted.subject,
                        used.subject,
                    )

    def _private(self, used: _Used, file: HostFile, flags: int, where: str) -> int:
        """A file of this machine's own with the content that the disk had."""
        assert self._saved is not None
        record = self._saved.disks[used.name]
        if record.copy is None:
            source = open_file(used.path, file, flags & ~os.O_ACCMODE & ~os.O_DIRECT, where)
            beside = Path(used.path).parent
        else:
            beside = self._saved.snapshot / "disks"
            source = _open_copy(beside / used.name, where)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, source)
            if record.copy is None:
                _check_unchanged(source, record, where)
            else:
                _check_copy(source, record, f"{where}: {beside / used.name}")
            try:
                target = disks.private_file(beside)
                stack.callback(os.close, target)
                tell = partial(self._saved.progress, used.name)
                how = disks.transfer(source, target, tell, digested=False)
                own = flags & (os.O_ACCMODE | os.O_DIRECT | os.O_CLOEXEC)
                fd = os.open(f"/proc/self/fd/{target}", own)
            except OSError as error:
                raise HostFileError(f"{where}: its private copy: {error.strerror}") from error
        end = "what the guest writes there ends with this machine"
        self.notes.append(f"disk {used.name}: {how} from the snapshot; {end}")
        return fd

    def keep(
        self, directory: Path, keeping: DiskKeeping, progress: DiskProgress
    ) -> tuple[dict[str, SavedDisk], list[str]]:
        """Save what a snapshot keeps of the files, while the devices are asleep.

        Returns:
            What to say of each in the manifest, by name, and in words to the user.

        Raises:
            HostFileError: one cannot be kept.
        """
        found, lines = {}, []
        for used in self._used:
            where = f"disk {used.name} ({used.path})"
            try:
                found[used.name], text = _keep(used, directory, keeping, progress)
            except OSError as error:
                reason = f"{error.strerror or error}{_EXPLAIN.get(error.errno or 0, '')}"
                raise HostFileError(f"{where}: {reason}") from error
            lines.append(f"disk {used.name}: {text}")
        return found, lines

    def close(self) -> None:
        """Release the machine's own descriptors; harmless when repeated."""
        used, self._used, self._outputs = [*self._used, *self._outputs], [], []
        self._fresh.clear()
        close_all([each.fd for each in used])


def _keep(
    used: _Used, directory: Path, keeping: DiskKeeping, progress: DiskProgress
) -> tuple[SavedDisk, str]:
    original = FileIdentity.of(used.fd)
    if not used.writable:
        return SavedDisk(original), f"read-only; a restore needs {used.path} as it is"
    if keeping is DiskKeeping.NONE:
        if used.private:
            raise OSError(errno.EINVAL, "it ends with this machine: only a snapshot can keep it")
        return SavedDisk(original), f"left out; a restore needs {used.path} as it is now"
    fd = os.open(directory / used.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        how = disks.transfer(used.fd, fd, partial(progress, used.name))
        os.fsync(fd)
        return SavedDisk(original, FileIdentity.of(fd), how.sha256), str(how)
    finally:
        os.close(fd)


# What a snapshot says of a file.


def _check_unchanged(fd: int, record: SavedDisk, where: str) -> None:
    if (here := FileIdentity.of(fd)) == record.original:
        return
    mend = "; the snapshot has the content: leave --disks original out"
    raise HostFileError(
        f"{where}: has changed since the snapshot: {_words(record.original)} then, "
        f"{_words(here)} now{mend if record.copy else ''}"
    )


def _open_copy(path: Path, where: str) -> int:
    try:
        fd = os.open(path, os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise HostFileError(f"{where}: {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise HostFileError(f"{where}: {path}: is not a file")
    return fd


def _check_copy(fd: int, record: SavedDisk, where: str) -> None:
    """Untouched by size and time; a copy of the snapshot with other times, by its content."""
    assert record.copy is not None
    if (here := FileIdentity.of(fd)) == record.copy:
        return
    if here.size != record.copy.size:
        raise HostFileError(f"{where} has {here.size} bytes instead of {record.copy.size}")
    if not record.sha256:
        raise HostFileError(
            f"{where} was written {_time(here)} and not {_time(record.copy)}, as the snapshot "
            "says: copy snapshots with their times (cp -a)"
        )
    if disks.digest(fd) != record.sha256:
        raise HostFileError(f"{where} is damaged: its checksum does not match")


def _words(identity: FileIdentity) -> str:
    written = f", written {_time(identity)}" if identity.written else ""
    return f"{identity.size} bytes{written}"


def _time(identity: FileIdentity) -> str:
    seconds, rest = divmod(identity.written, 1_000_000_000)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09} UTC"
    except (OverflowError, ValueError, OSError):
        return f"at {identity.written} ns"
