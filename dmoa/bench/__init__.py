"""Benches: one file per group of numbers."""
