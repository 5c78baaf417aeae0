"""Small guest programs: source and built image side by side, rebuilt by ``make -C guests``."""
