"""``python -m vmm``: see `vmm.cli`."""

from __future__ import annotations

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the command line takes it: end silently, without a traceback out of some import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from vmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
