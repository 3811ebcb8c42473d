"""Policies that are worked out from a finished run of `single:AGENT` for every agent, without asking anyone again.

Each row takes the line of one agent, so tables, intervals and paired tests treat a derived policy like any other. The oracle
knows the labels: it is a bound, no method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dmoa.evaluation.matrix import matrix_policies, read_matrix
from dmoa.evaluation.records import Answered, Scored
from dmoa.evaluation.run_files import RunFolder, write_lines, write_whole
from dmoa.evaluation.run_info import RunInfo

ORACLE = "oracle"
"""On every row the best of the agents that answered it alone."""
Choices = Mapping[str, npt.NDArray[np.integer]]
"""Benchmark -> index of the agent chosen for each row [R], in the order of the tasks."""


def add_oracle(folder: RunFolder, benchmarks: Sequence[str], agents: Sequence[str]) -> None:
    """Add the oracle's lines to a run; of agents that score the same the first counts, with its tokens.

    `run.finish` then makes the result anew. Raises ConfigError where the run is not whole.
    """
    best = {}
    for name in benchmarks:
        matrix = read_matrix(folder, name, agents)
        is_lost_RA = np.array([[reply.status == "failed" for reply in row] for row in matrix.replies])
        best[name] = np.where(is_lost_RA, -1.0, matrix.value_RA).argmax(axis=1)  # a wrong answer before none at all
    add_derived(folder, ORACLE, agents, best)


def add_derived(folder: RunFolder, name: str, agents: Sequence[str], choices: Choices) -> None:
    """Add the lines of a policy that asks one agent per row. Raises ConfigError where the run is not whole."""
    policies = matrix_policies(agents)
    for benchmark, chosen in choices.items():
        tasks = read_matrix(folder, benchmark, agents).tasks
        answers = {policy: {row.row_id: row for row in folder.read_answers(benchmark, policy)} for policy in policies}
        scores = {policy: {row.row_id: row for row in folder.read_scores(benchmark, policy)} for policy in policies}
        picked = [(task.row_id, policies[index]) for task, index in zip(tasks, chosen.tolist(), strict=True)]
        kept: list[Answered] = [answers[policy][row_id].model_copy(update={"policy": name}) for row_id, policy in picked]
        judged: list[Scored] = [scores[policy][row_id].model_copy(update={"policy": name}) for row_id, policy in picked]
        write_lines(folder.answers(benchmark, name), kept)
        write_lines(folder.scores(benchmark, name), judged)
    info = RunInfo.model_validate_json(folder.run.read_text(encoding="utf-8"))
    if name not in info.derived:
        info = info.model_copy(update={"derived": [*info.derived, name]})
        write_whole(folder.run, info.model_dump_json(indent=2) + "\n")
