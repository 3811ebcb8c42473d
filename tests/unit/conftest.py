"""What every process of unit tests has before its first test: it takes seconds that are no test's own."""

from __future__ import annotations

import pytest
from hypothesis import find
from hypothesis import strategies as st


@pytest.fixture(autouse=True, scope="session")
def _slow_beginnings() -> None:
    """Make the first optimizer, for which torch loads its compiler, and Hypothesis's tables of characters."""
    import torch  # not by the process that deals out tests, which reads this file too

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    find(st.from_regex("[a-z]"), lambda text: True)
