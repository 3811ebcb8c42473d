"""Fixtures of the evaluation tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def rows_dir() -> Path:
    """The folder of real benchmark rows; the test is skipped where it is absent."""
    folder = Path(os.environ.get("DMOA_BENCHMARK_ROWS", ROOT.parent / "shared" / "benchmarks"))
    if not folder.is_dir():
        pytest.skip("benchmark rows are not part of a clone; DMOA_BENCHMARK_ROWS may name their folder")
    return folder
