"""The rows of a run: drawn by seed, the same ones whatever their order, tasks and labels in folders apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.base import BENCHMARKS
from dmoa.evaluation.data import SUITE_ROWS, prepare_rows, sample_rows
from dmoa.evaluation.records import EvaluateOptions, Label, Row, Task
from dmoa.evaluation.registry import SUITES, expand_names, judging
from dmoa.evaluation.run_folder import RunFolder


def rows(count: int) -> list[Row]:
    return [
        Row(
            task=Task(row_id=f"b/test/{i}", benchmark="b", text=str(i)),
            label=Label(row_id=f"b/test/{i}", benchmark="b", gold={"answer": str(i)}),
            row_hash=f"{i:064x}",
        )
        for i in range(count)
    ]


def test_a_sample_depends_on_the_rows_and_the_seed_and_not_on_their_order() -> None:
    everyone = rows(200)
    shuffled = random.Random(1).sample(everyone, 200)
    assert sample_rows(everyone, 20, 5) == sample_rows(shuffled, 20, 5)
    assert sample_rows(everyone, 20, 5) != sample_rows(everyone, 20, 6)
    assert sample_rows(everyone, 20, 5) == sample_rows(everyone, 40, 5)[:20]  # a larger sample begins with the smaller one
    assert sorted(row.row_hash for row in sample_rows(everyone, 500, 5)) == [row.row_hash for row in everyone]


def test_every_row_is_as_likely_as_any_other() -> None:
    everyone = rows(20)
    drawn = [int(row.task.text) for seed in range(2000) for row in sample_rows(everyone, 5, seed)]
    counts = [drawn.count(i) for i in range(20)]
    assert min(counts) > 400  # expected 500, standard deviation 19
    assert max(counts) < 600


def test_tasks_and_labels_are_written_apart_and_in_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    options = EvaluateOptions.parse({"benchmarks": "arith", "limit": 30, "seed": 4})
    prepared = prepare_rows(folder, "arith", options)
    tasks, labels = list(folder.read_tasks("arith")), list(folder.read_gold("arith"))
    assert prepared.rows == len(tasks) == len(labels) == 30
    assert [task.row_id for task in tasks] == [label.row_id for label in labels]
    text = folder.tasks("arith").read_text(encoding="utf-8")
    assert "gold" not in text
    assert all(set(json.loads(line)) == set(Task.model_fields) for line in text.splitlines())
    assert prepared.sources == {"generated:arith": "difficulty 1, seed 4"}


def test_a_suite_without_a_limit_has_a_set_number_of_rows(tmp_path: Path) -> None:
    assert prepare_rows(RunFolder(tmp_path), "words", EvaluateOptions.parse({"benchmarks": "words"})).rows == SUITE_ROWS


def test_benchmark_rows_come_with_the_hashes_of_their_files(tmp_path: Path) -> None:
    data = tmp_path / "data" / "svamp"
    data.mkdir(parents=True)
    lines = [
        {"ID": f"x-{i}", "Body": f"Ann has {i} pens.", "Question": "How many?", "Equation": "x", "Answer": str(i), "Type": "-"}
        for i in range(12)
    ]
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n", encoding="utf-8")
    options = EvaluateOptions.parse({"benchmarks": "svamp", "limit": 5, "data_dir": tmp_path / "data", "skip_bad_rows": True})
    prepared = prepare_rows(RunFolder(tmp_path / "run"), "svamp", options)
    assert (prepared.rows, prepared.bad_rows) == (5, 1)
    assert list(prepared.sources) == ["svamp/test.jsonl"]
    with pytest.raises(ConfigError, match=r"svamp/test.jsonl, line 13"):
        prepare_rows(RunFolder(tmp_path / "run"), "svamp", options.model_copy(update={"skip_bad_rows": False}))


def test_all_and_suites_stand_for_what_there_is() -> None:
    assert set(expand_names(["all"])) == set(BENCHMARKS) - {"cruxeval_o", "math"}
    assert len(BENCHMARKS) == 11
    assert expand_names(["suites", "gsm8k", "arith"]) == (*SUITES, "gsm8k")
    with pytest.raises(ConfigError, match=r"--benchmarks: gsm9k not known; name some of mmlu, .*suites, separated"):
        expand_names(["gsm8k", "gsm9k"])


@pytest.mark.parametrize("name", [*BENCHMARKS, *SUITES])
def test_every_benchmark_says_how_it_is_judged(name: str) -> None:
    judge = judging(name)
    assert judge.is_generated == (name in SUITES)
    assert judge.title
    assert judge.primary
    assert ("generated" in judge.title.lower()) == judge.is_generated
    assert bool(judge.deviation) == (name in {"mmlu", "hotpotqa", "ddxplus", "cruxeval_o"}) or name in {"humaneval", "ds1000"}


def test_only_suites_have_fine_splits(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    prepared = prepare_rows(folder, "arith", EvaluateOptions.parse({"benchmarks": "arith", "split": "validation", "limit": 3}))
    assert prepared.rows == 3
    assert {task.row_id.split("/")[1] for task in folder.read_tasks("arith")} == {"validation"}
    with pytest.raises(ConfigError, match=r"--split: gsm8k has no split 'gate'; choose from train, adaptation, test"):
        prepare_rows(folder, "gsm8k", EvaluateOptions.parse({"benchmarks": "gsm8k", "split": "gate"}))
    with pytest.raises(ConfigError, match="split"):
        EvaluateOptions.parse({"benchmarks": "arith", "split": "secret"})
