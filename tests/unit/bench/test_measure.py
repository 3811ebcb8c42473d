"""Order of the arms, and the figures made of their rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmoa.bench.harness import BenchReport, BenchResult, Spread, interleave, ratio, seconds_per_call, spread
from dmoa.cli.main import app


def test_arms_alternate_and_the_first_round_is_thrown_away() -> None:
    calls: list[str] = []

    def arm(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    figures = interleave({"a": lambda: arm("a"), "b": lambda: arm("b")}, 3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert figures == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds"):
        interleave({"a": lambda: 1.0}, 0)


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_ratio_is_taken_round_by_round() -> None:
    assert ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]).value == 3.0


def test_seconds_per_call_counts_the_calls() -> None:
    calls: list[int] = []
    assert seconds_per_call(lambda: calls.append(1), 5) > 0.0
    assert len(calls) == 5


def test_result_has_the_fields_of_the_contract() -> None:
    assert list(BenchResult.model_fields) == ["id", "value", "unit", "low", "high", "rounds", "bar", "passed", "engine", "note"]


@pytest.mark.contract
def test_a_bench_that_fails_takes_no_figures_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("in the way of the peers' environment")
    monkeypatch.setenv("DMOA_CACHE", str(tmp_path / "cache"))
    written = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "--only", "P1,peers", "--rounds", "1", "--json", str(written)])
    assert done.exit_code == 1
    assert "the peers' environment" in done.output
    assert "P1.decide" in done.stdout
    assert BenchReport.model_validate_json(written.read_text()).results[0].id == "P1"
