"""The runner of acceptance checks: flags, result file, exit status."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.accept.checks import run_check


@pytest.mark.parametrize(
    ("passed", "status"), [(True, 0), (False, 1), ({"a": True, "b": True}, 0), ({"a": True, "b": False}, 1), ({}, 0)]
)
def test_result_is_written_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: Any, status: int) -> None:
    monkeypatch.setattr("sys.argv", ["accept_it.py", "--json", str(tmp_path / "new" / "it.json"), "--seed", "3"])

    async def check(options: Namespace) -> dict[str, Any]:
        assert options.scratch.is_dir()
        return {"seed": options.seed, "scratch": str(options.scratch), "passed": passed}

    assert run_check(check, {"--seed": {"type": int}}) == status
    found = json.loads((tmp_path / "new" / "it.json").read_text(encoding="utf-8"))
    assert (found["seed"], found["passed"]) == (3, passed)
    assert not Path(found["scratch"]).exists()
