"""Every policy on the specialists' suites, and whether one that sees no labels beats `dmoa`: a line of `accept_rivals`.

What an agent says at temperature 0 is asked once and kept in the folder, so that a run goes on where it was ended. Shape letters:
S seeds, R rows.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from study_posterior import matrix_of, trained
from study_replies import Replies, replies, rows_of

from dmoa.agents.pool import load_pool
from dmoa.config import Config
from dmoa.evaluation.answer_matrix import AnswerMatrix, gate_choices, replay_choices, row_oracle
from dmoa.evaluation.statistics import compare_crossed, holm, interval
from dmoa.policies.registry import LONGEST_SCHEDULE, POLICIES, needs_labels, split_policy
from dmoa.protocols import Encoder
from dmoa.storage import write_whole
from dmoa.swarm import Swarm
from dmoa.types import FloatArray, Limits
from dmoa.workflows.backends import build_local_swarm
from tests.accept.rivals_table import Figures, Judge, Remembering, ask_all, judge_of, of_answers

SEEDS = 3
"""Draws of unlabelled queries that gates learn from, trainings, and seeds of what policies draw."""
TEST = ("test", 401)
LEARN, LEARN_FIRST_SEED = 8, 301
"""Rows of a suite that a gate, or a rival with labels, learns from; rows of the study."""
DMOA, ARMS = "dmoa", {"dmoa": "posterior", "dmoa, anchored": "anchored"}
"""What gates learn by, the default first."""
DRAWN = ("random", "random_router", "majority_k:k=3", "free_agency", "knapsack", "capacity_aware:inner=majority_k")
WHOLE = ("dense", "majority_k:k=64")
"""First-step policies that draw nothing."""
GENERALIST = "generalist"
SELDOM = ("dmoa", "single", "exploring")
"""Measured by themselves, or a way to collect rollouts."""
WRITERS = {
    **dict.fromkeys(("cot", "self_consistency", "best_of_n", "self_moa", "self_moa_seq"), ""),
    **dict.fromkeys(("moa", "smoa"), "aggregator="),
    "fusion": "judge=",
    "symbolic": "recruiter=",
    "group_chat": "manager=",
}
"""Parameter of the one agent that writes the answer: where the pool has a generalist, rivals also have it there."""
PRICE_BAR = 0.15
LOOKS, SURE_P = 5, 2e-4
"""How often a policy of several calls is judged at most, and below which p value it is asked no more: .05 over 45 policies."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one policy did: its score of every row with every seed, and what a query took."""

    value_SR: Floats
    calls: float
    tokens: float
    more: Mapping[str, Any]

    @classmethod
    def of(cls, entries: Sequence[Figures]) -> Measured:
        """Return the runs of a policy, one a seed, as one."""
        more = {key: value for entry in entries for key, value in entry.items() if key in ("lost", "first_lost")}
        calls, tokens = (float(np.mean([entry[name] for entry in entries])) for name in ("calls", "tokens"))
        value_SR = np.array([entry["values"] for entry in entries], dtype=np.float64)
        return cls(value_SR=value_SR, calls=calls, tokens=tokens, more=more)

    def figures(self) -> Figures:
        """Return accuracy over seeds with its interval over rows, and what a right answer takes."""
        found, right = interval(self.value_SR.mean(axis=0)), float(self.value_SR.mean())
        return {
            "n": self.value_SR.shape[1],
            "seeds": self.value_SR.mean(axis=1).round(4).tolist(),
            **{name: round(getattr(found, of), 4) for name, of in (("accuracy", "value"), ("low", "low"), ("high", "high"))},
            "calls": round(self.calls, 2),
            "tokens": round(self.tokens, 1),
            "tokens_per_correct": round(self.tokens / right, 1) if right else None,
            **self.more,
        }


