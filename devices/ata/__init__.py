"""An ATA disk controller: two channels, each with up to two drives, and bus-master DMA.

- `controller`: the PCI function and where its registers are;
- `channel`: one cable: which drive answers, the interrupt;
- `drive`, `transfers`, `drive_state`: one drive: its registers and commands;
- `bus_master`: DMA between a drive and guest memory.
"""
