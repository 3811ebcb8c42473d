"""Measure: benchmarks and generated suites over policies, scored, resumable, with honest statistics."""