def first_policies(config: Config, labels: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Return the policies that ask for first replies alone: the spelling of each seed by the name in the table."""
    found: dict[str, tuple[str, ...]] = {policy: (policy,) for policy in (*map("single:{}".format, config.agent_names), *WHOLE)}
    found |= {policy: (policy,) * SEEDS for policy in DRAWN}
    labelled = [name for name in POLICIES.builtin if needs_labels(name) and POLICIES[name].first_step_only]
    return found | {f"{name}, labels": tuple(f"{name}:data={path}" for path in labels) for name in labelled}


def longer_policies(config: Config, labels: Path) -> dict[str, str]:
    """Return all others, which make calls of their own: the spelling by the name in the table."""
    names = [name for name in POLICIES.builtin if not POLICIES[name].first_step_only and name not in SELDOM]
    found = {name: name for name in names if not needs_labels(name)}
    found |= {f"{name}, labels": f"{name}:data={labels}" for name in names if needs_labels(name)}
    found["moa:layers=2"] = "moa:layers=2"
    if GENERALIST in config.agent_names:
        more = [f"{name}:{WRITERS[name]}{GENERALIST}" for name in names if name in WRITERS]
        found |= {policy: policy for policy in (*more, f"moa:layers=2:aggregator={GENERALIST}")}
    return found


def suites(
    folder: Path, per_suite: int, pools: Sequence[str], longer_rows: int, only: Sequence[str], keep: Callable[[Figures], None]
) -> Figures:
    """Policies on the suites of some pools: those of one call or one step on all rows, longer ones on as many as it takes.

    `only` names the longer ones that are asked, where not all are: several processes may share the work, and the folder.
    """
    found: Figures = {"seeds": SEEDS}
    for name in pools:
        table: dict[str, Measured] = {}
        for policy, measured in measured_policies(folder, name, per_suite, longer_rows, only):
            table[policy] = measured
            entry = {"policy": policy, **measured.figures()}
            print(name, json.dumps(entry), flush=True)
            found[name] = judged(table) | {"rows": next(iter(table.values())).value_SR.shape[1], "longer_rows": longer_rows}
            keep(found)
    return found | {"passed": all(found[name]["passed"] for name in pools)}


def measured_policies(
    folder: Path, name: str, per_suite: int, longer_rows: int, only: Sequence[str]
) -> Iterator[tuple[str, Measured]]:
    """Yield the policies with what they did, `dmoa` first; those that a file in the folder has are not asked again."""
    config = load_pool(name).changed("limits", max_steps=1)
    test = replies(rows_of(TEST[0], per_suite, TEST[1]), config, folder, f"{name}-{TEST[0]}-{TEST[1]}-{per_suite}")
    learnt = [
        replies(rows_of("gate", LEARN, seed), config, folder, f"{name}-gate-{seed}-{LEARN}")
        for seed in range(LEARN_FIRST_SEED, LEARN_FIRST_SEED + SEEDS)
    ]
    matrix, embedding_RD = matrix_of(test, config)
    gates = {
        policy: of_gates(matrix, embedding_RD, learnt, config, folder / "gates" / name / arm, arm) for policy, arm in ARMS.items()
    }
    yield from gates.items()
    best = replay_choices(matrix, row_oracle(matrix))
    yield "oracle", Measured.of([{"values": best.value_R, "calls": 1, "tokens": best.tokens_R.mean()}])
    labels = [write_labels(folder / f"{name}-labels-{draw}.jsonl", found, config) for draw, found in enumerate(learnt)]
    checkpoint = next((folder / "gates" / name / ARMS[DMOA] / "0" / "gate").glob("**/gate.json")).parent
    served = config.model_copy(update={"gate": config.gate.model_copy(update={"checkpoint": str(checkpoint)})})
    with closing(Asked(served, folder / "calls", folder / "asked" / name, test)) as asked:
        for policy, spelt in first_policies(config, labels).items():
            yield policy, asked.measured(policy, spelt, len(test.rows))
        for policy, one in longer_policies(config, labels[0]).items() if longer_rows else ():
            if only and policy not in only:
                continue
            is_one_call = POLICIES[split_policy(one)[0]].cost == "1"
            for rows in looks(len(test.rows) if is_one_call else longer_rows, len(test.rows)):
                measured = asked.measured(policy, (one,), rows)
                if is_worse(measured, gates[DMOA]):
                    break
            yield policy, measured


def looks(first: int, most: int) -> list[int]:
    """Return after how many rows a policy is judged: four times as many at each look, all at the last."""
    found = [min(first, most)]
    while found[-1] < most:
        found.append(min(4 * found[-1], most))
    return found


def is_worse(measured: Measured, own: Measured) -> bool:
    """Tell whether a policy is surely less accurate than `dmoa` on the rows that both answered, which ends asking it."""
    against = compare_crossed((own.value_SR[:, : measured.value_SR.shape[1]] - measured.value_SR)[None])
    return against.difference > 0 and against.p < SURE_P


def of_gates(
    matrix: AnswerMatrix, embedding_RD: FloatArray, learnt: Sequence[Replies], config: Config, folder: Path, arm: str
) -> Measured:
    """Return what gates do that learnt, without labels, each from its own queries with its own seed."""
    found = []
    for draw, queries in enumerate(learnt):
        gate = trained(queries, config, arm, draw, folder / str(draw))
        served = replay_choices(matrix, gate_choices(gate, embedding_RD))
        found.append({"values": served.value_R, "calls": served.k_R.mean(), "tokens": served.tokens_R.mean()})
    return Measured.of(found)


def write_labels(path: Path, found: Replies, config: Config) -> Path:
    """Write replies with their scores, which rivals with labels learn from."""
    judged_rows = [
        {"query": row.task.text, "agent": agent, "reward": right}
        for row, rights in zip(found.rows, found.values(config.agent_names).tolist(), strict=True)
        for agent, right in zip(config.agent_names, rights, strict=True)
    ]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in judged_rows).encode())
    return path.absolute()


class Asked:
    """Asks policies of one pool, and keeps what each did in a folder; models are loaded when the first one is asked."""

    def __init__(self, config: Config, calls: Path, folder: Path, test: Replies) -> None:
        self._config, self._calls, self._folder, self._test = config, calls, folder, test
        self._runner = asyncio.Runner()
        self._swarm: Swarm | None = None
        self._encoder: Encoder | None = None

    def measured(self, policy: str, spelt: Sequence[str], rows: int) -> Measured:
        """Return what a policy did on the first rows, with a seed for each of its spellings."""
        name = re.sub(r"[^a-z0-9_-]+", "-", policy)
        path = self._folder / f"{name}-{rows}.json"
        if not path.exists():
            entries = [self._runner.run(self._ask(one, rows, seed)) for seed, one in enumerate(spelt)]
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(entries).encode())
        return Measured.of(json.loads(path.read_text(encoding="utf-8")))

    async def _ask(self, policy: str, rows: int, seed: int) -> Figures:
        judge: Judge = judge_of(self._test.rows)
        tasks = [row.task for row in self._test.rows[:rows]]
        if self._swarm is None:
            self._swarm = build_local_swarm(self._config, lambda text: None, self._calls)
            self._encoder = Remembering(self._swarm.encoder)
        assert self._encoder is not None
        self._swarm.encoder = Remembering(self._encoder)  # what policies remember of earlier queries hangs on it
        steps = 1 if POLICIES[split_policy(policy)[0]].first_step_only else LONGEST_SCHEDULE
        return of_answers(await ask_all(self._swarm, policy, tasks, Limits(max_steps=steps), seed), judge)

    def close(self) -> None:
        """Give the models back."""
        if self._swarm is not None:
            self._runner.run(self._swarm.close())
        self._runner.close()


def judged(table: Mapping[str, Measured]) -> Figures:
    """Return the table with `dmoa` against each, who beats it, and what a right answer takes beside `moa`.

    `dmoa` is beaten by a rival without labels that is surely better, or that ties within the interval at fewer tokens.
    """
    own, found, beaten = table[DMOA], dict[str, Figures](), []
    for policy, measured in table.items():
        rows = measured.value_SR.shape[1]
        against = compare_crossed((own.value_SR[:, :rows] - measured.value_SR)[None])
        sees = "labels" in policy or policy == "oracle"
        ties = against.low <= 0 <= against.high
        found[policy] = measured.figures() | {"sees_labels": sees}
        found[policy]["dmoa_minus_it"] = [round(x, 5) for x in (against.difference, against.low, against.high, against.p)]
        is_better = against.high < 0 or (ties and against.difference <= 0 and measured.tokens < own.tokens)
        if not sees and policy not in ARMS and is_better:
            beaten.append(policy)
    return _decided(found) | _priced(found, beaten)


def _decided(found: dict[str, Figures]) -> Figures:
    """Mark the policies of several calls that are surely less accurate; return the table, and those that are not decided yet.

    By Holm's step-down method over all of them, each p value times the looks that it may take.
    """
    asked = []
    for name, of in found.items():
        policy = split_policy(name)[0]
        is_own = name in ARMS or policy in SELDOM or of["sees_labels"]
        if not is_own and not POLICIES[policy].first_step_only:
            asked.append(name)
    adjusted = holm([min(1.0, LOOKS * found[name]["dmoa_minus_it"][3]) for name in asked])
    for name, p in zip(asked, adjusted, strict=True):
        found[name] |= {"holm_p": round(p, 5), "is_surely_worse": p < 0.05 and found[name]["dmoa_minus_it"][0] > 0}
    undecided = [name for name in asked if not found[name]["is_surely_worse"] and found[name]["n"] < found[DMOA]["n"]]
    return {"table": found, "undecided": undecided}


def _priced(found: dict[str, Figures], beaten: Sequence[str]) -> Figures:
    mixtures = {policy: of for policy, of in found.items() if split_policy(policy)[0] == "moa" and of["tokens_per_correct"]}
    price = {policy: round(found[DMOA]["tokens_per_correct"] / of["tokens_per_correct"], 4) for policy, of in mixtures.items()}
    return {
        "beaten_by": list(beaten),
        "tokens_per_correct_over_moa": price,
        "passed": not beaten and bool(price) and max(price.values()) <= PRICE_BAR,
    }
