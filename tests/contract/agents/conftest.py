"""The models and engines of the tests of agents."""

from tests.unit.agents.conftest import smollm2, smollm2_adapters, smollm2_engine, tiny_adapters, tiny_engine, tiny_model

__all__ = ["smollm2", "smollm2_adapters", "smollm2_engine", "tiny_adapters", "tiny_engine", "tiny_model"]
