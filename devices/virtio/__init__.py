"""virtio 1.2: the transport and the rings (one library), and the devices built on it.

Section numbers in this package are those of "Virtual I/O Device (VIRTIO) Version 1.2" (OASIS).
"""
