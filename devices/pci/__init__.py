"""PCI: configuration space, functions and the host bridge."""
