"""The answer matrix: what every agent of a pool answers, alone, to every row of a benchmark; and routers replayed over it.

It is an ordinary evaluation run of the policies `single:AGENT`, read back as arrays. Routers that pick agents from a single
step are compared by exact, paired replay, without asking anyone again. Shape letters: R rows, A agents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dmoa.core.aggregate import RAW, Anchors, is_any_sure, select_contribution
from dmoa.core.features import gate_input
from dmoa.core.gate import Gate
from dmoa.core.in_step import judge
from dmoa.core.inference import Decider
from dmoa.errors import ConfigError
from dmoa.evaluation.records import Answered, RunInfo, Scored, Task
from dmoa.evaluation.run_folder import RunFolder, read_record, write_lines, write_whole
from dmoa.types import AgentReply, EntropySum, FloatArray, RouteDecision, RouteRequest

Floats = npt.NDArray[np.float64]

ORACLE = "oracle"
"""On every row the best of the agents that answered it alone."""
Choices = Mapping[str, npt.NDArray[np.integer]]
"""Benchmark -> index of the agent chosen for each row [R], in the order of the tasks."""


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
            [[np.nan if reply.entropy.mean_nats is None else reply.entropy.mean_nats for reply in row] for row in self.replies]
        ).reshape(len(self.tasks), len(self.agents))

    def tokens(self) -> npt.NDArray[np.int64]:
        """Return the prompt and completion tokens of each reply, [R, A]."""
        counts = [[reply.usage.total for reply in row] for row in self.replies]
        return np.array(counts, dtype=np.int64).reshape(len(self.tasks), len(self.agents))

    def rows(self, indices: Sequence[int]) -> AnswerMatrix:
        """Return the matrix of some rows, in the order given."""
        tasks, replies = tuple(self.tasks[i] for i in indices), tuple(self.replies[i] for i in indices)
        return replace(self, tasks=tasks, replies=replies, value_RA=self.value_RA[list(indices)])

    def only(self, agents: Sequence[str]) -> AnswerMatrix:
        """Return the matrix of some agents, in the order given. Raises ConfigError for one that is not in it."""
        missing = [name for name in agents if name not in self.agents]
        if missing:
            raise ConfigError(f"agents: the matrix does not hold {', '.join(missing)}; name some of {', '.join(self.agents)}")
        columns = [self.agents.index(name) for name in agents]
        replies = tuple(tuple(row[column] for column in columns) for row in self.replies)
        return replace(self, agents=tuple(agents), replies=replies, value_RA=self.value_RA[:, columns])


def matrix_policies(agents: Sequence[str]) -> tuple[str, ...]:
    """Return the policies whose evaluation fills a matrix."""
    return tuple(f"single:{agent}" for agent in agents)


def read_matrix(folder: RunFolder, benchmark: str, agents: Sequence[str]) -> AnswerMatrix:
    """Read a benchmark's matrix from a finished run. Raises ConfigError where an answer, or its score, is missing."""
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
        entropy=EntropySum(sum_nats=(row.entropy_nats or 0.0) * tokens, tokens=tokens),
        usage=row.usage,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterChoice:
    """Whom a router asks for one row."""

    ranking: tuple[int, ...]
    """Indices of agents, the preferred first."""
    k: int
    """How many of the ranking are asked at once."""
    theta: float | None = None
    """While the surest reply's score is above it, the next-ranked agent is asked too; None: never."""
    limit: int = 1
    """Most agents that may come to be asked."""
    anchors: tuple[float, ...] | None = None
    """Per agent, what the anchored score subtracts; None: raw scores."""
    judged_by: RouteDecision | None = None
    """The gate's decision where it has a label model, which then says whom to ask next and whose reply wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a router would have done on a matrix."""

    value_R: Floats
    """Score of the winning reply, 0 where nobody contributed."""
    first_R: npt.NDArray[np.int64]
    """Index of the router's first choice."""
    chosen_R: npt.NDArray[np.int64]
    """Index of the agent whose reply won; -1 where nobody contributed."""
    k_R: npt.NDArray[np.int64]
    """Agents asked, those of the cascade included."""
    tokens_R: npt.NDArray[np.int64]
    """Prompt and completion tokens of the agents asked."""
    asked_RA: npt.NDArray[np.bool_]
    """Whether an agent was asked at all, those of the cascade included."""

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return float(self.value_R.mean())


def choice_of(decision: RouteDecision) -> RouterChoice:
    """Return a gate's decision as a choice."""
    return RouterChoice(
        ranking=decision.ranking,
        k=decision.k,
        theta=decision.theta,
        limit=decision.limit,
        anchors=decision.anchors,
        judged_by=decision if decision.label_model is not None else None,
    )


