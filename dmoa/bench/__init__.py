"""Benches: measured figures beside the bars they must reach, one file a subject."""
