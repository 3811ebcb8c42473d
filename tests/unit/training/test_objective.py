"""The loss of whole queries beside a slow reference in plain Python, its gradient, and the optimum of a problem that has one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dmoa import checkpoint
from dmoa.config import GateConfig
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.testing import AGENTS, write_rollouts
from dmoa.testing import CONTEXT_DIM as DIM
from dmoa.testing import rollout_row as row
from dmoa.testing import scripted_pool as pool
from dmoa.training.dataset import COLUMNS, EpisodeBuilder, Episodes
from dmoa.training.gate_metrics import held_metrics, logits_of, measure_gate, ranking_of
from dmoa.training.objective import Batches, Split, anchor_sample, batch_loss, build_data, fit_scale, split_episodes, unroll
from dmoa.training.options import TrainOptions
from dmoa.training.rollouts import LATER_COLUMNS
from dmoa.training.trainer import FittedTargets, fit_spec
from tests.unit.training.in_process import train

CPU = torch.device("cpu")


def ragged_rows() -> list[dict[str, Any]]:
    """Five queries of one to three steps: replies of different lengths, cut ones, failed ones, agents that were not asked."""
    rng = np.random.default_rng(7)
    rows = []
    for number, length in enumerate((1, 3, 2, 1, 2)):
        for step in range(length):
            context = rng.standard_normal(2 * DIM) / np.sqrt(DIM)
            for agent in AGENTS:
                tokens = int(rng.integers(1, 30))
                nats = float(rng.uniform(0.01, 2.0))
                changes: dict[str, Any] = {
                    "num_steps": length,
                    "entropy_tokens": tokens,
                    "entropy_sum_nats": tokens * nats,
                    "entropy_sq_sum": tokens * (nats * nats + float(rng.uniform(0.0, 0.5))),
                    "feedback": rng.uniform(0, 1, 4).astype(np.float32),
                }
                if (number, step, agent) == (1, 0, "two"):
                    changes["finish_reason"] = "length"
                if (number, step, agent) == (1, 2, "three"):
                    changes |= {"status": "failed", "entropy_tokens": 0, "entropy_sum_nats": 0.0, "entropy_sq_sum": 0.0}
                if (number, step, agent) == (2, 1, "one"):
                    changes["propensity"] = 0.01
                if (number, step, agent) == (4, 0, "three"):
                    continue
                rows.append(row(f"q{number}", step, agent, nats, context, **changes))
    # All rows of a step share what the gate read.
    shared: dict[tuple[str, int], dict[str, Any]] = {}
    for value in rows:
        first = shared.setdefault((value["query_id"], value["step"]), value)
        value["feedback"] = first["feedback"]
    return rows


def episodes_of(rows: list[dict[str, Any]]) -> Episodes:
    builder = EpisodeBuilder(AGENTS, 2 * DIM + 4, has_feedback=True)
    order = np.random.default_rng(0).permutation(len(rows))
    for part in (order[::2], order[1::2]):
        builder.add(pa.table({name: [(LATER_COLUMNS | rows[i])[name] for i in part] for name in COLUMNS}), 0)
    return builder.build()


def gate_of(head: str = "linear") -> Gate:
    spec = GateSpec.from_config(GateConfig(hidden=6, head=head), AGENTS)  # type: ignore[arg-type]
    profiles = torch.from_numpy(np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32) / math.sqrt(DIM))
    return init_gate(spec, seed=2, profile_AD=profiles if head == "profile" else None).double()


def sigmoid(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return 1 / (1 + np.exp(-x))


def slow_logits(gate: Gate, rows: list[dict[str, Any]]) -> dict[tuple[str, int], np.ndarray]:  # type: ignore[type-arg]
    """The gate's logits of every step, by torch's GRUCell written out for one query at a time."""
    w = {name: tensor.detach().numpy() for name, tensor in gate.named_parameters()}
    head, bias = (tensor.detach().numpy() for tensor in gate.head())
    inputs = {(r["query_id"], r["step"]): np.concatenate([r["context"], r["feedback"]]).astype(np.float64) for r in rows}
    found, hidden = {}, np.zeros(6)
    for query, step in sorted(inputs):
        hidden = np.zeros(6) if step == 0 else hidden
        a = w["weight_ih"] @ inputs[query, step] + w["bias_ih"]
        b = w["weight_hh"] @ hidden + w["bias_hh"]
        reset, update = sigmoid(a[:6] + b[:6]), sigmoid(a[6:12] + b[6:12])
        new = np.tanh(a[12:] + reset * b[12:])
        hidden = (1 - update) * new + update * hidden
        found[query, step] = head @ hidden + bias
    return found


def slow_soft_loss(gate: Gate, rows: list[dict[str, Any]], eta: float) -> float:
    """The soft loss by its definition: sum over steps and pairs, with ranks, chance gaps, lengths, propensities and cuts."""
    logits, steps = slow_logits(gate, rows), defaultdict(list)
    for value in rows:
        if value["status"] == "ok" and value["entropy_tokens"]:
            steps[value["query_id"], value["step"]].append(value)
    total = weight_sum = 0.0
    for place, replies in steps.items():
        n = [r["entropy_tokens"] for r in replies]
        mean = [r["entropy_sum_nats"] / k for r, k in zip(replies, n, strict=True)]
        # Variance of log(mean + 1e-3): that of the mean, by the delta method.
        noise = [(r["entropy_sq_sum"] / k - m * m) / k / (m + 1e-3) ** 2 for r, k, m in zip(replies, n, mean, strict=True)]
        cut = [20.0 * (r["finish_reason"] == "length") for r in replies]
        s = [math.log(m + 1e-3) + c for m, c in zip(mean, cut, strict=True)]
        rank = [1 + sum(other < one for other in s) for one in s]
        say = [k / (k + 4) * min(1 / r["propensity"], 20.0) for r, k in zip(replies, n, strict=True)]
        z = [logits[place][AGENTS.index(r["agent"])] for r in replies]
        for a in range(len(s)):
            for b in range(a + 1, len(s)):
                q, p = float(sigmoid(np.array((s[b] - s[a]) / eta))), float(sigmoid(np.array((z[a] - z[b]) / 0.1)))
                weight = say[a] * say[b] * abs(1 / math.log2(1 + rank[a]) - 1 / math.log2(1 + rank[b]))
                if abs(s[a] - s[b]) < math.sqrt(noise[a] + noise[b]):
                    weight /= 2
                total -= weight * (q * math.log(p) + (1 - q) * math.log(1 - p))
                weight_sum += weight
    return total / weight_sum


def data_of(episodes: Episodes) -> Any:
    split = Split(train_Q=np.arange(3), held_Q=np.arange(3, 5))
    scale = fit_scale(episodes, split, anchor_sample(episodes, split.train_Q, DIM), score="raw", num_clusters=2, seed=0)
    return build_data(episodes, split, scale)


@pytest.mark.parametrize("head", ["linear", "profile"])
def test_the_loss_of_ragged_queries_is_that_of_the_slow_reference(head: str) -> None:
    rows, gate = ragged_rows(), gate_of(head)
    data = data_of(episodes_of(rows))
    sums = batch_loss(gate, Batches(data, torch.float64, CPU).gather(np.arange(5)), loss="soft", eta=0.7)
    assert float(sums.total.detach() / sums.weight) == pytest.approx(slow_soft_loss(gate, rows, 0.7), rel=1e-9)


def test_sums_of_parts_are_the_sum_of_the_batch() -> None:
    data, gate = data_of(episodes_of(ragged_rows())), gate_of()
    batches = Batches(data, torch.float64, CPU)
    whole = batch_loss(gate, batches.gather(np.arange(5)), loss="soft", eta=0.7)
    parts = [batch_loss(gate, batches.gather(np.arange(5)[rank::3]), loss="soft", eta=0.7) for rank in range(3)]
    for place in (0, 1):
        assert float(sum(part[place] for part in parts).detach()) == pytest.approx(float(whole[place].detach()), rel=1e-12)


def test_the_gradient_goes_back_through_all_steps() -> None:
    data, gate = data_of(episodes_of(ragged_rows())), gate_of()
    batch = Batches(data, torch.float64, CPU).gather(np.array([1, 2]))

    def loss() -> torch.Tensor:
        total, weight = batch_loss(gate, batch, loss="soft", eta=0.7)
        return total / weight

    torch.autograd.backward(loss())
    for name, index in (("weight_hh", (3, 2)), ("weight_ih", (7, 10)), ("bias_hh", (15,)), ("head_weight", (1, 4))):
        parameter = gate.get_parameter(name)
        assert parameter.grad is not None
        with torch.no_grad():
            values = []
            for change in (1e-5, -2e-5):
                parameter[index] += change
                values.append(float(loss()))
            parameter[index] += 1e-5
        assert float(parameter.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9), name


def test_steps_that_a_query_has_not_change_nothing() -> None:
    data, gate = data_of(episodes_of(ragged_rows())), gate_of()
    batches = Batches(data, torch.float64, CPU)
    together = unroll(gate, batches.gather(np.arange(5)))
    alone = torch.cat([unroll(gate, batches.gather(np.array([q]))) for q in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_quick_metrics_agree_with_the_whole() -> None:
    episodes = episodes_of(ragged_rows())
    data, gate = data_of(episodes), gate_of()
    batches = Batches(data, torch.float64, CPU)
    quick = held_metrics(gate, batches, data.held_Q, loss="soft", eta=0.7)
    assert quick.pairwise == measure_gate(gate, batches, episodes, data)["pairwise"]
    sums = batch_loss(gate, batches.gather(data.held_Q), loss="soft", eta=0.7)
    assert quick.loss == pytest.approx(float((sums.total / sums.weight).detach()))


def test_metrics_by_hand() -> None:
    """One held-back step: logits order three > one > two; scores order one < three < two; collected evenly."""
    rows = [
        row(query, 0, agent, nats, np.zeros(2 * DIM))
        for query in ("a", "b")
        for agent, nats in (("one", 0.1), ("two", 0.9), ("three", 0.3))
    ]
    episodes = episodes_of(rows)
    split = Split(train_Q=np.array([0]), held_Q=np.array([1]))
    scale = fit_scale(episodes, split, anchor_sample(episodes, split.train_Q, DIM), score="raw", num_clusters=1, seed=0)
    data = build_data(episodes, split, scale)
    gate = Gate(GateSpec.from_config(GateConfig(hidden=2), AGENTS))
    p = np.array([0.3, 0.1, 0.6])
    with torch.no_grad():
        gate.head_bias.copy_(0.1 * torch.log(torch.from_numpy(p)))
    found = measure_gate(gate, Batches(data, torch.float32, CPU), episodes, data)
    assert found["pairwise"] == pytest.approx(2 / 3)
    gains = {"one": 2, "three": 1, "two": 0}
    ideal = 2 + 1 / math.log2(3)
    assert found["ndcg"] == pytest.approx((gains["three"] + gains["one"] / math.log2(3)) / ideal)
    assert (found["chosen_nats"], found["surest_nats"], found["mean_nats"]) == pytest.approx((0.3, 0.1, 1.3 / 3))
    assert (found["surest_share"], found["load_max"], found["load_entropy"]) == (0.0, 1.0, 0.0)
    assert found["distance_step_0"] == pytest.approx(0.5 * np.abs(p - 1 / 3).sum(), abs=1e-5)
    assert found["effective"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), abs=1e-4)


def ranked(orders: Sequence[Sequence[str]], *, rounds: int = 1) -> dict[str, float]:
    """Metrics of a gate whose logits order the agents one > two > three, on held-back queries of these orders, surest first."""
    rows = [
        row(f"q{number:03d}", 0, agent, 0.1 + 0.2 * order.index(agent), np.zeros(2 * DIM), seed=seed)
        for number, order in enumerate([AGENTS, *orders])
        for seed in range(rounds)
        for agent in AGENTS
    ]
    episodes = episodes_of(rows)
    held = np.arange(rounds, len(episodes.key_Q))
    split = Split(train_Q=np.arange(rounds), held_Q=held)
    scale = fit_scale(episodes, split, anchor_sample(episodes, split.train_Q, DIM), score="raw", num_clusters=1, seed=0)
    data = build_data(episodes, split, scale)
    gate = Gate(GateSpec.from_config(GateConfig(hidden=2), AGENTS))
    with torch.no_grad():
        gate.head_bias.copy_(torch.tensor([0.3, 0.2, 0.1]))
    return measure_gate(gate, Batches(data, torch.float32, CPU), episodes, data)


ALIKE, REVERSED, HALF = ("one", "two", "three"), ("three", "two", "one"), ("one", "three", "two")


def test_the_interval_of_pairs_is_over_queries() -> None:
    """3, 3, 2, 2, 0 pairs of 3 by query: 10 of 15; residuals 1, 1, 0, 0, -2 thirds; t(0.975, 4) is 2.776."""
    orders = [ALIKE, ALIKE, HALF, HALF, REVERSED]
    found = ranked(orders)
    half = 2.7764451 * math.sqrt(6 / 9 / 4 / 5)
    assert found["pairwise"] == pytest.approx(2 / 3)
    assert found["pairwise_low"] == pytest.approx(2 / 3 - half)
    assert found["pairwise_high"] == 1.0
    # Asked again, a query is no second witness.
    again = ranked(orders, rounds=3)
    assert [again[name] for name in ("pairwise", "pairwise_low")] == pytest.approx([2 / 3, 2 / 3 - half])


@pytest.mark.parametrize(
    ("orders", "ranking"),
    [
        ([ALIKE] * 12, "better than chance"),
        ([ALIKE] * 9 + [HALF] * 3, "better than chance"),
        ([ALIKE, REVERSED] * 6, "no better than chance"),
        ([REVERSED] * 12, "no better than chance"),
        ([ALIKE], "no better than chance"),
        ([ALIKE] * 2, "no better than chance"),
    ],
    ids=["always", "nearly always", "half", "never", "a single query", "two queries"],
)
def test_a_gate_that_ranks_as_a_coin_does_is_told_from_one_that_learned(orders: list[tuple[str, ...]], ranking: str) -> None:
    assert ranking_of(ranked(orders)) == ranking


def test_of_a_gate_without_a_pair_nothing_is_known() -> None:
    assert ranking_of({"load_max": 1.0}) == "unknown"


@pytest.mark.contract
def test_the_soft_loss_has_a_finite_optimum_and_training_finds_it(tmp_path: Path) -> None:
    """Always the same query: the best probabilities are softmax(-s / eta), whatever the number of epochs."""
    nats = {"one": 0.2, "two": 0.4, "three": 1.5}
    context = np.random.default_rng(0).standard_normal(2 * DIM) / np.sqrt(DIM)
    rows = [row(f"q{n}", 0, agent, value, context) for n in range(8) for agent, value in nats.items()]
    config = pool()
    rollouts = write_rollouts(tmp_path / "rollouts", rows, config)
    options = {"epochs": 300, "lr": 5e-3, "weight_decay": 0, "patience": 300, "dtype": "float64", "score": "raw"}
    result = train(tmp_path / "run", rollouts, config, **options)
    s = np.array([math.log(value + 1e-3) for value in nats.values()])
    eta = float(np.median(np.abs(s[:, None] - s)[np.triu_indices(3, 1)]))
    assert result.record.metrics["eta"] == pytest.approx(eta)
    gate, _ = checkpoint.load(result.checkpoint)
    x = torch.from_numpy(np.concatenate([rows[0]["context"], rows[0]["feedback"]]))[None]
    with torch.no_grad():
        p = torch.softmax(gate(x, torch.zeros(1, 16)).logits_BA[0] / 0.1, dim=0).numpy()
    wanted = np.exp(-s / eta) / np.exp(-s / eta).sum()
    np.testing.assert_allclose(p, wanted, atol=2e-3)


# Which queries are held back


def test_the_queries_with_the_lowest_hashes_are_held_back_whatever_else_there_is() -> None:
    queries = [f"q{n}" for n in range(40)]
    rows = [row(query, 0, agent, 0.5, np.zeros(2 * DIM)) for query in queries for agent in AGENTS]
    again = [value | {"gate_version": "later"} for value in rows]
    once, twice = episodes_of(rows), episodes_of(rows + again)
    held_Q, again_Q = split_episodes(once, 0.25).held_Q, split_episodes(twice, 0.25).held_Q
    held = {once.key_Q[q].query_id for q in held_Q}
    assert len(held) == len(held_Q) == 10
    assert held == {twice.key_Q[q].query_id for q in again_Q}
    assert len(again_Q) == 20
    assert sorted([*again_Q, *split_episodes(twice, 0.25).train_Q]) == list(range(80))


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.999, 3)])
def test_both_sides_have_a_query(share: float, count: int) -> None:
    rows = [row(f"q{n}", 0, agent, 0.5, np.zeros(2 * DIM)) for n in range(4) for agent in AGENTS]
    assert len(split_episodes(episodes_of(rows), share).held_Q) == count


DENSE = [0, 1, 2, 3, 4, 6, 8]
"""Of the nine steps of `ragged_rows`: step 5 asked an agent by chance, step 7 two of three; who failed was asked."""


def test_a_step_is_dense_where_everybody_was_asked_for_certain() -> None:
    episodes = episodes_of(ragged_rows())
    assert episodes.dense_steps(np.arange(5)).tolist() == DENSE
    assert episodes.dense_steps(np.array([4, 2])).tolist() == [8, 4]
    assert episodes.dense_steps(np.zeros(0, dtype=np.int64)).tolist() == []


def test_steps_explored_by_chance_move_neither_anchors_nor_eta() -> None:
    """They are a sample of another kind: what was asked there hung on the gate."""

    def scale_of(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
        episodes = episodes_of(rows)
        split = Split(train_Q=np.array([0, 1]), held_Q=np.arange(2, 5))
        sample = anchor_sample(episodes, np.arange(5), 2 * DIM)
        found = fit_scale(episodes, split, sample, score="anchored", num_clusters=1, seed=0)
        return found.anchors, found.eta, found.anchor_rows

    before = scale_of(ragged_rows())
    assert before[2] == len(DENSE)
    for place, is_dense in (((2, 1), False), ((4, 0), False), ((2, 0), True)):
        rows = ragged_rows()
        for value in rows:
            if (value["query_id"], value["step"]) == (f"q{place[0]}", place[1]) and value["agent"] == "two":
                value["entropy_sum_nats"] *= 50
        assert (scale_of(rows) == before) == (not is_dense), place


def fitted_on(rows: list[dict[str, Any]]) -> GateSpec:
    """The operating point of a gate that nobody trained, on twelve queries of which eight are held back."""
    episodes = episodes_of(rows)
    split = Split(train_Q=np.arange(4), held_Q=np.arange(4, 12))
    scale = fit_scale(episodes, split, anchor_sample(episodes, split.train_Q, DIM), score="raw", num_clusters=1, seed=0)
    gate = init_gate(GateSpec.from_config(GateConfig(hidden=2), AGENTS), seed=0)
    evidence = FittedTargets(episodes=episodes, data=build_data(episodes, split, scale), scale=scale)
    return fit_spec(gate, evidence, TrainOptions(rollouts=(Path("r"),), out=Path("o"), alpha=0.5))[0]


def test_steps_explored_by_chance_move_neither_tau_nor_theta() -> None:
    rng = np.random.default_rng(5)
    contexts = rng.standard_normal((12, 2, 2 * DIM)) / np.sqrt(DIM)
    nats = rng.uniform(0.1, 1.0, (12, 2, 3))

    def point_of(*, surest: str, propensity: float) -> tuple[float | None, float | None]:
        rows = []
        for place, step, (number, agent) in itertools.product(range(12), range(2), enumerate(AGENTS)):
            share = {"propensity": propensity} if step and agent == "one" else {}
            spread = 0.001 if step and agent == surest else float(nats[place, step, number])
            rows.append(row(f"q{place:02d}", step, agent, spread, contexts[place, step], num_steps=2, **share))
        spec = fitted_on(rows)
        return spec.fitted_left, spec.theta

    assert point_of(surest="one", propensity=0.5) == point_of(surest="three", propensity=0.5)
    seen, other = (point_of(surest=agent, propensity=1.0) for agent in ("one", "three"))
    unseen = point_of(surest="one", propensity=0.5)
    assert seen[0] != other[0], "tau would feel it"
    assert seen[1] != unseen[1], "theta would feel it"


def test_cut_replies_do_not_move_theta() -> None:
    """However sure a reply was that never ended, it says nothing of the entropies at which a step may stop."""

    def theta_of(*, cut_nats: float, finish: str) -> float | None:
        context = np.ones(2 * DIM) / np.sqrt(2 * DIM)
        rows = [
            row(f"q{place}", 0, agent, cut_nats, context, finish_reason=finish)
            if agent == "two"
            else row(f"q{place}", 0, agent, 0.1 * (place + 1), context)
            for place in range(12)
            for agent in AGENTS
        ]
        return fitted_on(rows).theta

    assert theta_of(cut_nats=0.001, finish="length") == theta_of(cut_nats=3.0, finish="length") is not None
    assert theta_of(cut_nats=0.001, finish="stop") != theta_of(cut_nats=3.0, finish="stop"), "it would be seen"


def test_agents_that_did_not_run_are_in_no_pair() -> None:
    episodes = episodes_of(ragged_rows())
    data = dataclasses.replace(data_of(episodes), held_Q=np.arange(5))
    rng = np.random.default_rng(3)
    score_NA, ran_NA = rng.standard_normal(data.score_NA.shape), rng.uniform(size=data.ran_NA.shape) < 0.6
    gate = gate_of().float()
    batches = Batches(dataclasses.replace(data, score_NA=score_NA, ran_NA=ran_NA), torch.float32, CPU)
    logits_NA = logits_of(gate, batches, data.held_Q)
    pairs = [
        (logits_NA[n, a] > logits_NA[n, b])
        for n, ran_A in enumerate(ran_NA)
        for a, b in itertools.permutations(np.flatnonzero(ran_A), 2)
        if score_NA[n, a] < score_NA[n, b]
    ]
    assert held_metrics(gate, batches, data.held_Q, loss="soft", eta=0.7).pairwise == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("column", ["propensity", "entropy_slack_nats", "entropy_sum_nats", "finish_reason"])
def test_the_hash_of_what_is_learned_from_feels_every_part(column: str) -> None:
    rows = ragged_rows()
    before = episodes_of(rows).digest()
    assert episodes_of(ragged_rows()).digest() == before
    rows[0][column] = "length" if column == "finish_reason" else 0.5
    if column == "entropy_slack_nats":  # which exact entropies do not have
        rows[0]["entropy_kind"] = "truncated"
    assert episodes_of(rows).digest() != before
