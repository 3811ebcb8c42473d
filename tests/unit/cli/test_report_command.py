"""`dmoa report`: tables on stdout, the HTML file, and folders that hold no run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmoa.errors import ConfigError, DmoaError
from dmoa.evaluation import figures as display
from dmoa.evaluation.records import BenchmarkInfo
from dmoa.evaluation.results import build_evaluation
from dmoa.testing import answered as answer
from dmoa.testing import failed as lost
from dmoa.testing import run_info as run_of
from dmoa.testing import scored as score
from dmoa.testing import write_run
from dmoa.workflows.ablate import print_table
from dmoa.workflows.adapt import AdaptReport
from dmoa.workflows.console import print_evaluation
from dmoa.workflows.evaluate import check_ran
from tests.unit.evaluation.test_results import failing_run
from tests.unit.run_records import small_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", *small_run())
    return tmp_path / "run"


@pytest.mark.contract
def test_a_run_is_shown_and_reported(dmoa: Any, folder: Path, tmp_path: Path) -> None:
    result = dmoa("report", folder, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1][:11] == ["mmlu", "dmoa", "1", "4", "50.0", "[15.0,", "85.0]", "25.0", "1", "1", "300"]
    assert ["relay", "dmoa", "single", "2", "3"] in [line[:5] for line in lines]
    assert "[1] mmlu: a generated letter instead of 5-shot scoring" in result.stdout
    assert "[2] generated rows" in result.stdout
    assert "A: McNemar, exact; Newcombe's interval, B: sign-flip test" in result.stdout
    assert "failed: mmlu/test/0003 (dmoa): DeadlineError" in result.stdout
    assert str(folder / "report.html") in result.stderr
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["accuracy"] == 0.5


@pytest.mark.contract
def test_the_html_goes_where_it_is_wanted(dmoa: Any, folder: Path, tmp_path: Path) -> None:
    assert dmoa("report", folder, "--html", tmp_path / "page.html", "-q").exit_code == 0
    assert (tmp_path / "page.html").exists()
    assert not (folder / "report.html").exists()


@pytest.mark.contract
def test_the_finished_result_is_preferred(dmoa: Any, folder: Path) -> None:
    run, answered, scored = small_run()
    evaluation = build_evaluation(run, answered, [*scored[1:], score("mmlu", 0, "dmoa", 0.0, group="art")])
    (folder / "evaluation.json").write_text(evaluation.model_dump_json(), encoding="utf-8")
    assert "25.0" in dmoa("report", folder).stdout.splitlines()[1]


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_without_a_run_is_bad_input(dmoa: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = dmoa("report", tmp_path / name)
    assert result.exit_code == 2
    assert "holds no run" in result.stderr
    assert not (tmp_path / name / "report.html").exists()


def test_a_report_of_an_adaptation_keeps_its_drawings(dmoa: Any, folder: Path) -> None:
    point = {
        "row_id": "r",
        "right": 1.0,
        "entropy_nats": 0.5,
        "right_probability": None,
        "agents": 2,
        "tokens": 9,
        "gate_version": "v",
    }
    kept = AdaptReport(command="dmoa adapt", options={}, pool="p", starts={}, rows=[], updates={}, stream={"zero-shot": [point]})
    run, answered, scored = small_run()
    run = run.model_copy(update={"policies": ["dmoa:zero-shot", "single"]})
    lines = [
        [one.model_copy(update={"policy": one.policy.replace("dmoa", "dmoa:zero-shot")}) for one in those]
        for those in (answered, scored)
    ]
    write_run(folder, run, *lines)
    assert dmoa("report", folder, "-q").exit_code == 0
    assert "Adaptation" not in (folder / "report.html").read_text(encoding="utf-8")
    (folder / "adapt.json").write_text(kept.model_dump_json(), encoding="utf-8")
    assert dmoa("report", folder, "-q").exit_code == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Adaptation" in text
    assert "dmoa:zero-shot: 1 versions, v to v" in text


def test_a_report_that_cannot_be_written_names_the_report(dmoa: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = dmoa("report", folder, "--html", tmp_path / "file" / "page.html")
    assert result.exit_code == 2
    assert "the report: cannot write" in result.stderr
    assert "--html" in result.stderr
    assert "--out" not in result.stderr


def test_a_pool_has_no_effect(dmoa: Any, folder: Path) -> None:
    result = dmoa("report", folder, "--set", "name=x")
    assert result.exit_code == 2
    assert "--set: no effect" in result.stderr


def test_errors_cannot_drive_the_terminal() -> None:
    run, answered, scored = small_run()
    evil = [a.model_copy(update={"error": "\x1b[2J[bold]boo\nnext"}) if a.status == "failed" else a for a in answered]
    console = Console(file=io.StringIO(), width=160, highlight=False)
    print_evaluation(build_evaluation(run, evil, scored), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "[2J[bold]boo next" in shown


def test_a_policy_that_never_ran_says_so_in_the_table_and_has_no_test() -> None:
    evaluation = failing_run()
    console = Console(file=io.StringIO(), width=160, highlight=False)
    print_evaluation(evaluation, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [line for line in lines if "single:b" in line and "failed:" not in line]
    assert len(rows) == 2, "two rows of results, none of comparisons"
    assert all("did not run" in line and "[" not in line for line in rows)
    assert any(line.startswith("[1] did not run: every query failed") for line in lines)


def test_a_run_in_which_a_policy_never_ran_ends_with_its_name_and_reason() -> None:
    with pytest.raises(DmoaError) as ended:
        check_ran(failing_run())
    assert not isinstance(ended.value, ConfigError), "exit status 1, not 2"
    for part in ("single:b on gsm8k (4 of 4 queries failed)", "single:b on svamp", "scripted to fail", "--retry-failed"):
        assert part in str(ended.value)
    check_ran(build_evaluation(*small_run()))


def test_mostly_failed_and_never_judged_rows_carry_a_remark() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=3)], ["dmoa", "single"])
    answered = [answer("gsm8k", 0, "dmoa"), lost("gsm8k", 1, "dmoa"), lost("gsm8k", 2, "dmoa")]
    scored = [score("gsm8k", 0, "dmoa", 1.0)]
    scored += [score("gsm8k", number, "dmoa", 0.0, is_scored=False, is_failed=True) for number in (1, 2)]
    answered += [answer("gsm8k", number, "single") for number in range(3)]
    scored += [score("gsm8k", number, "single", 0.0, is_scored=False) for number in range(3)]
    notes = display.Footnotes(build_evaluation(run, answered, scored))
    assert [note.text for note in notes.all()] == [display.MOSTLY_FAILED, display.NOT_SCORED]


def test_a_policy_that_answered_without_some_of_its_agents_carries_a_remark() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=2)], ["dmoa", "single"])
    answered = [answer("gsm8k", number, policy) for policy in run.policies for number in range(2)]
    answered[1] = answered[1].model_copy(update={"degraded": True})
    evaluation = build_evaluation(run, answered, [score("gsm8k", n, policy, 1.0) for policy in run.policies for n in range(2)])
    notes = display.Footnotes(evaluation)
    assert [(note.mark, note.text) for note in notes.all()] == [("1", display.DEGRADED)]
    assert [(row.policy, notes.marks(row)) for row in evaluation.rows] == [("dmoa", "1"), ("single", "")]


def test_the_table_of_ablations_has_no_mean_of_what_never_ran(capsys: pytest.CaptureFixture[str]) -> None:
    """One row on each of two suites; the reference is right on one, `random` fails on both, `dense` on one."""
    policies = ["dmoa:default", "dense", "random"]
    lines = {
        ("arith", "dmoa:default"): 1.0, ("words", "dmoa:default"): 0.0, ("arith", "dense"): 1.0,
        ("words", "dense"): None, ("arith", "random"): None, ("words", "random"): None,
    }  # fmt: skip
    answered = [lost(suite, 0, policy) if value is None else answer(suite, 0, policy) for (suite, policy), value in lines.items()]
    scored = [
        score(suite, 0, policy, value or 0.0, is_failed=value is None, is_scored=value is not None)
        for (suite, policy), value in lines.items()
    ]
    print_table(
        build_evaluation(run_of([BenchmarkInfo(name=name, rows=1) for name in ("arith", "words")], policies), answered, scored)
    )
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["dmoa:default", "50.0", "[9.5, 90.5]", "100.0", "0.0", "+0.0", "1.50", "110"] in rows
    assert ["dense", "-", "100.0", "did not run", "-", "1.50", "110"] in rows
    assert ["random", "-", "did not run", "did not run", "-", "-", "-"] in rows
