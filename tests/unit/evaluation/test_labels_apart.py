"""Labels stay in a folder that nothing outside of evaluation opens: read from the code, and watched while a run is made."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dmoa
from dmoa.errors import ConfigError
from dmoa.evaluation.answering import Asking, query_of_task
from dmoa.evaluation.data import prepare_rows
from dmoa.evaluation.pipeline import pending_scores, pending_tasks, score_answer
from dmoa.evaluation.records import Answered, EvaluateOptions, Label, Task
from dmoa.evaluation.registry import OpenScorers
from dmoa.evaluation.run_folder import RunFolder, append
from dmoa.flat import flat
from dmoa.testing import domain_rows, scripted_pool, write_rollouts
from dmoa.types import Limits, TokenUsage
from dmoa.workflows.collect import read_labels
from tests.unit.training.in_process import train

PACKAGE = Path(dmoa.__file__).parent
LABEL_NAMES = {"Label", "read_gold", "read_scores", "gold", "scores", "Scored", "pending_scores"}
"""What reaches labels: records, readers, paths."""
WHO_MAY = ("workflows/collect.py", "workflows/export.py", "workflows/adapt.py", "cli/demo.py", "testing.py")
"""Outside evaluation: what writes the labels of rollouts into a folder apart, and reads them for `dmoa probe
--known-answers`; the demo, which tells right answers from wrong ones on the
screen; `dmoa export`, which says of a run's replies which were right; the report of `dmoa adapt`, made when its streams have
ended; and records for tests. None is a part of training."""
_opened: list[tuple[str, str]] = []
_watched: list[str] = []


def test_no_module_outside_evaluation_reaches_for_labels() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "evaluation") or path.relative_to(PACKAGE).as_posix() in WHO_MAY:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        calls = (node.func for node in nodes if isinstance(node, ast.Call))
        names |= {node.attr for node in calls if isinstance(node, ast.Attribute)}
        # `scores` is also the name of a module of core, imported by its functions.
        found = names & (LABEL_NAMES - {"scores"})
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not found, f"{path.relative_to(PACKAGE)} uses {found}"
        assert not {text for text in texts if "labels/" in text}, f"{path.relative_to(PACKAGE)} names the folder of labels"


def _is_reader(module: str) -> bool:
    """Whether a module opens files for itself: some do it for whoever calls them."""
    return module.startswith("dmoa.") and module not in ("dmoa.storage", "dmoa.reading")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | Path) and "/labels/" in str(arguments[0]):
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _is_reader(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        _opened.append((str(arguments[0]), frame.f_globals["__name__"] if frame else "elsewhere"))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Record who opens files under a folder called labels; audit hooks cannot be taken away again."""
    _opened.clear()
    _watched.append("")
    try:
        yield _opened
    finally:
        _watched.clear()


def test_labels_are_opened_by_evaluation_alone(tmp_path: Path) -> None:
    folder, options = RunFolder(tmp_path), EvaluateOptions.parse({"benchmarks": "arith", "limit": 3})
    with watched() as opened:
        prepare_rows(folder, "arith", options)
        asking = Asking(seed=0, limits=Limits())
        assert len(pending_tasks(folder, ["arith"], ["dmoa"])) == 3
        for task in folder.read_tasks("arith"):
            assert query_of_task(task, "dmoa", asking).text == task.text
            append(
                folder.answers("arith", "dmoa"),
                [Answered(row_id=task.row_id, benchmark="arith", policy="dmoa", text="5", **flat(TokenUsage()))],
            )
        before_scoring = list(opened)
        assert len(pending_scores(folder, ["arith"], ["dmoa"])) == 3
        labels = {label.row_id: label for label in folder.read_gold("arith")}
        scorers = OpenScorers(names=("arith",))()
        judged = [score_answer(answer, labels[answer.row_id], scorers) for answer in folder.read_answers("arith", "dmoa")]
        append(folder.scores("arith", "dmoa"), judged)
    assert {module for _, module in opened} == {
        "dmoa.evaluation.data",
        "dmoa.evaluation.pipeline",
        "dmoa.evaluation.run_folder",
    }
    # Until the judging begins, labels have been written and never read.
    assert {module for _, module in before_scoring} == {"dmoa.evaluation.data"}


def test_answers_that_came_without_their_labels_are_named(tmp_path: Path) -> None:
    """A run's folder that somebody was given without `labels/`."""
    folder = RunFolder(tmp_path)
    append(
        folder.answers("arith", "dmoa"), [Answered(row_id="arith/test/0", benchmark="arith", policy="dmoa", **flat(TokenUsage()))]
    )
    with pytest.raises(ConfigError, match=r"labels/gold/arith.jsonl: has no label of 'arith/test/0', which dmoa answered"):
        pending_scores(folder, ["arith"], ["dmoa"])


def test_a_whole_training_opens_no_labels(tmp_path: Path) -> None:
    """Labels lie beside the rollouts, and by mistake among them: a training from start to end opens neither."""
    config = scripted_pool()
    rollouts = write_rollouts(tmp_path / "rollouts", domain_rows(), config)
    for folder in (tmp_path / "labels", rollouts / "labels"):
        folder.mkdir()
        (folder / "labels.jsonl").write_text('{"query_id": "q", "benchmark": "arith", "gold": {"answer": "5"}}\n')
    with watched() as opened:
        train(tmp_path / "run", rollouts, config, epochs=2)
        assert opened == []
        assert [label.gold for label in read_labels(tmp_path / "labels")] == [{"answer": "5"}]
        assert {module for _, module in opened} == {"dmoa.workflows.collect"}, "the hook sees what is opened"


def test_a_task_has_no_place_for_a_label() -> None:
    assert not set(Task.model_fields) & {"gold", "answer", "label"}
    assert "gold" in Label.model_fields
