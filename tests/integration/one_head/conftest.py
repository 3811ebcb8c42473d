"""One Ray head for all tests of commands in this folder, which join it by RAY_ADDRESS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.head import Head, joined, running_head


@pytest.fixture(scope="package", autouse=True)
def head() -> Iterator[Head]:
    """The head."""
    with running_head() as found, joined(found):
        yield found
