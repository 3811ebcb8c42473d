"""The `dmoa` command: one short file per group of commands."""
