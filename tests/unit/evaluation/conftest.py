"""Fixtures of the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.real_rows import find_rows


@pytest.fixture(scope="session")
def rows_dir() -> Path:
    """The folder of real benchmark rows. Where one is missing tests are skipped; in CI with data beside its clone they fail."""
    folder, lacks, is_wrong = find_rows()
    if is_wrong:
        pytest.fail(lacks)
    if lacks:
        pytest.skip(lacks)
    return folder
