"""Decisions: the same whatever shares the batch, and equal to the gate that training sees."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoa.config import GateConfig
from dmoa.core.activation import activate
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.core.inference import Decider, product_apart, product_together, rows_agree
from dmoa.errors import NoAgentError, RoutingError
from dmoa.types import RouteDecision, RouteRequest
from tests.examples import examples
from tests.unit.core.test_label_model import by_hand


def make_gate(num_agents: int = 5, seed: int = 0, **changes: object) -> Gate:
    spec = GateSpec.from_config(GateConfig(), tuple(f"a{i}" for i in range(num_agents)))
    return init_gate(dataclasses.replace(spec, **{"hidden": 20, "embedding_dim": 12, **changes}), seed=seed)


def make_request(spec: GateSpec, seed: int, **changes: object) -> RouteRequest:
    rng = np.random.default_rng(seed)
    fields = {
        "input_X": rng.standard_normal(spec.input_dim).astype(np.float32),
        "hidden_H": rng.uniform(-1, 1, spec.hidden).astype(np.float32) if seed % 3 else None,
        **changes,
    }
    return RouteRequest(**fields)


def same_bits(a: RouteDecision, b: RouteDecision) -> bool:
    plain = ("gate_version", "agents", "ranking", "k", "mass", "masked", "routed_by", "theta", "limit", "anchors")
    arrays = a.probability_A.tobytes() == b.probability_A.tobytes() and a.hidden_H.tobytes() == b.hidden_H.tobytes()
    return arrays and all(getattr(a, name) == getattr(b, name) for name in plain)


SIZES = [(1, 1, 2), (3, 20, 12), (5, 7, 30), (16, 128, 384), (33, 50, 64), (256, 64, 16)]
ABLATIONS = ["reset", "linear", "mlp"]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
@pytest.mark.parametrize(("num_agents", "hidden", "dim"), SIZES)
def test_every_row_position_gives_the_same_bits(num_agents: int, hidden: int, dim: int, batch_size: int) -> None:
    gate = make_gate(num_agents, hidden=hidden, embedding_dim=dim)
    decider = Decider(gate, "v", batch_size=batch_size)
    request = make_request(gate.spec, 1)
    alone = decider.decide([request])[0]
    for row in range(2 * batch_size):
        others = [make_request(gate.spec, 100 + i) for i in range(2 * batch_size)]
        decision = decider.decide([*others[:row], request, *others[row:]])[row]
        assert same_bits(decision, alone)


@pytest.mark.parametrize("core", ABLATIONS)
@pytest.mark.parametrize(("num_agents", "hidden", "dim"), SIZES[1:5])
def test_every_row_position_of_an_ablation_gives_the_same_bits(num_agents: int, hidden: int, dim: int, core: str) -> None:
    gate = make_gate(num_agents, hidden=hidden, embedding_dim=dim, core=core)
    decider = Decider(gate, "v", batch_size=8)
    request = make_request(gate.spec, 1)
    alone = decider.decide([request])[0]
    others = [make_request(gate.spec, 100 + i) for i in range(8)]
    for row in range(8):
        assert same_bits(decider.decide([*others[:row], request, *others[row:]])[row], alone)


@settings(max_examples=examples(40), derandomize=True)
@given(
    seeds=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    shuffle=st.randoms(use_true_random=False),
    num_agents=st.sampled_from([1, 3, 5, 17]),
    head_size=st.sampled_from([7, 20, 48]),
    rule=st.sampled_from(["top_mass", "fixed", "effective_count"]),
    core=st.sampled_from(["gru", *ABLATIONS]),
    theta=st.sampled_from([None, -1.0]),
)
def test_decision_does_not_depend_on_its_batch(
    seeds: list[int], shuffle: object, num_agents: int, head_size: int, rule: str, core: str, theta: float | None
) -> None:
    gate = make_gate(num_agents, hidden=head_size, rule=rule, core=core, theta=theta)
    unavailable = [(f"a{seed % num_agents}",) if num_agents > 1 and seed % 4 == 0 else () for seed in seeds]
    requests = [
        make_request(gate.spec, seed, unavailable=names, max_agents=1 + seed % 3 if seed % 5 else None)
        for seed, names in zip(seeds, unavailable, strict=True)
    ]
    decider = Decider(gate, "v")
    alone = [Decider(gate, "v").decide([request])[0] for request in requests]
    order = list(range(len(requests)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    together = decider.decide([requests[i] for i in order])
    assert all(same_bits(decision, alone[i]) for i, decision in zip(order, together, strict=True))


def test_decision_does_not_depend_on_the_number_of_threads() -> None:
    gate = make_gate(16, hidden=128, embedding_dim=384)
    before = torch.get_num_threads()
    decisions = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            decisions.append(Decider(gate, "v", batch_size=1).decide([make_request(gate.spec, 1)])[0])
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert same_bits(*decisions)


@pytest.mark.parametrize(("num_agents", "hidden", "dim"), SIZES)
def test_decision_equals_the_differentiable_gate(num_agents: int, hidden: int, dim: int) -> None:
    gate = make_gate(num_agents, hidden=hidden, embedding_dim=dim, temperature=1.0)
    requests = [make_request(gate.spec, seed) for seed in range(1, 6)]
    reference = make_gate(num_agents, hidden=hidden, embedding_dim=dim).double()
    for request, decision in zip(requests, Decider(gate, "v", batch_size=4).decide(requests), strict=True):
        hidden_H = np.zeros(hidden) if request.hidden_H is None else request.hidden_H
        with torch.no_grad():
            out = reference(torch.from_numpy(request.input_X)[None].double(), torch.tensor(hidden_H)[None].double())
        assert decision.hidden_H == pytest.approx(out.hidden_BH[0].numpy(), abs=1e-5)
        assert decision.probability_A == pytest.approx(torch.softmax(out.logits_BA[0], 0).numpy(), abs=1e-5)


@pytest.mark.parametrize("core", ABLATIONS)
def test_ablations_decide_like_their_forward_over_three_steps(core: str) -> None:
    gate = make_gate(5, temperature=1.0, core=core)
    reference = make_gate(5, core=core).double()
    decider, hidden_BH, hidden_H = Decider(gate, "v"), torch.zeros(1, 20, dtype=torch.float64), None
    for seed in range(3):
        request = make_request(gate.spec, seed, hidden_H=hidden_H)
        with torch.no_grad():
            logits_BA, hidden_BH = reference(torch.from_numpy(request.input_X)[None].double(), hidden_BH)
        decision = decider.decide([request])[0]
        hidden_H = decision.hidden_H
        assert hidden_H == pytest.approx(hidden_BH[0].numpy(), abs=1e-5)
        assert decision.probability_A == pytest.approx(torch.softmax(logits_BA[0], 0).numpy(), abs=1e-5)


@pytest.mark.parametrize("core", ABLATIONS)
def test_ablations_do_not_remember(core: str) -> None:
    decider = Decider(make_gate(core=core), "v")
    spec, row = decider.spec, np.random.default_rng(0).uniform(-1, 1, 20).astype(np.float32)
    fresh, later = decider.decide([make_request(spec, 1, hidden_H=None), make_request(spec, 1, hidden_H=row)])
    assert same_bits(fresh, later)


@pytest.mark.parametrize("core", ["gru", *ABLATIONS])
def test_profile_head_decides_like_its_forward(core: str) -> None:
    spec = make_gate(3, head="linear").spec
    spec = dataclasses.replace(spec, head="profile", temperature=1.0, core=core)
    gate = init_gate(spec, seed=0, profile_AD=torch.eye(3, spec.embedding_dim))
    request = make_request(spec, 1)
    with torch.no_grad():
        logits_BA, _ = gate(torch.from_numpy(request.input_X)[None], torch.from_numpy(request.hidden_H)[None])
    decision = Decider(gate, "v").decide([request])[0]
    assert decision.probability_A == pytest.approx(torch.softmax(logits_BA[0], 0).numpy(), abs=1e-5)


def test_fields_follow_the_activation_and_the_pool() -> None:
    gate = make_gate(4)
    request = make_request(gate.spec, 1, unavailable=("a2", "stranger"), max_agents=2)
    decision = Decider(gate, "v7").decide([request], frozenset({"a0"}))[0]
    assert decision.gate_version == "v7"
    assert decision.agents == ("a0", "a1", "a2", "a3")
    assert decision.masked == ("a0", "a2")
    assert decision.probability_A[[0, 2]].tolist() == [0.0, 0.0]
    assert sorted(decision.ranking) == [1, 3]
    assert decision.probability_A[decision.ranking[0]] >= decision.probability_A[decision.ranking[1]]
    assert decision.mass == pytest.approx(float(decision.probability_A[list(decision.ranking[: decision.k])].sum()))


@pytest.mark.parametrize(("asked", "k"), [(None, 4), (2, 2), (4, 4), (9, 4), (0, 1)])
def test_request_may_only_lower_k(asked: int | None, k: int) -> None:
    gate = make_gate(6, rule="fixed", max_agents=4)
    assert Decider(gate, "v").decide([make_request(gate.spec, 1, max_agents=asked)])[0].k == k


@pytest.mark.parametrize(
    ("changes", "asked", "masked", "limit"),
    [
        ({}, None, (), 2),  # nothing was fitted: no cascade
        ({"theta": -1.0, "cascade": False}, None, (), 2),
        ({"theta": -1.0}, None, (), 4),
        ({"theta": -1.0}, 3, (), 3),
        ({"theta": -1.0}, 9, (), 4),
        ({"theta": -1.0}, 1, (), 1),
        ({"theta": -1.0}, None, ("a0", "a1", "a2"), 3),
    ],
)
def test_limit_is_what_the_cascade_may_come_to(
    changes: dict[str, object], asked: int | None, masked: tuple[str, ...], limit: int
) -> None:
    """Six agents, K = 4, of whom the rule activates two (one where the request asks for no more)."""
    gate = make_gate(6, max_agents=4, rule="top_mass", mass=0.3, temperature=100.0, **changes)
    request = make_request(gate.spec, 1, max_agents=asked, unavailable=masked)
    decision = Decider(gate, "v").decide([make_request(gate.spec, 2), request])[1]
    assert decision.k == (1 if masked or asked == 1 else 2)
    assert decision.limit == limit
    assert decision.theta == changes.get("theta")


def test_anchors_travel_where_the_score_is_anchored() -> None:
    anchors = (0.5, -1.0, 0.0)
    for score, expected in (("anchored", anchors), ("raw", None)):
        gate = make_gate(3, score=score, anchors=anchors)
        assert Decider(gate, "v").decide([make_request(gate.spec, 1)])[0].anchors == expected


def test_each_query_gets_the_label_model_of_its_own_context() -> None:
    """Contexts are told by the nearest centre; gates without a model decide the same, and carry none."""
    generator = np.random.default_rng(3)
    gate, bare = (make_gate(3, cascade=False) for _ in range(2))
    one = by_hand([0.8, 0.6, 0.7])
    rows = {name: np.tile(getattr(one, name), (4, 1)) for name in ("doubt_slope_CA", "doubt_CA", "length_mean_CA")}
    centre_CD = generator.standard_normal((4, 2 * gate.spec.embedding_dim))
    ability_CA = generator.standard_normal((4, 3))
    gate.label_model = dataclasses.replace(
        one, **rows, centre_CD=centre_CD, ability_CA=ability_CA, reliance_C=np.ones(4), lead_C=np.zeros(4)
    )
    requests = [make_request(gate.spec, seed) for seed in range(20)]
    found = zip(requests, *(Decider(one, "v").decide(requests) for one in (gate, bare)), strict=True)
    for request, decided, plain in found:
        query_D = request.input_X[: 2 * gate.spec.embedding_dim].astype(np.float64)
        nearest = min(range(4), key=lambda c: math.dist(query_D, centre_CD[c]))
        assert decided.label_model.ability_CA.tolist() == [ability_CA[nearest].tolist()]
        assert (decided.agent_price, plain.label_model) == (gate.spec.agent_price, None)
        assert same_bits(decided, plain)


def test_state_travels_with_the_query() -> None:
    gate = make_gate()
    decider = Decider(gate, "v")
    first = decider.decide([make_request(gate.spec, 3)])[0]
    request = make_request(gate.spec, 1, hidden_H=first.hidden_H)
    kept = first.hidden_H.copy()
    second = decider.decide([request])[0]
    assert np.array_equal(first.hidden_H, kept)
    restored = pickle.loads(pickle.dumps(request))
    assert same_bits(Decider(gate, "v").decide([restored])[0], second)
    assert not same_bits(decider.decide([make_request(gate.spec, 1, hidden_H=None)])[0], second)


def test_no_requests_give_no_decisions() -> None:
    assert Decider(make_gate(), "v").decide([]) == []


def test_nobody_left_is_an_error() -> None:
    gate = make_gate(2)
    with pytest.raises(NoAgentError, match="every agent"):
        Decider(gate, "v").decide([make_request(gate.spec, 1, unavailable=("a1",))], frozenset({"a0"}))


def test_misshapen_requests_are_refused() -> None:
    gate = make_gate()
    decider = Decider(gate, "v")
    with pytest.raises(RoutingError, match=r"input_X has shape \(3,\), expected \(28,\)"):
        decider.decide([RouteRequest(input_X=np.zeros(3, dtype=np.float32))])
    with pytest.raises(RoutingError, match=r"hidden_H has shape \(1, 20\)"):
        decider.decide([make_request(gate.spec, 1, hidden_H=np.zeros((1, 20), dtype=np.float32))])


@pytest.mark.parametrize("field", ["input_X", "hidden_H"])
def test_non_finite_input_is_named_and_leaves_no_trace(field: str) -> None:
    gate = make_gate()
    decider = Decider(gate, "v")
    good = make_request(gate.spec, 1)
    expected = decider.decide([good])[0]
    poisoned = getattr(good, field).copy()
    poisoned[3] = np.nan
    with pytest.raises(RoutingError, match=f"{field} holds NaN"):
        decider.decide([good, dataclasses.replace(good, **{field: poisoned})])
    assert same_bits(decider.decide([good])[0], expected)


@pytest.mark.parametrize(
    ("core", "name"),
    [
        ("gru", "weight_ih"),
        ("gru", "weight_hh"),
        ("gru", "head_weight"),
        ("gru", "head_bias"),
        ("reset", "bias_hh"),
        ("mlp", "layer_weight"),
        ("linear", "head_weight"),
    ],
)
def test_non_finite_gate_output_is_an_error(core: str, name: str) -> None:
    gate = make_gate(core=core)
    with torch.no_grad():
        getattr(gate, name).fill_(np.nan)
    with pytest.raises(RoutingError, match="gate v gave NaN or infinity"):
        Decider(gate, "v").decide([make_request(gate.spec, 1)])


def test_later_training_does_not_reach_a_decider() -> None:
    gate = make_gate()
    decider = Decider(gate, "v")
    request = make_request(gate.spec, 1)
    before = decider.decide([request])[0]
    with torch.no_grad():
        for weight in gate.parameters():
            weight.add_(1.0)
    assert same_bits(decider.decide([request])[0], before)


def test_rows_multiplied_apart_agree_with_rows_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BK, weight_KN = torch.randn(5, 32, generator=generator), torch.randn(32, 48, generator=generator)
    bias_N = torch.randn(48, generator=generator)
    apart_BN, together_BN = torch.empty(5, 48), torch.empty(5, 48)
    product_apart(x_BK, weight_KN, bias_N, apart_BN)
    product_together(x_BK, weight_KN, bias_N, together_BN)
    exact_BN = x_BK.double() @ weight_KN.double() + bias_N.double()
    torch.testing.assert_close(apart_BN.double(), exact_BN, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together_BN.double(), exact_BN, atol=1e-5, rtol=1e-5)
    assert rows_agree(product_apart, 5, 32, 48)


def test_probe_finds_a_product_that_rounds_by_place() -> None:
    def uneven(x_BK: torch.Tensor, weight_KN: torch.Tensor, bias_N: torch.Tensor, out_BN: torch.Tensor) -> None:
        product_together(x_BK, weight_KN, bias_N, out_BN)
        out_BN[-1] *= 1 + 2**-22

    assert not rows_agree(uneven, 5, 32, 48)


def test_activation_of_a_batch_equals_its_rows_alone() -> None:
    rng = np.random.default_rng(0)
    logits_BA = rng.standard_normal((7, 13)).astype(np.float32)
    available_BA = rng.random((7, 13)) < 0.7
    limits_B = np.full(7, 4)
    whole = activate(logits_BA, available_BA, temperature=0.1, rule="top_mass", mass_left=0.2, max_agents_B=limits_B)
    for row in range(7):
        part = slice(row, row + 1)
        alone = activate(
            logits_BA[part], available_BA[part], temperature=0.1, rule="top_mass", mass_left=0.2, max_agents_B=limits_B[part]
        )
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(whole, alone, strict=True))
