"""What firmware would have told the guest: ACPI tables, the MP table, fw_cfg items."""
