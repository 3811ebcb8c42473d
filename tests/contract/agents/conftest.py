"""The embedded model and its engine, as the unit tests have them."""

from tests.unit.agents.conftest import smollm2, smollm2_adapters, smollm2_engine

__all__ = ["smollm2", "smollm2_adapters", "smollm2_engine"]
