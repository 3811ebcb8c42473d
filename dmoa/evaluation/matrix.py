"""The answer matrix: what every agent of a pool answers, alone, to every row of a benchmark, generated once.

It is an ordinary evaluation run of the policies `single:AGENT`, read back as arrays. Routers that pick agents from a single
step are then compared by exact, paired replay (`evaluation/matrix_replay`), without asking anyone again.
Shape letters: R rows, A agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmoa.errors import ConfigError
from dmoa.evaluation.records import Answered, Scored, Task
from dmoa.evaluation.run_files import RunFolder
from dmoa.types import AgentReply

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMatrix:
    """One benchmark answered by every agent alone."""

    benchmark: str
    agents: tuple[str, ...]
    tasks: tuple[Task, ...]
    """R rows, in the order of the sample."""
    replies: tuple[tuple[AgentReply, ...], ...]
    """[R][A]: as the orchestrator would have seen them, in the order of `agents`."""
    value_RA: Floats
    """Score of each reply, 0..1."""

    def entropies(self) -> Floats:
        """Return the mean predictive entropy in nats per token; [R, A]; NaN where nothing was generated."""
        return np.array(
            [[np.nan if reply.entropy_nats is None else reply.entropy_nats for reply in row] for row in self.replies]
        ).reshape(len(self.tasks), len(self.agents))

    def tokens(self) -> npt.NDArray[np.int64]:
        """Return the prompt and completion tokens of each reply, [R, A]."""
        counts = [[reply.prompt_tokens + reply.completion_tokens for reply in row] for row in self.replies]
        return np.array(counts, dtype=np.int64).reshape(len(self.tasks), len(self.agents))

    def rows(self, indices: Sequence[int]) -> AnswerMatrix:
        """Return the matrix of some rows, in the order given."""
        return AnswerMatrix(
            benchmark=self.benchmark,
            agents=self.agents,
            tasks=tuple(self.tasks[i] for i in indices),
            replies=tuple(self.replies[i] for i in indices),
            value_RA=self.value_RA[list(indices)],
        )

    def only(self, agents: Sequence[str]) -> AnswerMatrix:
        """Return the matrix of some agents, in the order given. Raises ConfigError for one that is not in it."""
        missing = [name for name in agents if name not in self.agents]
        if missing:
            raise ConfigError(
                f"agents: value seen: {', '.join(missing)}; allowed: {', '.join(self.agents)}; name agents that the matrix holds"
            )
        columns = [self.agents.index(name) for name in agents]
        return AnswerMatrix(
            benchmark=self.benchmark,
            agents=tuple(agents),
            tasks=self.tasks,
            replies=tuple(tuple(row[column] for column in columns) for row in self.replies),
            value_RA=self.value_RA[:, columns],
        )


def matrix_policies(agents: Sequence[str]) -> tuple[str, ...]:
    """Return the policies whose evaluation fills a matrix."""
    return tuple(f"single:{agent}" for agent in agents)


def read_matrix(folder: RunFolder, benchmark: str, agents: Sequence[str]) -> AnswerMatrix:
    """Read the matrix of a benchmark from a finished run.

    Raises ConfigError where an agent has not answered every row, or an answer has not been judged.
    """
    tasks = tuple(folder.read_tasks(benchmark))
    columns, values = [], []
    for agent, policy in zip(agents, matrix_policies(agents), strict=True):
        answers = {row.row_id: row for row in folder.read_answers(benchmark, policy)}
        scores = {row.row_id: row for row in folder.read_scores(benchmark, policy)}
        _check_whole(folder, benchmark, policy, tasks, answers, scores)
        columns.append([_reply(agent, answers[task.row_id]) for task in tasks])
        values.append([scores[task.row_id].value for task in tasks])
    return AnswerMatrix(
        benchmark=benchmark,
        agents=tuple(agents),
        tasks=tasks,
        replies=tuple(zip(*columns, strict=True)),
        value_RA=np.array(values, dtype=np.float64).T.reshape(len(tasks), len(agents)),
    )


def _check_whole(
    folder: RunFolder,
    benchmark: str,
    policy: str,
    tasks: Sequence[Task],
    answers: dict[str, Answered],
    scores: dict[str, Scored],
) -> None:
    missing = sum(task.row_id not in answers or task.row_id not in scores for task in tasks)
    if missing or not tasks:
        raise ConfigError(
            f"answer matrix: {str(folder.root)!r} lacks {missing} of {len(tasks)} rows of {benchmark} by {policy}; finish it: "
            f"dmoa evaluate --benchmarks {benchmark} --policies {policy} --out {folder.root} --resume"
        )


def _reply(agent: str, row: Answered) -> AgentReply:
    """Return an answer as the reply it was; its entropy sum is mean times tokens, which is all that selection reads."""
    if row.status == "failed":
        return AgentReply(agent=agent, status="failed", error=row.error)
    tokens = row.completion_tokens if row.entropy_nats is not None else 0
    return AgentReply(
        agent=agent,
        status="ok",
        text=row.text,
        finish_reason="length" if row.finish_reason == "length" else "stop",
        entropy_sum_nats=(row.entropy_nats or 0.0) * tokens,
        entropy_tokens=tokens,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        completion_tokens=row.completion_tokens,
    )
