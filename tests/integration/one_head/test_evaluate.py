"""`dmoa evaluate` as a user runs it, on scripted agents (said so: their numbers mean nothing) and once on the real model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.evaluations import (
    command,
    kill_and_resume,
    once_answered,
    rows_of,
    run,
    run_here,
    scripted_pool,
    table_of,
    whole_lines,
)

ROOT = Path(__file__).parents[3]
ROWS, POLICIES = 16, "dmoa,single,single:two"


def scripted(out: Path, *more: str) -> list[str]:
    pool = str(scripted_pool(out.parent))
    return command(
        out, "--config", pool, "--benchmarks", "arith,calendar,relay", "--policies", POLICIES, "--limit", str(ROWS), *more
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run on scripted agents."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    ran = run(scripted(out, "--json", str(out.parent / "result.json"), "--concurrency", "6"))
    assert ran.returncode == 0, ran.stderr
    assert "arith" in ran.stdout
    assert "generated" in ran.stdout
    assert "scoring" in ran.stderr
    return out


def test_a_run_leaves_its_rows_its_result_and_its_report(unbroken: Path) -> None:
    result = json.loads((unbroken / "evaluation.json").read_text(encoding="utf-8"))
    assert result == json.loads((unbroken.parent / "result.json").read_text(encoding="utf-8"))
    assert len(rows_of(unbroken)) == 3 * 3 * ROWS
    rows = {(row["benchmark"], row["policy"]): row for row in result["rows"]}
    assert len(rows) == 9
    for row in rows.values():
        assert row["n"] == ROWS
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    # The agent that always says Monday is right on the rows whose answer that is, and on no other.
    gold = [json.loads(line)["gold"]["answer"] for line in (unbroken / "labels/gold/calendar.jsonl").read_text().splitlines()]
    assert rows["calendar", "single"]["correct"] == sum(answer == "Monday" for answer in gold)
    assert rows["calendar", "single"]["completion_tokens"] == ROWS * 8
    assert rows["relay", "dmoa"]["steps_mean"] == 4
    assert {row["test"] for row in result["paired"]} <= {"exact McNemar", "paired bootstrap"} or result["paired"]
    html = (unbroken / "report.html").read_text(encoding="utf-8")
    assert "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


@pytest.mark.accept
def test_a_run_that_is_killed_goes_on_and_gives_the_same_table(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    moments = [once_answered(out, 100)]
    resumed = kill_and_resume(scripted(out, "--concurrency", "6"), out, moments, tmp_path / "log")
    assert resumed.ran.returncode == 0, resumed.ran.stderr
    assert resumed.kills == 1, (tmp_path / "log").read_text()
    assert resumed.is_prefix_kept
    assert rows_of(out).keys() == rows_of(unbroken).keys()
    assert table_of(out) == table_of(unbroken)


@pytest.mark.accept
def test_a_comparison_that_is_killed_goes_on_with_its_budget_and_its_curve(tmp_path: Path) -> None:
    """The budget is that of the first beginning; policies of a schedule run it to its end though the pool allows two steps."""

    def compare(out: Path) -> list[str]:
        base = command(out, "--config", str(scripted_pool(tmp_path)), "--benchmarks", "arith,calendar", "--limit", "6")
        own = ["--policies", "dense,mcts:simulations=2,majority_k", "--match", "tokens", "--match-budget", "2000"]
        return [
            base[0],
            "compare",
            *base[2:],
            *own,
            "--curve",
            "0..1",
            "--curve-defences",
            "none,agreement",
            "--concurrency",
            "4",
        ]

    def counts_of(folder: Path) -> dict[str, Any]:
        """The table but for what came from the cache: calls that a killed session had made are found there."""
        table = table_of(folder)
        return table | {"rows": [row | {"memoised_tokens": 0} for row in table["rows"]]}

    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run(compare(whole)).returncode == 0
    points = ["0-none", "0-agreement", "1-none", "1-agreement"]
    moments = [once_answered(out, 30), once_answered(out / "curve" / points[1], 30)]
    resumed = kill_and_resume(compare(out), out, moments, tmp_path / "log")
    assert resumed.ran.returncode == 0, resumed.ran.stderr
    assert resumed.kills == 2, (tmp_path / "log").read_text()
    assert resumed.is_prefix_kept
    for folder in ("", *(f"curve/{name}" for name in points)):
        assert counts_of(out / folder) == counts_of(whole / folder)
        assert rows_of(out / folder).keys() == rows_of(whole / folder).keys()
    results = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in (whole, out)]
    assert results[0]["robustness"] == results[1]["robustness"]
    assert {(row["adversaries"], row["defence"]) for row in results[1]["robustness"]} == {
        (int(name[0]), name[2:]) for name in points
    }
    assert results[1]["config"]["budgets"]["arith"] == {"budget_tokens": 2000}
    assert sum(row["memoised_tokens"] for row in results[0]["rows"]) > 0, "dense, majority_k and single begin with the same calls"
    steps = {row["policy"]: row["steps_mean"] for row in results[1]["rows"]}
    assert steps["mcts:simulations=2"] == 5
    assert {"self_moa", "self_consistency:k=16", "single"} <= steps.keys()
    other = run_here([*compare(out), "--resume", "--match-budget", "9", "--curve", "", "--curve-defences", "none"])
    assert other.returncode == 2
    assert "match_budget: begun with 2000.0, now 9.0" in other.stderr


def test_a_folder_with_a_run_is_refused_and_other_settings_are_named(unbroken: Path) -> None:
    again = run_here(scripted(unbroken))
    assert again.returncode == 2
    assert "--resume" in again.stderr
    other = run_here([*scripted(unbroken, "--resume"), "--seed", "9"])
    assert other.returncode == 2
    assert "seed: begun with 0, now 9" in other.stderr


@pytest.mark.accept
def test_failed_rows_are_kept_counted_and_run_again_when_asked(tmp_path: Path) -> None:
    pool = yaml.safe_load(scripted_pool(tmp_path).read_text(encoding="utf-8"))
    path, out = tmp_path / "failing.yaml", tmp_path / "run"
    pool["llms"]["s"]["engine_kwargs"]["failing"] = ["one", "two", "three"]
    path.write_text(yaml.safe_dump(pool), encoding="utf-8")
    base = command(out, "--config", str(path), "--benchmarks", "words", "--policies", "single", "--limit", "3")
    ran = run(base)
    assert ran.returncode == 1, ran.stderr
    assert "did not run: single on words (3 of 3 queries failed)" in ran.stderr
    (row,) = table_of(out)["rows"]
    assert (row["n"], row["failed"], row["correct"], row["did_run"]) == (3, 3, 0, False)
    assert all("scripted to fail" in answer["error"] for answer in rows_of(out).values())
    pool["llms"]["s"]["engine_kwargs"]["failing"] = []
    path.write_text(yaml.safe_dump(pool), encoding="utf-8")
    ran = run([*base, "--resume", "--retry-failed"])
    assert ran.returncode == 0, ran.stderr
    assert table_of(out)["rows"][0]["failed"] == 0
    assert len(rows_of(out)) == 3


@pytest.mark.accept  # what it ends with is judged without Ray by tests/unit/evaluation/test_fault_table.py
def test_a_policy_that_never_ran_is_compared_with_nobody_and_ends_with_1(tmp_path: Path) -> None:
    pool = yaml.safe_load(scripted_pool(tmp_path).read_text(encoding="utf-8"))
    path, out = tmp_path / "failing.yaml", tmp_path / "run"
    pool["llms"]["s"]["engine_kwargs"]["failing"] = ["two"]
    path.write_text(yaml.safe_dump(pool), encoding="utf-8")
    policies = ("--policies", "single:one,single:two,dmoa")
    ran = run(command(out, "--config", str(path), "--benchmarks", "calendar", *policies, "--limit", "4"))
    assert ran.returncode == 1, ran.stderr
    assert "did not run: single:two on calendar (4 of 4 queries failed)" in ran.stderr
    assert "scripted to fail" in ran.stderr
    result = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["did_run"] for row in result["rows"]] == [True, False, True]
    assert [(pair["a"], pair["b"]) for pair in result["paired"]] == [("single:one", "dmoa")]
    (line,) = [line for line in ran.stdout.splitlines() if "single:two" in line and not line.startswith("failed:")]
    assert "did not run" in line


@pytest.mark.accept
@pytest.mark.usefixtures("own_ray")
def test_the_job_file_does_what_the_command_does(unbroken: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(scripted_pool(tmp_path).read_text(encoding="utf-8"))
    tree["job"] = {
        "benchmarks": ["arith", "calendar", "relay"],
        "policies": POLICIES.split(","),
        "limit": ROWS,
        "out": str(tmp_path / "run"),
        "resume": True,
        "track": "none",
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ran = run([sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--config", str(path)])
    assert ran.returncode == 0, ran.stderr
    assert table_of(tmp_path / "run") == table_of(unbroken)


@pytest.mark.accept
@pytest.mark.real_model
def test_the_embedded_model_is_evaluated_and_its_calls_are_found_again(tmp_path: Path) -> None:
    base = ["--benchmarks", "arith", "--policies", "single,dmoa", "--limit", "1", "--budget", "cpu"]
    cache = ["--call-cache", str(tmp_path / "calls")]
    first = run(command(tmp_path / "first", *base, *cache))
    assert first.returncode == 0, first.stderr
    second = run(command(tmp_path / "second", *base, *cache))
    assert second.returncode == 0, second.stderr
    texts = [{key: row["text"] for key, row in rows_of(tmp_path / name).items()} for name in ("first", "second")]
    assert texts[0] == texts[1]
    for key, row in rows_of(tmp_path / "second").items():
        assert row["memoised_tokens"] == row["prompt_tokens"] + row["completion_tokens"] > 0, key
    table = [table_of(tmp_path / name)["rows"] for name in ("first", "second")]
    counted = ("prompt_tokens", "completion_tokens", "correct")
    assert [[row[name] for name in counted] for row in table[0]] == [[row[name] for name in counted] for row in table[1]]
    shutil.rmtree(tmp_path / "calls")
    assert whole_lines(tmp_path / "first")
