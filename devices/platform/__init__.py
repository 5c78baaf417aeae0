"""The small devices of a PC that every guest probes for: clocks, keyboard, power, screen."""
