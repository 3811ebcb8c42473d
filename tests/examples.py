"""How many examples a property test tries: few at every change, all that it names with `--hypothesis-profile=accept`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FEW = 25

# No test judges a time: a busy machine must not fail one. How much a strategy filters is judged where all examples are tried:
# among few it is a matter of luck.
settings.register_profile(
    "dmoa", deadline=None, max_examples=FEW, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
settings.register_profile("accept", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dmoa")


def is_all() -> bool:
    """Whether this run tries all examples that tests name."""
    return settings.get_current_profile_name() == "accept"


def examples(number: int) -> int:
    """Return how many examples of `number` this run tries; read when the tests are collected."""
    return number if is_all() else min(number, FEW)
