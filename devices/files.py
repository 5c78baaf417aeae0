"""Options of a model that name a file or directory of the host.

The machine opens it, because the device's process can open nothing, and hands it over as
``host.fds[option]``. An option whose text is empty opens nothing, and its name is not in ``fds``.

    @dataclass(frozen=True)
    class DiskOptions:
        file: Annotated[str, HostFile(read_only_if="readonly")]
        readonly: bool = False
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class HostFile:
    """What is opened, and how.

    Attributes:
        directory: a directory: the only one of a device, which becomes the root of its jail. Else a
            regular file or block device.
        writable: open it for reading and writing. A file that is written has no other user at the
            same time, one that is read no writer. In a directory it is what may be done in it.
        read_only_if: an option of the model (true or false): if true, it is not writable.
        direct_if: the same: if true, open it with O_DIRECT.
        output: the device writes it for people and never reads it. It is made if it is not there,
            and begins empty. It is no part of the machine, so a snapshot does not keep it and a
            restored machine goes on with the file itself.
        unit: not 0: its size in bytes must be a multiple of this, and not 0.
    """

    directory: bool = False
    writable: bool = True
    read_only_if: str = ""
    direct_if: str = ""
    output: bool = False
    unit: int = 0

    def may_write(self, options: object) -> bool:
        """Whether it is writable with these options of its model."""
        return self.writable and not (self.read_only_if and getattr(options, self.read_only_if))


@dataclass(frozen=True)
class HostLink:
    """The option names what a device is connected to, and `fds` has its end of that.

    Attributes:
        kind: "network": what a network card is plugged into, see `devices.virtio.link`;
            "sockets": the path of UNIX sockets, see `devices.virtio.vsock.link`.
    """

    kind: Literal["network", "sockets"] = "network"


@dataclass(frozen=True)
class HostDetail:
    """The option says more of what another one names: it is the host's, too, and nothing that the
    guest knows of.

    Attributes:
        of: that other one. If it changes, what was said of the old one is dropped.
    """

    of: str = ""


def host_options(options: type) -> frozenset[str]:
    """The options that say what a device has of the host, of a model's `Options`.

    A restored machine may have others there.
    """
    return frozenset(
        name for name, note in _notes(options) if isinstance(note, HostFile | HostLink | HostDetail)
    )


def host_details(options: type) -> dict[str, str]:
    """The options that say more of another one, with its name, of a model's `Options`."""
    return {name: note.of for name, note in _notes(options) if isinstance(note, HostDetail)}


def host_links(options: type) -> dict[str, HostLink]:
    """The options that name a link, by name, of a model's `Options`."""
    return {name: note for name, note in _notes(options) if isinstance(note, HostLink)}


def host_files(options: type) -> dict[str, HostFile]:
    """The options that name a file, by name, of a model's `Options`."""
    return {name: note for name, note in _notes(options) if isinstance(note, HostFile)}


def _notes(options: type) -> Iterator[tuple[str, object]]:
    hints = typing.get_type_hints(options, include_extras=True)
    for each in dataclasses.fields(options):
        for note in getattr(hints[each.name], "__metadata__", ()):
            yield each.name, note


def directories(options: object) -> dict[str, bool]:
    """The options that name a directory, of a model's options, and whether each is writable."""
    found = host_files(type(options)).items()
    return {name: file.may_write(options) for name, file in found if file.directory}
