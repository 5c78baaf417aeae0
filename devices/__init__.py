"""Device models and the contracts they keep.

This room knows the bus and its ranges, device contracts, register tables and the models. It knows
nothing of processes, sockets, jails or the CPU engine.
"""
