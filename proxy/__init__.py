"""Device processes: messages, sessions, tubes, jails, the child loop, the warden, the proxy.

This room knows `devices`. It knows nothing of the CPU, the memory layout, boot or snapshot files.
"""
