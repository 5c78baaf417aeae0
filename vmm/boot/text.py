"""Texts that a boot protocol passes to a guest."""

from __future__ import annotations

from devices.errors import UserError


def c_string(what: str, text: str) -> bytes:
    """`text` as a guest reads it: UTF-8 and a NUL; `what` names it in messages.

    Raises:
        UserError: it cannot be encoded, or holds a NUL itself.
    """
    try:
        # What came from the host's command line as bytes goes on as the same bytes.
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not text: {error.reason}") from error
    if b"\0" in encoded:
        raise UserError(f"{what} holds a NUL character, where the guest would take it to end")
    return encoded + b"\0"
