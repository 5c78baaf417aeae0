"""What every test starts from."""

from __future__ import annotations

import signal

# A runner started with nohup ignores SIGHUP, and so would every process that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
