"""The machine: CPU engine, guest memory, boot loaders, snapshot files, control, command line."""
