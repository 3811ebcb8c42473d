"""The row oracle of a run: on every row the best of the agents that answered it alone. It knows the labels: a bound."""

from __future__ import annotations

from collections.abc import Sequence

from dmoa.evaluation.matrix import matrix_policies, read_matrix
from dmoa.evaluation.records import Answered, Scored
from dmoa.evaluation.run_files import RunFolder, write_lines, write_whole
from dmoa.evaluation.run_info import RunInfo

ORACLE = "oracle"
"""Its name among the policies of a result."""


def add_oracle(folder: RunFolder, benchmarks: Sequence[str], agents: Sequence[str]) -> None:
    """Add the oracle's lines to a finished run of `single:AGENT` for every agent; `run.finish` then makes the result anew.

    Of agents that score the same the first counts, with its tokens. Raises ConfigError where a run is not whole.
    """
    for benchmark in benchmarks:
        matrix = read_matrix(folder, benchmark, agents)
        best = matrix.value_RA.argmax(axis=1)
        policies = matrix_policies(agents)
        answers = {policy: {row.row_id: row for row in folder.read_answers(benchmark, policy)} for policy in policies}
        scores = {policy: {row.row_id: row for row in folder.read_scores(benchmark, policy)} for policy in policies}
        chosen = [(task.row_id, policies[index]) for task, index in zip(matrix.tasks, best, strict=True)]
        kept: list[Answered] = [answers[policy][row_id].model_copy(update={"policy": ORACLE}) for row_id, policy in chosen]
        judged: list[Scored] = [scores[policy][row_id].model_copy(update={"policy": ORACLE}) for row_id, policy in chosen]
        write_lines(folder.answers(benchmark, ORACLE), kept)
        write_lines(folder.scores(benchmark, ORACLE), judged)
    info = RunInfo.model_validate_json(folder.run.read_text(encoding="utf-8"))
    if ORACLE not in info.policies:
        info = info.model_copy(update={"policies": [*info.policies, ORACLE]})
        write_whole(folder.run, info.model_dump_json(indent=2) + "\n")
