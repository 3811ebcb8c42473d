"""Settings that must be made before torch is loaded, for property tests on a busy machine, and for tests on two processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

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


class _RayInOneProcess(LoadFileScheduling):
    """Deals out files of tests; those that start a Ray go to one process, where they run one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/integration/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Have `--numprocesses` deal out tests as above; `--no-loadscope-reorder` keeps the order of the command line."""
    return _RayInOneProcess(config, log)
