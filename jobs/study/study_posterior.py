"""The preregistered study of what a gate learns from: raw and anchored entropy, agreement, both (posterior), and labels.

    python jobs/study/study_posterior.py --out out/study-posterior --json jobs/study/results/posterior.json

README.md of this folder says what is judged. Shape letters: D draws, R test rows, A agents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from study_replies import Replies, Values, everyone, replies, rows_of, write_rollouts

from dmoa import checkpoint
from dmoa.agents.pool import load_pool
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.core.in_step import judge
from dmoa.evaluation.answer_matrix import AnswerMatrix, Replayed, RouterChoice, gate_choices, replay_choices
from dmoa.training.cluster_router import ProbeSample
from dmoa.training.options import TrainOptions
from dmoa.training.probe import probe_pool
from dmoa.training.trainer import TrainContext, run_training
from dmoa.types import AgentReply, EntropySum, TokenUsage

POOLS = ("specialists", "specialists-generalist", "specialists-liar-constant", "specialists-liar-wrong", "specialists-colluding")
WITHOUT, RANDOM = "specialists-without-words", "specialists-liar-random"
JUDGED = (*POOLS, WITHOUT)
LIARS = {POOLS[2]: ("liar-constant",), POOLS[3]: ("liar-wrong",), RANDOM: ("liar-random",), POOLS[4]: ("liar-wrong", "liar-echo")}
ARMS = ("raw", "anchored", "agreement", "posterior", "labels")
RUNS = {
    "first": (((1, 10),), ("gate", 8, 101)),
    "second": (tuple((seed, 8) for seed in range(301, 306)), ("test", 16, 401)),
    "third": (tuple((seed, 8) for seed in range(501, 506)), ("test", 16, 601)),
    "fourth": (tuple((seed, 8) for seed in range(801, 806)), ("test", 16, 1001)),
}
"""Of each run: seeds and rows per suite of the unlabelled queries, one for all draws or one a draw; split, rows per suite and
seed of those that are judged."""
DRAWS, QUERIES = 5, 8
SURE_NATS, UNSURE_NATS = 0.001, 3.0
"""Entropies that stand for right and wrong replies in the arm `labels`; the former is that of the made-up liar too."""


def changed(table: pa.Table, values: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Return a table with some columns replaced."""
    for name, column in values.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(column, table.schema.field(place).type))
    return table


def with_nats(table: pa.Table, nats: Sequence[float], tokens: int) -> pa.Table:
    """Return a table in which every reply has that mean entropy over so many tokens."""
    sums = {"entropy_sum_nats": [n * tokens for n in nats], "entropy_sq_sum": [n * n * tokens for n in nats]}
    return changed(table, sums | {"entropy_tokens": [tokens] * len(nats)})


def with_random_liar(found: Replies) -> Replies:
    """Return the replies with one agent more, which is sure of another number each time."""
    copied = found.table.filter(pc.equal(found.table["agent"], "arith"))
    numbers = np.random.default_rng(0).integers(100, 100_000, copied.num_rows)
    liar = changed(copied, {"agent": ["liar-random"] * copied.num_rows, "text": [f"Answer: {number}" for number in numbers]})
    return replace(found, table=pa.concat_tables([found.table, with_nats(liar, [SURE_NATS] * liar.num_rows, 6)]))


def config_of(name: str) -> Config:
    """Return a pool of the study."""
    config = load_pool(name if name in POOLS else POOLS[0]).changed("limits", max_steps=1)
    agents = config.agents
    if name == WITHOUT:
        agents = tuple(agent for agent in agents if agent.name != "words")
    if name == RANDOM:
        agents = (*agents, agents[0].model_copy(update={"name": "liar-random", "profile": "Knows every number."}))
    return config.model_copy(update={"name": name, "agents": agents})


def told(table: pa.Table, arm: str, right: dict[tuple[str, str], float]) -> pa.Table:
    """Return the rollouts that an arm learns from."""
    if arm == "agreement":
        return with_nats(table, [0.0] * table.num_rows, 0)
    if arm == "labels":
        keys = zip(table["query_id"].to_pylist(), table["agent"].to_pylist(), strict=True)
        return with_nats(table, [SURE_NATS if right[key] else UNSURE_NATS for key in keys], 100)
    return table


