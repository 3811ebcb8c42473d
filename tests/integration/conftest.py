"""One Ray head for all tests of this folder, which join it by RAY_ADDRESS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.head import Head, alone, joined, running_head


@pytest.fixture(scope="package", autouse=True)
def head() -> Iterator[Head]:
    """The head."""
    with running_head() as found, joined(found):
        yield found


@pytest.fixture
def own_ray() -> Iterator[None]:
    """Have the commands of one test start a Ray of their own, as they do where there is none to join."""
    with alone():
        yield
