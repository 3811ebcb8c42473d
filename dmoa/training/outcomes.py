"""Outcomes that a user knows of: how good an answer or one agent's reply was, read checked and joined with rollouts.

They are a table of their own that the user hands over; labels of benchmarks are not read here, nor anywhere in training. What
comes out is credit per reply to the first step, for `core/label_model` (`Witnesses.outcome_RA`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, ValidationError, model_validator

from dmoa.core.aggregate import select_contribution
from dmoa.core.answers import extract_answer, same_answer
from dmoa.engines.recorded import agent_name, read_lines
from dmoa.errors import ConfigError
from dmoa.feedback import MARK
from dmoa.training.rollouts import FileRecord
from dmoa.types import AgentReply, Answer, EntropySum, is_untrained
from dmoa.validation import describe

Credit = Mapping[tuple[str, str], float]
"""(query_id, agent) -> reward of the agent's reply to the first step, 0 to 1."""
_COLUMNS = (
    "query_id", "step", "agent", "is_selected", "text", "status", "finish_reason", "entropy_sum_nats", "entropy_tokens",
    "entropy_kind", "gate_version", "final_text",
)  # fmt: skip


class Outcome(FileRecord):
    """One outcome: a line of a file of outcomes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    query_id: str | None = Field(default=None, min_length=1)
    """Which query, as the rollouts call it."""
    trace_id: str | None = Field(default=None, min_length=1)
    """Or which trace: one asking of a query."""
    agent: str | None = Field(default=None, min_length=1)
    """Whose reply was judged; null: the final answer."""
    step: int | None = Field(default=None, ge=0)
    """Which of its replies; null: that to the first step. Those to later steps credit nothing yet."""
    reward: float = Field(ge=0, le=1)
    """How good it was: 1 right, 0 wrong."""
    source: str = ""
    """Who or what judged, such as `users` or `unit tests`."""

    @model_validator(mode="after")
    def _names_one_query(self) -> Self:
        if (self.query_id is None) == (self.trace_id is None):
            seen = "both are given" if self.query_id is not None else "both are missing"
            raise ValueError(f"query_id, trace_id: {seen}; expected one of the two")
        return self


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """Read a file of outcomes, JSON Lines (also .gz). Raises ConfigError naming file, line, field and what is expected."""
    found = []
    try:
        for number, line in read_lines(path):
            try:
                found.append(Outcome.model_validate_json(line))
            except ValidationError as error:
                raise ConfigError(f"{path}, line {number}: {describe(error, Outcome)}") from None
    except ConfigError as error:
        raise ConfigError(f"--outcomes: {error}") from error
    if not found:
        raise ConfigError(f"--outcomes: {str(path)!r} holds no outcome; write one a line, such as {_EXAMPLE}")
    return tuple(found)


_EXAMPLE = '{"query_id": "q1", "agent": null, "reward": 1, "source": "users"}'


def authors(answer: Answer) -> list[str]:
    """Return the agents whose first reply gave the final answer of a query of the traffic, whose texts are tokens."""
    counted = {name for step in answer.steps for name in step.active}
    return [reply.agent for reply in answer.steps[0].replies if reply.agent in counted and reply.text == answer.text]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credited:
    """Outcomes as they bear on the replies of rollouts."""

    credit: Credit
    """Mean reward of each reply that was judged, or that gives the answer that was."""
    places: frozenset[int]
    """Which outcomes credit some reply, by their place among those given; the others are of queries or agents that the rollouts
    do not have, of answers that no agent gave or that are not known, and of later steps."""

    def array(self, queries: Sequence[str], agents: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the rewards as an array [R, A] of float64, NaN where nothing is known."""
        return np.array([[self.credit.get((query, name), np.nan) for name in agents] for query in queries]).reshape(
            len(queries), len(agents)
        )


def rollout_trace_id(query_id: str, seed: int, round_: int) -> str:
    """Return the trace id under which a collection asks a query: it depends on query, seed and round alone."""
    return hashlib.sha256(f"{query_id}\0{seed}\0{round_}".encode()).hexdigest()[:32]


def credit_replies(outcomes: Iterable[Outcome], rollouts: pa.Table, *, seed: int, round_: int) -> Credited:
    """Join outcomes with a table of rollouts that was collected with that seed and in that round.

    An outcome of an agent is that of its reply to the first step. One of the final answer, agent null, credits the selected
    agents whose reply to the first step gives that answer. Files from before `final_text` do not hold it: of an untrained gate
    it follows from the last step, by the rule of summarizer mode `select` over raw scores; of a trained one it is not known.
    """
    queries = _replies_by_query(rollouts)
    by_trace = {rollout_trace_id(query, seed, round_): query for query in queries}
    by_trace |= {query.removeprefix(MARK): query for query in queries if query.startswith(MARK)}
    rewards: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    places = set[int]()
    for place, outcome in enumerate(outcomes):
        query = outcome.query_id if outcome.query_id is not None else by_trace.get(outcome.trace_id or "")
        steps = queries.get(query or "", {})
        names = [] if outcome.step else _credited(steps, outcome.agent)
        for name in names:
            rewards[query or "", name].append(outcome.reward)
        places |= {place} if names else set()
    credit = {key: float(np.mean(values)) for key, values in rewards.items()}
    return Credited(credit=credit, places=frozenset(places))


def no_outcome_fits(count: int, of: str = "these rollouts", remedy: str = "collect rollouts of those queries") -> ConfigError:
    """Return the error of outcomes none of which is `of` what was asked."""
    return ConfigError(
        f"--outcomes: none of {count} outcomes is of a query and an agent of {of}; name queries as their query_id does, "
        f"or {remedy}"
    )


_Steps = dict[int, list[dict[str, Any]]]


def _replies_by_query(rollouts: pa.Table) -> dict[str, _Steps]:
    found: dict[str, _Steps] = {}
    for row in rollouts.select(list(_COLUMNS)).to_pylist():
        if row["status"] == "ok":
            found.setdefault(row["query_id"], {}).setdefault(row["step"], []).append(row)
    return found


def _credited(steps: _Steps, agent: str | None) -> list[str]:
    """Return whose reply to the first step an outcome speaks of."""
    first = steps.get(0, [])
    if agent is not None:
        return [row["agent"] for row in first if row["agent"] in (agent, agent_name(agent))]
    selected = {row["agent"] for rows in steps.values() for row in rows if row["is_selected"]}
    final = _final_answer(steps)
    if final is None:
        return []
    return [row["agent"] for row in first if row["agent"] in selected and _gives(row["text"], final)]


def _final_answer(steps: _Steps) -> str | None:
    """Return what the query was answered with; None where that is not known."""
    for row in steps.get(0, []):
        if row["final_text"]:
            return str(row["final_text"])
    last = steps.get(max(steps, default=0), [])
    if any(not is_untrained(row["gate_version"]) for row in last):
        return None
    replies = [
        AgentReply(
            agent=row["agent"],
            status="ok",
            text=row["text"],
            finish_reason=row["finish_reason"],
            entropy=EntropySum(sum_nats=row["entropy_sum_nats"], tokens=row["entropy_tokens"], kind=row["entropy_kind"]),
        )
        for row in last
        if row["is_selected"]
    ]
    selection = select_contribution(replies)
    return selection.text if selection else None


def _gives(text: str, final: str) -> bool:
    """Tell whether a reply gives the answer of another text; what has no answer that can be read agrees word for word."""
    mine, theirs = extract_answer(text), extract_answer(final)
    if mine is None or theirs is None:
        return text.split() == final.split()
    return same_answer(mine, theirs)
