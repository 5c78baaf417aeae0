"""The vCPU. `vmm.cpu.engine` alone imports Unicorn; everything above speaks of registers."""
