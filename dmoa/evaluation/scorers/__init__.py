"""Scorers: from a reply and a label to a score."""