def trained(found: Replies, config: Config, arm: str, seed: int, folder: Path) -> Gate:
    """Train a gate on the replies of some queries, or take the one that is there."""
    values = found.values(config.agent_names)
    right = {
        (row.task.row_id, agent): values[number, column]
        for number, row in enumerate(found.rows)
        for column, agent in enumerate(config.agent_names)
    }
    mine = found.table.filter(pc.is_in(found.table["agent"], pa.array(config.agent_names)))
    source = write_rollouts(replace(found, table=told(mine, arm, right)), config, folder / "rollouts")
    score = {"agreement": "posterior", "labels": "raw"}.get(arm, arm)
    options = TrainOptions.parse(
        {"rollouts": source, "out": folder / "gate", "score": score, "seed": seed, "workers": 0, "track": "none"}
    )
    return checkpoint.load(run_training(options, config, TrainContext()).checkpoint)[0]


def matrix_of(found: Replies, config: Config) -> tuple[AnswerMatrix, Values]:
    """Return the test rows as a matrix of the pool's agents, and the embeddings of their queries."""
    by_row: dict[str, dict[str, dict[str, Any]]] = {}
    for line in found.table.to_pylist():
        by_row.setdefault(line["query_id"], {})[line["agent"]] = line
    ids = [row.task.row_id for row in found.rows]
    matrix = AnswerMatrix(
        benchmark="suites",
        agents=config.agent_names,
        tasks=tuple(row.task for row in found.rows),
        replies=tuple(tuple(reply_of(by_row[row][agent]) for agent in config.agent_names) for row in ids),
        value_RA=found.values(config.agent_names),
    )
    contexts = [next(iter(by_row[row].values()))["context"] for row in ids]
    return matrix, np.array([context[: len(context) // 2] for context in contexts], dtype=np.float32)


def reply_of(line: dict[str, Any]) -> AgentReply:
    """Return a row of rollouts as the reply it was."""
    sums = EntropySum(sum_nats=line["entropy_sum_nats"], sq_sum=line["entropy_sq_sum"], tokens=line["entropy_tokens"])
    usage = TokenUsage(prompt_tokens=line["prompt_tokens"], completion_tokens=line["completion_tokens"])
    return AgentReply(
        agent=line["agent"],
        status=line["status"],
        text=line["text"],
        finish_reason=line["finish_reason"],
        entropy=sums,
        usage=usage,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What one gate does on the test rows."""

    first_R: Values
    """Whether the most probable agent is right."""
    lies_R: Values
    """Whether it is a liar."""
    served: Replayed
    probability_R: Values
    """Of the leading answer as served; NaN without a label model."""


def shown(gate: Gate, matrix: AnswerMatrix, embedding_RD: Values, liars: Sequence[str]) -> Shown:
    """Replay a gate on the test rows."""
    choices = gate_choices(gate, embedding_RD)
    served = replay_choices(matrix, choices)
    rows = np.arange(len(matrix.tasks))
    found = [leading(matrix, row, choice, served.asked_RA[row]) for row, choice in enumerate(choices)]
    return Shown(
        first_R=matrix.value_RA[rows, served.first_R],
        lies_R=np.isin(served.first_R, [matrix.agents.index(name) for name in liars]),
        served=served,
        probability_R=np.array(found),
    )


def leading(matrix: AnswerMatrix, row: int, choice: RouterChoice, asked_A: Values) -> float:
    """Return how probably the leading answer of those asked is right; NaN without a label model."""
    active = [matrix.replies[row][agent] for agent in np.flatnonzero(asked_A)]
    found = judge(choice.judged_by, active, asked=matrix.tasks[row].text)
    return float("nan") if found is None else found.probability


def of_all(gate: Gate, matrix: AnswerMatrix, embedding_RD: Values) -> Replayed:
    """Return what asking everybody comes to where the gate's label model, if any, chooses the answer."""
    everybody = [
        replace(choice, k=len(matrix.agents)) for choice in gate_choices(gate, embedding_RD, max_agents=len(matrix.agents))
    ]
    return replay_choices(matrix, everybody)


def calibration_error(probability: Values, right: Values) -> float:
    """Return the expected calibration error over ten bins of equal width."""
    bins = np.minimum((probability * 10).astype(int), 9)
    return float(sum(abs((probability - right)[bins == b].sum()) for b in range(10)) / len(bins))


def over_draws(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over draws and its interval by Student's t."""
    value = np.array(values, dtype=np.float64)
    half = float(_T4 * value.std(ddof=1) / np.sqrt(len(value)))
    return {
        "mean": float(value.mean()),
        "low": float(value.mean()) - half,
        "high": float(value.mean()) + half,
        "draws": value.tolist(),
    }


_T4 = 2.7764451
"""Student's t with four degrees of freedom, 97.5 %."""


def judge_pool(name: str, gates: Callable[[str, int], Gate], test: Replies) -> dict[str, Any]:
    """Return the figures of one pool, by arm."""
    config = config_of(name)
    matrix, embedding_RD = matrix_of(test, config)
    found: dict[str, Any] = {
        "single": dict(zip(matrix.agents, matrix.value_RA.mean(axis=0).round(4).tolist(), strict=True)),
        "oracle": float(matrix.value_RA.max(axis=1).mean()),
        "tokens_of_all": float(matrix.tokens().sum(axis=1).mean()),
    }
    for arm in ARMS:
        each = [shown(gates(arm, draw), matrix, embedding_RD, LIARS.get(name, ())) for draw in range(DRAWS)]
        found[arm] = {
            "first": over_draws([one.first_R.mean() for one in each]),
            "liars_first": over_draws([one.lies_R.mean() for one in each]),
            "served": over_draws([one.served.accuracy for one in each]),
            "agents": over_draws([one.served.k_R.mean() for one in each]),
            "tokens": over_draws([one.served.tokens_R.mean() for one in each]),
        }
        probability, right = (
            np.concatenate(parts) for parts in zip(*[(o.probability_R, o.served.value_R) for o in each], strict=True)
        )
        if arm == "posterior":
            found[arm]["ece"] = calibration_error(probability, right)
            found["all"] = over_draws([of_all(gates(arm, draw), matrix, embedding_RD).accuracy for draw in range(DRAWS)])
        ties = {
            other: np.array(found[arm]["first"]["draws"]) - found[other]["first"]["draws"] for other in ARMS if other in found
        }
        found[arm]["less"] = {other: over_draws(values.tolist()) for other, values in ties.items() if other != arm}
    return found


def probed(queries: Replies, config: Config) -> dict[str, Any]:
    """Return which agents `dmoa probe` says of a draw's unlabelled queries that they say the same wrong thing, or may."""
    matrix, embedding_RD = matrix_of(queries, config)
    nats = [[reply.entropy.mean_nats for reply in row] for row in matrix.replies]
    sample = ProbeSample(
        agents=matrix.agents,
        sources=tuple(row.task.benchmark for row in queries.rows),
        embedding_RD=embedding_RD,
        entropy_RA=np.array(nats, dtype=np.float64),
        texts=tuple(tuple(reply.text for reply in row) for row in matrix.replies),
        heard_RA=np.ones((len(nats), len(matrix.agents)), dtype=np.bool_),
        tokens_RA=matrix.tokens().astype(np.float64),
    )
    answers = probe_pool(sample).answers
    return {"colluding": list(answers.colluding), "disputed": [[one.a, one.b] for one in answers.disputed]}


def main() -> None:
    """Ask, train and judge, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pools", nargs="+", choices=(*JUDGED, RANDOM), default=(*JUDGED, RANDOM))
    parser.add_argument("--run", choices=tuple(RUNS), default="fourth")
    options = parser.parse_args()
    asked = everyone([name for name in POOLS if name in options.pools])
    unlabelled, judged = RUNS[options.run]
    parts = [with_random_liar(replies(rows_of("gate", n, seed), asked, options.out, f"gate-{seed}")) for seed, n in unlabelled]
    draws = [parts[draw] if len(parts) == DRAWS else drawn(parts[0], draw) for draw in range(DRAWS)]
    for name in options.pools:  # before any test row is answered
        for arm in ARMS:
            for draw, queries in enumerate(draws):
                trained(queries, config_of(name), arm, draw, options.out / "gates" / name / arm / str(draw))
        print(f"{name}: trained", flush=True)
    test = with_random_liar(replies(rows_of(*judged), asked, options.out, f"{judged[0]}-{judged[2]}"))
    for name in options.pools:
        gates = gates_in(options.out / "gates" / name)
        found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        found[name] = judge_pool(name, gates, test)
        found[name]["probe"] = [probed(queries, config_of(name)) for queries in draws]
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, {arm: round(found[name][arm]["first"]["mean"], 3) for arm in ARMS}, flush=True)


def gates_in(folder: Path) -> Callable[[str, int], Gate]:
    """Return what finds a trained gate by arm and draw."""
    return lambda arm, draw: checkpoint.load(folder / arm / str(draw) / "gate" / "checkpoint")[0]


def drawn(found: Replies, draw: int) -> Replies:
    """Return some queries of every suite."""
    rng = np.random.default_rng(draw)
    suites = np.array([row.task.benchmark for row in found.rows])
    numbers = [rng.permutation(np.flatnonzero(suites == suite))[:QUERIES] for suite in dict.fromkeys(suites.tolist())]
    return found.only(sorted(np.concatenate(numbers).tolist()))


if __name__ == "__main__":
    main()
