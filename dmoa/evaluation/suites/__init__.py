"""The built-in suites: seeded generators with unlimited rows, always labelled as generated."""
