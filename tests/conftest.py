"""Settings that must be made before torch is loaded, and for property tests on a busy machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow everything some thirty times on a busy machine

# No test judges a time: a busy machine must not fail one.
settings.register_profile("dmoa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dmoa")


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """Leave dmoa's logger as it was: commands set its level for their whole process."""
    logger = logging.getLogger("dmoa")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
