"""Sockets between the guest and programs of the host (virtio 1.2, 5.10).

`packet` is the format, `stream` one connection, `greeting` how the host begins one, `link` what the
machine does for the device, and `device` the virtio device.
"""
