"""What ``python -m vmm bench`` measures; see `vmm.cli.bench` for how it is told."""
