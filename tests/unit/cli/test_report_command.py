"""`dmoa report`: tables on stdout, the HTML file, and folders that hold no run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmoa.cli.report import print_evaluation
from dmoa.evaluation.results import build
from tests.unit.run_records import score, small_run, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", *small_run())
    return tmp_path / "run"


def test_a_run_is_shown_and_reported(dmoa: Any, folder: Path, tmp_path: Path) -> None:
    result = dmoa("report", folder, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1][:11] == ["mmlu", "dmoa", "1", "4", "50.0", "[15.0,", "85.0]", "25.0", "1", "1", "300"]
    assert ["relay", "dmoa", "single", "2", "3"] in [line[:5] for line in lines]
    assert "[1] mmlu: a generated letter instead of 5-shot scoring" in result.stdout
    assert "[2] generated rows" in result.stdout
    assert "A: McNemar, exact; Newcombe's interval, B: paired bootstrap" in result.stdout
    assert "failed: mmlu/test/0003 (dmoa): DeadlineError" in result.stdout
    assert str(folder / "report.html") in result.stderr
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["accuracy"] == 0.5


def test_the_html_goes_where_it_is_wanted(dmoa: Any, folder: Path, tmp_path: Path) -> None:
    assert dmoa("report", folder, "--html", tmp_path / "page.html", "-q").exit_code == 0
    assert (tmp_path / "page.html").exists()
    assert not (folder / "report.html").exists()


def test_the_finished_result_is_preferred(dmoa: Any, folder: Path) -> None:
    run, answered, scored = small_run()
    evaluation = build(run, answered, [*scored[1:], score("mmlu", 0, "dmoa", 0.0, group="art")])
    (folder / "evaluation.json").write_text(evaluation.model_dump_json(), encoding="utf-8")
    assert "25.0" in dmoa("report", folder).stdout.splitlines()[1]


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_without_a_run_is_bad_input(dmoa: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = dmoa("report", tmp_path / name)
    assert result.exit_code == 2
    assert "holds no run" in result.stderr
    assert not (tmp_path / name / "report.html").exists()


def test_a_pool_has_no_effect(dmoa: Any, folder: Path) -> None:
    result = dmoa("report", folder, "--set", "name=x")
    assert result.exit_code == 2
    assert "--set: no effect" in result.stderr


def test_errors_cannot_drive_the_terminal() -> None:
    run, answered, scored = small_run()
    evil = [a.model_copy(update={"error": "\x1b[2J[bold]boo\nnext"}) if a.status == "failed" else a for a in answered]
    console = Console(file=io.StringIO(), width=160, highlight=False)
    print_evaluation(build(run, evil, scored), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "[2J[bold]boo next" in shown
