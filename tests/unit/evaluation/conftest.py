"""Fixtures of the evaluation tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[4] / "shared"


@pytest.fixture(scope="session")
def rows_dir() -> Path:
    """The folder of real benchmark rows. Where it is absent the test is skipped, but fails in CI that has data for its clone."""
    folder = Path(os.environ.get("DMOA_BENCHMARK_ROWS", SHARED / "benchmarks"))
    if not folder.is_dir():
        if "CI" in os.environ and SHARED.is_dir():
            pytest.fail(f"the benchmark rows are missing in {SHARED}")
        pytest.skip("benchmark rows are not part of a clone; DMOA_BENCHMARK_ROWS may name their folder")
    return folder
