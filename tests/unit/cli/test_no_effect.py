"""Options that would do nothing are refused, with what they were given beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ABLATIONS = ("evaluate", "--ablations", "--rollouts", "r", "--benchmarks", "arith")
SELFCHECK = ("evaluate", "--selfcheck", "--benchmarks", "arith")
EXPLAIN = ("evaluate", "--explain", "arith/test/1")


@pytest.mark.parametrize(
    ("command", "given", "named"),
    [
        (ABLATIONS, ("--policies", "debate"), "--policies"),
        (ABLATIONS, ("--gates", "a=b"), "--gates"),
        (ABLATIONS, ("--url", "http://127.0.0.1:9"), "--url"),
        (ABLATIONS, ("--checkpoint", "c"), "--checkpoint"),
        (SELFCHECK, ("--policies", "debate", "--seed", "1"), "--policies, --seed"),
        (SELFCHECK, ("--split", "train", "--difficulty", "2"), "--split, --difficulty"),
        (SELFCHECK, ("--budget", "cpu", "--max-tokens", "9", "--workers", "2"), "--budget, --max-tokens, --workers"),
        (SELFCHECK, ("--out", "o", "--resume", "--config", "specialists"), "--out, --resume, --config"),
        (SELFCHECK, ("--rollouts", "r"), "--rollouts"),
        (EXPLAIN, ("--policies", "debate", "--limit", "3"), "--limit"),
        (EXPLAIN, ("--set", "gate.seed=1"), "--set"),
        (EXPLAIN, ("--checkpoint", "c"), "--checkpoint"),
        (("adapt", "--online"), ("--json", "told.json"), "--json"),
    ],
)
def test_an_option_without_effect_is_refused(
    dmoa: Any, command: tuple[str, ...], given: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = dmoa(*command, *given)
    assert result.exit_code == 2
    assert f"{named}: no effect" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("adapt", "--online"),
        ("export", "--format", "sft", "--traces", "t", "--out", "o"),
        ("import-logs", "--logs", "l", "--out", "o.jsonl"),
        ("policies",),
        ("models", "list"),
        ("router", "status"),
        ("outcomes", "list"),
    ],
)
@pytest.mark.parametrize("option", [("--config", "specialists"), ("--set", "gate.seed=1")])
def test_a_command_that_looks_at_no_pool_takes_none(dmoa: Any, command: tuple[str, ...], option: tuple[str, str]) -> None:
    result = dmoa(*command, *option)
    assert result.exit_code == 2
    assert f"No such option: {option[0]}" in result.stderr
