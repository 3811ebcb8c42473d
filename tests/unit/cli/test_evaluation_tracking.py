"""What an evaluation tells the tracker: its tables, and nothing where the command found nothing new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmoa.evaluation.records import EvaluateOptions
from dmoa.evaluation.results import rebuild_evaluation
from dmoa.evaluation.run_folder import write_lines
from dmoa.testing import write_run
from dmoa.workflows.evaluate import log_tables
from tests.unit.run_records import small_run


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_is_logged_again_only_where_there_is_more(tmp_path: Path) -> None:
    run, answers, scores = small_run()
    folder = write_run(tmp_path, run, answers[:-1], scores)
    options = EvaluateOptions.parse({"benchmarks": "mmlu", "out": tmp_path, "track": "jsonl"})
    log_tables(rebuild_evaluation(tmp_path), folder, options)
    before = lines_of(tmp_path)
    assert before[0]["op"] == "config"
    assert {line["name"] for line in before if line["op"] == "table"} == {"evaluation", "paired", "rows"}
    log_tables(rebuild_evaluation(tmp_path), folder, options)
    assert lines_of(tmp_path) == before
    last = answers[-1]
    cell = [line for line in answers if (line.benchmark, line.policy) == (last.benchmark, last.policy)]
    write_lines(folder.answers(last.benchmark, last.policy), cell)
    log_tables(rebuild_evaluation(tmp_path), folder, options)
    assert len(lines_of(tmp_path)) == 2 * len(before)
