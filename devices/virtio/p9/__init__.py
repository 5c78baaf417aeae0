"""A host directory for the guest: 9P2000.L over virtio.

`messages` and `codec` are the protocol without any I/O, `tree` reaches files beneath one directory,
`session` does what requests ask, `device` is the virtio device.
"""
