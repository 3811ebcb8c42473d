"""The real benchmark rows, which are not part of a clone: which files there are, and where they may lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

REAL_ROWS: dict[str, dict[str, int]] = {
    "gsm8k": {"train": 500, "test": 1219},
    "multiarith": {"train": 420, "test": 144},
    "svamp": {"train": 700, "test": 240},
    "aqua_rat": {"validation": 254, "test": 204},
    "humaneval": {"train": 32, "test": 100},
    "ds1000": {"train": 200, "test": 700},
    "mmlu": {"dev": 285, "validation": 452, "test": 1900},
    "hotpotqa": {"train": 100, "validation": 400},
    "ddxplus": {"train": 98, "validation": 488},
}
"""Benchmark -> file -> its rows."""
_DDXPLUS = ("release_conditions.json", "release_evidences.json")
_WHOLE = ("README.md", *(f"ddxplus/{folder}{name}" for folder in ("", "original_fr/") for name in _DDXPLUS))
_ROWS = (*(f"{name}/{file}" for name, files in REAL_ROWS.items() for file in files), "ddxplus/original_fr/validation")
_PLACE = "DMOA_BENCHMARK_ROWS"
_SHARED = Path(__file__).parents[4] / "shared"


def missing_files(folder: Path) -> list[str]:
    """Return the files that a folder of real rows lacks; rows may be compressed."""
    rows = [name for name in _ROWS if not any((folder / f"{name}{end}").is_file() for end in (".jsonl", ".jsonl.gz"))]
    return [f"{name}.jsonl" for name in rows] + [name for name in _WHOLE if not (folder / name).is_file()]


def find_rows(environment: Mapping[str, str] = os.environ, shared: Path = _SHARED) -> tuple[Path, str, bool]:
    """Return the folder of real rows, what of it is missing, in words ("": nothing), and whether that is an error.

    It is one in CI, where the rows lie beside the clone: a check that is left out there is missed by nobody.
    """
    folder = Path(environment.get(_PLACE, shared / "benchmarks"))
    lacks = missing_files(folder)
    is_wrong = bool(lacks) and bool(environment.get("CI")) and shared.is_dir()
    return folder, f"{folder} lacks {', '.join(lacks)}; {_PLACE} may name another folder" if lacks else "", is_wrong
