"""How many examples a property test tries: few at every change, all that it names with `--hypothesis-profile=accept`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FEW = 25

# No test judges a time: a busy machine must not fail one.
for name, number in (("dmoa", FEW), ("accept", 100)):
    settings.register_profile(name, deadline=None, max_examples=number, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dmoa")


def is_all() -> bool:
    """Whether this run tries all examples that tests name."""
    return settings.get_current_profile_name() == "accept"


def examples(number: int) -> int:
    """Return how many examples of `number` this run tries; read when the tests are collected."""
    return number if is_all() else min(number, FEW)