def replay_choices(matrix: AnswerMatrix, choices: Sequence[RouterChoice]) -> Replayed:
    """Replay one choice per row of the matrix."""
    rows = [_row(matrix, row, choice) for row, choice in enumerate(choices)]
    if len(rows) != len(matrix.tasks):
        raise ValueError(f"choices: {len(rows)} for {len(matrix.tasks)} rows; give one per row")
    chosen = np.array([winner for winner, _, _ in rows], dtype=np.int64)
    k, tokens = (np.array(column, dtype=np.int64) for column in ([len(asked) for _, asked, _ in rows], [n for _, _, n in rows]))
    value_R = np.where(chosen >= 0, matrix.value_RA[np.arange(len(rows)), chosen], 0.0)
    first = np.array([choice.ranking[0] for choice in choices], dtype=np.int64)
    asked_RA = np.zeros((len(rows), len(matrix.agents)), dtype=np.bool_)
    for row, (_, asked, _) in enumerate(rows):
        asked_RA[row, asked] = True
    return Replayed(value_R=value_R, first_R=first, chosen_R=chosen, k_R=k, tokens_R=tokens, asked_RA=asked_RA)


def _row(matrix: AnswerMatrix, row: int, choice: RouterChoice) -> tuple[int, list[int], int]:
    """Return (agent that won or -1, agents asked, tokens) of one row."""
    anchors = dict(zip(matrix.agents, choice.anchors, strict=True)) if choice.anchors else RAW
    asked = list(choice.ranking[: choice.k])
    while (another := _another(matrix, row, choice, asked, anchors)) is not None:
        asked.append(another)
    active = [matrix.replies[row][index] for index in asked]
    judgement = judge(choice.judged_by, active, asked=matrix.tasks[row].text)
    selection = (judgement.selection if judgement else None) or select_contribution(active, anchors, asked=matrix.tasks[row].text)
    winner = -1 if selection is None else matrix.agents.index(selection.agent)
    return winner, asked, sum(reply.usage.total for reply in active)


def _another(matrix: AnswerMatrix, row: int, choice: RouterChoice, asked: Sequence[int], anchors: Anchors) -> int | None:
    """Return the agent that the step asks after those asked, as `step_calls` does; None: it ends."""
    left = [index for index in choice.ranking if index not in asked]
    active = [matrix.replies[row][index] for index in asked]
    if not left or sum(reply.status == "ok" for reply in active) >= choice.limit:  # lost agents take no place
        return None
    judgement = judge(choice.judged_by, active, [matrix.agents[index] for index in left], asked=matrix.tasks[row].text)
    if judgement is not None and judgement.right:
        return matrix.agents.index(judgement.worthwhile[0]) if judgement.worthwhile else None
    is_sure = choice.theta is None or is_any_sure(active, choice.theta, anchors)
    return left[0] if judgement is not None or not is_sure else None


def gate_choices(
    gate: Gate, embedding_RD: FloatArray, *, cascades: bool = True, max_agents: int | None = None
) -> list[RouterChoice]:
    """Return what a gate decides at the first step of every row, through the very code that serves.

    `cascades` False leaves the cascade out; `max_agents` lowers K, as a query's limit does.
    """
    decider = Decider(gate, "replay")
    requests = [RouteRequest(input_X=gate_input(gate.spec.preset, query_D), max_agents=max_agents) for query_D in embedding_RD]
    choices = [choice_of(decision) for decision in decider.decide(requests)]
    if cascades:
        return choices
    return [RouterChoice(ranking=choice.ranking, k=choice.k, anchors=choice.anchors) for choice in choices]


def one_agent(matrix: AnswerMatrix, agent: str) -> list[RouterChoice]:
    """Return the choice of one agent for every row."""
    return ranked(np.full((len(matrix.tasks), 1), matrix.agents.index(agent)))


def everyone(matrix: AnswerMatrix) -> list[RouterChoice]:
    """Return the choice of all agents for every row, in the pool's order."""
    count = len(matrix.agents)
    return ranked(np.tile(np.arange(count), (len(matrix.tasks), 1)), k=count)


def row_oracle(matrix: AnswerMatrix) -> list[RouterChoice]:
    """Return, with knowledge of the labels, an agent whose reply scores best on each row; of equals the pool's first."""
    return ranked(np.argsort(-matrix.value_RA, axis=1, kind="stable"))


def ranked(ranking_RA: npt.NDArray[np.integer], k: int = 1) -> list[RouterChoice]:
    """Return the first k agents of every row's ranking."""
    rows: Sequence[Sequence[int]] = ranking_RA.tolist()
    return [RouterChoice(ranking=tuple(row), k=k) for row in rows]


def add_oracle(folder: RunFolder, benchmarks: Sequence[str], agents: Sequence[str]) -> None:
    """Add the oracle's lines; of equal agents the first counts. Raises ConfigError where the run is not whole."""
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
    info = read_record(folder.run, RunInfo)
    if name not in info.derived:
        info = info.model_copy(update={"derived": [*info.derived, name]})
        write_whole(folder.run, info.model_dump_json(indent=2) + "\n")
