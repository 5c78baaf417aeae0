"""Files that the user names: read whole, but not without bound."""

from __future__ import annotations

import os
import stat

from devices.errors import Subject, UserError, concerning

REGULAR = 1 << 30
"""The most bytes of a file; kernels with their debugging information have some hundred MiB."""
STREAM = 256 << 20
"""The most bytes of what has no size beforehand: pipes, terminals, /dev/zero."""
_CHUNK = 1 << 20


def read_file(path: str, what: str, index: int = 0) -> bytes:
    """The whole content.

    Args:
        what: the option that names it: "image", "module".
        index: which of its values does.

    Raises:
        UserError: it cannot be read, or is larger than `REGULAR` or `STREAM`.
    """
    with concerning(Subject(what, index=index)):
        return _read(path, what)


def _read(path: str, what: str) -> bytes:
    if not path:
        raise UserError(f"the name of the {what} is empty")
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            regular = stat.S_ISREG(status.st_mode)
            limit = REGULAR if regular else STREAM
            data = bytearray()
            while len(data) <= limit and status.st_size <= REGULAR:
                chunk = file.read(_CHUNK)
                if not chunk:
                    return bytes(data)
                data += chunk
    except IsADirectoryError:
        raise UserError(f"{what} {path}: is a directory, and a file is wanted") from None
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from error
    raise UserError(f"{what} {path}: more than {limit >> 20} MiB")
