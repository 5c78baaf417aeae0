"""What a user may set of a socket device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from devices.errors import OptionError
from devices.files import HostLink

LOWEST_CID, HIGHEST_CID = 3, 0xFFFF_FFFE
"""5.10.4: the others are reserved."""
LONGEST_PATH = 96
"""Of 107 bytes that the path of a UNIX socket may have, a port and "_" take 11."""


@dataclass
class VsockOptions:
    """A socket device.

    Attributes:
        path: of the UNIX socket to which programs of the host connect; those on which they listen
            for the guest have the same path with _PORT after it.
        cid: the guest's address, from 3 on.
    """

    path: Annotated[str, HostLink("sockets")] = ""
    cid: int = 3

    def __post_init__(self) -> None:
        if not self.path:
            raise OptionError(
                "path=SOCKET is needed: the UNIX socket that leads to the guest", "path"
            )
        if len(os.fsencode(self.path)) > LONGEST_PATH or "\0" in self.path:
            raise OptionError(
                f"path has at most {LONGEST_PATH} bytes: those of UNIX sockets are short", "path"
            )
        if not LOWEST_CID <= self.cid <= HIGHEST_CID:
            raise OptionError(f"cid is {LOWEST_CID} to {HIGHEST_CID:#x}", "cid")
