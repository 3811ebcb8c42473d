"""What `dmoa adapt` keeps of a stream, and how it goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmoa.errors import ConfigError, DmoaError, EmptyAnswerError
from dmoa.evaluation.records import Task
from dmoa.evaluation.run_folder import RunFolder
from dmoa.testing import scripted_pool
from dmoa.training.options import AdaptOptions
from dmoa.training.prequential import Counted, StreamUpdate
from dmoa.training.rollouts import RolloutQuery, table_of
from dmoa.workflows.adapt import Stage, check_same
from tests.unit.training.adapt_lessons import lesson

TASKS = {
    f"dyes/test/{number}": Task(row_id=f"dyes/test/{number}", benchmark="dyes", text=f"Mix {number}.") for number in range(3)
}
QUERIES = [RolloutQuery(query_id=row, source="dyes", split="test", text=task.text) for row, task in TASKS.items()]


def counted(number: int, **changes: Any) -> Counted:
    """A query that was answered by version `v1`."""
    answer = lesson(0, number).answer
    table = table_of(QUERIES[number], answer, preset="paper", seed=0, fingerprint="f" * 64)
    values: dict[str, Any] = {"query": QUERIES[number], "version": "v1", "answer": answer, "table": table}
    return Counted(**values | changes)


def update(number: int) -> StreamUpdate:
    return StreamUpdate(
        number=number,
        queries=["dyes/test/0"],
        answered_by="v1",
        version="v2",
        loss=None,
        used=1,
        skipped={},
        replayed=0,
        drift=0.0,
        distance=0.0,
        refitted=False,
        outcomes=0,
    )


def test_an_answer_is_counted_once_and_its_rollout_is_found_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, TASKS)
    for _ in range(2):  # a session that was killed between the two writes asks again: the first answer is the one that counts
        stage.keep("zero-shot", counted(0))
    (line,) = RunFolder(tmp_path).read_answers("dyes", "dmoa:zero-shot-ttt")
    assert (line.row_id, line.status) == ("dyes/test/0", "ok")
    kept = stage.kept("zero-shot", QUERIES)
    assert [(row, one.version, one.is_new) for row, one in kept.items()] == [("dyes/test/0", "v1", False)]
    table = kept["dyes/test/0"].table
    assert table is not None
    assert table.equals(counted(0).table)
    assert stage.kept("few-shot", QUERIES) == {}


@pytest.mark.parametrize(
    ("error", "status"), [(DmoaError("nobody is there"), "failed"), (EmptyAnswerError("no words", replies=()), "ok")]
)
def test_a_query_without_an_answer_has_a_line_and_no_rollout(tmp_path: Path, error: DmoaError, status: str) -> None:
    stage = Stage(tmp_path, TASKS)
    stage.keep("zero-shot", counted(1, answer=None, table=None, error=error))
    (line,) = RunFolder(tmp_path).read_answers("dyes", "dmoa:zero-shot-ttt")
    assert (line.status, line.text) == (status, "")
    assert stage.kept("zero-shot", QUERIES) == {}


def test_an_update_that_is_made_again_is_written_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, TASKS)
    for number in (1, 1, 2, 1):
        stage.keep("zero-shot", update(number))
    lines = stage.updates("zero-shot").read_text(encoding="utf-8").splitlines()
    assert [StreamUpdate.model_validate_json(line).number for line in lines] == [1, 2]


def test_another_run_in_the_folder_is_refused_by_what_differs(tmp_path: Path) -> None:
    options = AdaptOptions.parse({"benchmark": "dyes", "out": tmp_path})
    check_same(options, scripted_pool(), {"zero-shot": None})
    check_same(options.model_copy(update={"workers": 2, "track": "none"}), scripted_pool(), {"zero-shot": None})
    with pytest.raises(ConfigError, match="queries: begun with 30, now 31"):
        check_same(options.model_copy(update={"queries": 31}), scripted_pool(), {"zero-shot": None})
    with pytest.raises(ConfigError, match="starts: begun with"):
        check_same(options, scripted_pool(), {"zero-shot": None, "few-shot": tmp_path})
