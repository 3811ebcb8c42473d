"""The answer matrix and the replay of routers on it, against rows worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmoa.core.label_model import fit_label_model
from dmoa.core.witnesses import witnesses_of
from dmoa.errors import ConfigError
from dmoa.evaluation.answer_matrix import AnswerMatrix, RouterChoice, choice_of, matrix_policies, read_matrix, replay_choices
from dmoa.evaluation.records import Task
from dmoa.evaluation.run_folder import RunFolder, write_lines
from dmoa.testing import answered as answer
from dmoa.testing import decision
from dmoa.testing import failed as lost
from dmoa.testing import scored as score

AGENTS = ("a", "b", "c")
TEXTS = [("Answer: 1", "Answer: 2", "Answer: 2"), ("Answer: 5", "Answer: 6", "Answer: 7")]
ENTROPIES = [(0.1, 0.2, 0.4), (0.9, 0.05, 0.3)]
VALUES = [(0.0, 1.0, 1.0), (1.0, 0.0, 0.0)]


def folder_of(root: Path) -> RunFolder:
    folder = RunFolder(root)
    tasks = [Task(row_id=f"sums/test/{n:04}", benchmark="sums", text=f"question {n}") for n in range(2)]
    write_lines(folder.tasks("sums"), tasks)
    for a, policy in enumerate(matrix_policies(AGENTS)):
        lines = [
            answer("sums", n, policy, text=TEXTS[n][a], entropy_nats=ENTROPIES[n][a], prompt_tokens=100, completion_tokens=10 + a)
            for n in range(2)
        ]
        write_lines(folder.answers("sums", policy), lines)
        write_lines(folder.scores("sums", policy), [score("sums", n, policy, VALUES[n][a]) for n in range(2)])
    return folder


@pytest.fixture
def matrix(tmp_path: Path) -> AnswerMatrix:
    return read_matrix(folder_of(tmp_path), "sums", AGENTS)


def test_a_run_is_read_back(matrix: AnswerMatrix) -> None:
    assert [task.text for task in matrix.tasks] == ["question 0", "question 1"]
    np.testing.assert_allclose(matrix.entropies(), ENTROPIES)
    assert matrix.value_RA.tolist() == [list(row) for row in VALUES]
    assert matrix.tokens().tolist() == [[110, 111, 112], [110, 111, 112]]


def test_agents_and_rows_can_be_chosen(matrix: AnswerMatrix) -> None:
    part = matrix.only(("c", "a")).rows([1])
    assert part.agents == ("c", "a")
    assert part.value_RA.tolist() == [[0.0, 1.0]]
    assert [reply.text for reply in part.replies[0]] == ["Answer: 7", "Answer: 5"]
    with pytest.raises(ConfigError, match=r"agents: the matrix does not hold x; name some of a, b, c"):
        matrix.only(("x",))


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_lines(folder.answers("sums", "single:b"), [answer("sums", 0, "single:b")])
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 rows of sums by single:b"):
        read_matrix(folder, "sums", AGENTS)


def test_a_failed_row_contributes_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_lines(folder.answers("sums", "single:a"), [lost("sums", n, "single:a") for n in range(2)])
    found = replay_choices(read_matrix(folder, "sums", AGENTS), [RouterChoice(ranking=(0,), k=1)] * 2)
    assert (found.chosen_R.tolist(), found.value_R.tolist()) == ([-1, -1], [0.0, 0.0])


def test_one_agent_passes_several_agree_or_the_surest_wins(matrix: AnswerMatrix) -> None:
    found = replay_choices(matrix, [RouterChoice(ranking=(0, 1, 2), k=1), RouterChoice(ranking=(1, 0, 2), k=1)])
    assert (found.chosen_R.tolist(), found.value_R.tolist()) == ([0, 1], [0.0, 0.0])
    # Row 0: b and c agree on 2 against a, who is surer. Row 1: all differ, b is the surest.
    found = replay_choices(matrix, [RouterChoice(ranking=(0, 1, 2), k=3)] * 2)
    assert (found.chosen_R.tolist(), found.value_R.tolist(), found.k_R.tolist()) == ([1, 1], [1.0, 0.0], [3, 3])
    assert (found.tokens_R.tolist(), found.first_R.tolist(), found.accuracy) == ([333, 333], [0, 0], 0.5)


def test_the_cascade_asks_on_until_somebody_is_sure(matrix: AnswerMatrix) -> None:
    sure = float(np.log(0.1 + 1e-3))
    choices = [RouterChoice(ranking=(0, 1, 2), k=1, theta=sure, limit=3)] * 2
    # Row 0: a is exactly sure enough. Row 1: a is not, b is.
    assert replay_choices(matrix, choices).k_R.tolist() == [1, 2]
    nobody = [RouterChoice(ranking=(0, 1, 2), k=1, theta=-9.0, limit=2)] * 2
    assert replay_choices(matrix, nobody).k_R.tolist() == [2, 2]
    # Anchors shift the scores: what is ordinary for b is sure for nobody.
    shifted = [RouterChoice(ranking=(0, 1, 2), k=1, theta=sure, limit=3, anchors=(-5.0, -5.0, -5.0))] * 2
    assert replay_choices(matrix, shifted).k_R.tolist() == [3, 3]


def test_a_label_model_says_whom_to_ask_and_whose_answer_wins(matrix: AnswerMatrix) -> None:
    # By what is learnt b and c are right, a never: row 0 b and c agree on 2, row 1 all differ.
    known = fit_label_model(witnesses_of([[str(1000 + row), str(row), str(row)] for row in range(12)]), seed=0)
    decided = replace(decision({"a": 0.6, "b": 0.3, "c": 0.1}, 1, label_model=known, limit=3), agent_price=0.1)
    choices = [choice_of(decided)] * 2
    found = replay_choices(matrix, choices)
    assert found.asked_RA[:, :2].all()  # a is not believed, so b is asked
    assert found.k_R.tolist() == [2, 2]
    assert found.chosen_R.tolist() == [1, 1]
    assert replay_choices(matrix, [replace(choice, limit=1) for choice in choices]).chosen_R.tolist() == [0, 0]
    assert choice_of(replace(decided, label_model=None)).judged_by is None


def test_every_row_needs_a_choice(matrix: AnswerMatrix) -> None:
    with pytest.raises(ValueError, match="1 for 2 rows"):
        replay_choices(matrix, [RouterChoice(ranking=(0,), k=1)])
