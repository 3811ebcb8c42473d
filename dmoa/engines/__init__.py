"""Engines: what generates an agent's replies."""
