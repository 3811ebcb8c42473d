"""The `dmoa` command: one file per group of commands."""
