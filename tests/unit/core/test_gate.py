"""The gate against torch.nn.GRUCell, finite differences, and its own serialised form."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from dmoa.config import ActivationConfig, GateConfig
from dmoa.core.gate import Gate, GateSpec, init_gate, weights_version
from dmoa.errors import CheckpointError, ConfigError

AGENTS = ("solver", "doctor", "coder")


def make_spec(**changes: object) -> GateSpec:
    small = {"hidden": 5, "embedding_dim": 4, **changes}
    return dataclasses.replace(GateSpec.from_config(GateConfig(score="raw"), AGENTS), **small)


def profiles(num_agents: int, dim: int = 4, seed: int = 7) -> torch.Tensor:
    rows = torch.randn(num_agents, dim, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def steps_of(gate: Gate, x_SBX: torch.Tensor) -> torch.Tensor:
    """Return the logits of all steps, stacked: differentiable through the recurrence."""
    hidden_BH = torch.zeros(x_SBX.shape[1], gate.spec.hidden, dtype=x_SBX.dtype)
    logits = []
    for x_BX in x_SBX:
        logits_BA, hidden_BH = gate(x_BX, hidden_BH)
        logits.append(logits_BA)
    return torch.stack(logits)


def test_recurrence_equals_torch_grucell_over_three_steps() -> None:
    gate = init_gate(make_spec(), seed=1)
    cell = torch.nn.GRUCell(gate.spec.input_dim, gate.spec.hidden)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell.load_state_dict({name: getattr(gate, name).detach() for name in names})
    hidden_BH = expected_BH = torch.zeros(2, 5)
    for seed in range(3):
        x_BX = torch.randn(2, gate.spec.input_dim, generator=torch.Generator().manual_seed(seed))
        logits_BA, hidden_BH = gate(x_BX, hidden_BH)
        expected_BH = cell(x_BX, expected_BH)
        torch.testing.assert_close(hidden_BH, expected_BH, atol=1e-6, rtol=1e-6)
        expected_BA = expected_BH @ gate.head_weight.T + gate.head_bias
        torch.testing.assert_close(logits_BA, expected_BA, atol=1e-6, rtol=1e-6)


def test_step_by_hand() -> None:
    """One input, one hidden unit: r = z = sigmoid(0) = 1/2, n = tanh(1 + 1/2 * 2 h), h' = (n + h) / 2."""
    spec = make_spec(preset="paper", embedding_dim=1, hidden=1, agents=("a", "b"))
    gate = Gate(spec)
    with torch.no_grad():
        gate.weight_ih[2, 0] = 1.0
        gate.weight_hh[2, 0] = 2.0
        gate.head_weight.copy_(torch.tensor([[2.0], [-1.0]]))
        gate.head_bias.copy_(torch.tensor([0.0, 3.0]))
    logits_BA, hidden_BH = gate(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    expected = (math.tanh(1.5) + 0.5) / 2
    assert hidden_BH.item() == pytest.approx(expected)
    assert logits_BA.tolist()[0] == pytest.approx([2 * expected, 3 - expected])


@pytest.mark.parametrize("core", ["gru", "reset", "linear", "mlp"])
@pytest.mark.parametrize("head", ["linear", "profile"])
def test_gradient_through_three_steps_matches_finite_differences(head: str, core: str) -> None:
    spec = make_spec(head=head, hidden=3, embedding_dim=2, core=core)
    gate = init_gate(spec, seed=3, profile_AD=profiles(3, 2) if head == "profile" else None).double()
    x_SBX = torch.randn(3, 2, spec.input_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names, weights = zip(*gate.named_parameters(), strict=True)

    def logits(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        stepper = Stepper(gate)
        return torch.func.functional_call(stepper, {f"gate.{n}": v for n, v in zip(names, values, strict=True)}, (x,))

    inputs = tuple(t.detach().clone().requires_grad_() for t in (x_SBX, *weights))
    assert torch.autograd.gradcheck(logits, inputs)


class Stepper(torch.nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x_SBX: torch.Tensor) -> torch.Tensor:
        return steps_of(self.gate, x_SBX)


@pytest.mark.parametrize("core", ["gru", "reset", "linear", "mlp"])
@pytest.mark.parametrize("head", ["linear", "profile"])
def test_unrolled_steps_and_their_gradient_equal_steps_taken_one_by_one(head: str, core: str) -> None:
    spec = make_spec(head=head, core=core)
    gate = init_gate(spec, seed=3, profile_AD=profiles(len(spec.agents)) if head == "profile" else None).double()
    x_SBX = torch.randn(3, 2, spec.input_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gradients = []
    for logits_SBA in (steps_of(gate, x_SBX), gate.unroll(x_SBX.transpose(0, 1)).transpose(0, 1)):
        gate.zero_grad()
        torch.autograd.backward((logits_SBA**2).sum())
        gradients.append((logits_SBA.detach(), [None if p.grad is None else p.grad.clone() for p in gate.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.0, atol=1e-12)


def test_logits_of_the_last_step_depend_on_the_first_input() -> None:
    gate = init_gate(make_spec(), seed=0)
    x_SBX = torch.randn(3, 1, gate.spec.input_dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    steps_of(gate, x_SBX)[-1].sum().backward()
    assert x_SBX.grad is not None
    assert x_SBX.grad[0].abs().max() > 1e-4


@pytest.mark.parametrize("core", ["reset", "linear", "mlp"])
def test_ablations_depend_on_the_newest_input_alone(core: str) -> None:
    gate = init_gate(make_spec(core=core), seed=0)
    x_SBX = torch.randn(3, 1, gate.spec.input_dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits_SBA = steps_of(gate, x_SBX)
    logits_SBA[-1].sum().backward()
    assert x_SBX.grad is not None
    assert x_SBX.grad[:2].abs().max() == 0.0
    assert x_SBX.grad[2].abs().max() > 1e-4
    assert torch.equal(logits_SBA[2], gate(x_SBX[2], torch.zeros(1, 5)).logits_BA)


def test_first_step_of_reset_is_that_of_the_gru_and_the_others_by_hand() -> None:
    x_BX, hidden_BH = torch.ones(2, 12), torch.zeros(2, 5)
    gru, reset = (init_gate(make_spec(core=core), seed=0) for core in ("gru", "reset"))
    assert torch.equal(gru(x_BX, hidden_BH).logits_BA, reset(x_BX, hidden_BH).logits_BA)
    linear, mlp = (init_gate(make_spec(core=core), seed=0) for core in ("linear", "mlp"))
    torch.testing.assert_close(linear(x_BX, hidden_BH).logits_BA, x_BX @ linear.head_weight.T + linear.head_bias)
    layer_BH = torch.tanh(x_BX @ mlp.layer_weight.T + mlp.layer_bias)
    torch.testing.assert_close(mlp(x_BX, hidden_BH).logits_BA, layer_BH @ mlp.head_weight.T + mlp.head_bias)
    for gate in (linear, mlp):
        assert torch.equal(gate(x_BX, torch.ones(2, 5)).hidden_BH, hidden_BH)


def test_profile_head_is_the_scaled_product_of_projections() -> None:
    spec = make_spec(head="profile")
    profile_AD = profiles(3)
    gate = init_gate(spec, seed=2, profile_AD=profile_AD)
    x_BX, hidden_BH = torch.ones(1, spec.input_dim), torch.zeros(1, 5)
    logits_BA, next_BH = gate(x_BX, hidden_BH)
    query, keys = gate.query_weight @ next_BH[0], profile_AD @ gate.key_weight.T
    expected = [math.sqrt(4 / 5) * float((query @ key).detach()) for key in keys]
    assert logits_BA[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_agent_joins_the_profile_head_without_moving_the_others() -> None:
    profile_AD = profiles(4)
    gate = init_gate(make_spec(head="profile"), seed=2, profile_AD=profile_AD[:3])
    joined = Gate(make_spec(head="profile", agents=(*AGENTS, "lawyer")), profile_AD)
    joined.load_state_dict({**gate.state_dict(), "profile_AD": profile_AD})
    x_BX, hidden_BH = torch.ones(2, gate.spec.input_dim), torch.zeros(2, 5)
    torch.testing.assert_close(joined(x_BX, hidden_BH).logits_BA[:, :3], gate(x_BX, hidden_BH).logits_BA)


def test_profiles_are_not_trained() -> None:
    gate = init_gate(make_spec(head="profile"), seed=0, profile_AD=profiles(3))
    assert "profile_AD" in gate.state_dict()
    assert "profile_AD" not in dict(gate.named_parameters())


@pytest.mark.parametrize("profile_AD", [None, torch.zeros(2, 4), torch.zeros(3, 5)])
def test_profile_head_needs_fitting_profiles(profile_AD: torch.Tensor | None) -> None:
    with pytest.raises(ConfigError, match=r"shape \(3, 4\)"):
        init_gate(make_spec(head="profile"), seed=0, profile_AD=profile_AD)


def test_logits_of_both_heads_have_like_spread() -> None:
    wide = {"hidden": 128, "embedding_dim": 384, "agents": tuple(f"a{i}" for i in range(64))}
    spreads = []
    for head in ("linear", "profile"):
        spec = make_spec(head=head, **wide)
        gate = init_gate(spec, seed=0, profile_AD=profiles(64, 384) if head == "profile" else None)
        hidden_BH = torch.rand(16, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
        weight_AH, _ = gate.head()
        spreads.append(float((hidden_BH @ weight_AH.detach().T).std()))
    assert spreads[1] == pytest.approx(spreads[0], rel=0.35)


def test_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = init_gate(make_spec(), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert weights_version(init_gate(make_spec(), seed=5)) == weights_version(first)
    assert weights_version(init_gate(make_spec(), seed=6)) != weights_version(first)
    bound = 1 / math.sqrt(5)
    assert 0.8 * bound < float(first.weight_ih.detach().abs().max()) <= bound


def test_version_sees_every_tensor_and_the_spec() -> None:
    spec = make_spec(head="profile")
    base = weights_version(init_gate(spec, seed=0, profile_AD=profiles(3)))
    assert len(base) == 16
    assert set(base) <= set("0123456789abcdef")
    seen = {base}
    for name in init_gate(spec, seed=0, profile_AD=profiles(3)).state_dict():
        gate = init_gate(spec, seed=0, profile_AD=profiles(3))
        gate.state_dict()[name].view(-1)[0] += 1.0
        seen.add(weights_version(gate))
    seen.add(weights_version(init_gate(dataclasses.replace(spec, temperature=0.2), seed=0, profile_AD=profiles(3))))
    assert len(seen) == 1 + 7 + 1


def test_core_and_anchors_are_part_of_the_version_and_their_defaults_change_none() -> None:
    specs = [make_spec(), make_spec(core="reset"), make_spec(anchors=(1.0, 2.0, 3.0)), make_spec(anchors=(1.0, 2.0, 3.5))]
    assert len({weights_version(init_gate(spec, seed=0)) for spec in specs}) == 4
    # What checkpoints and traces written before these fields name.
    assert weights_version(Gate(make_spec())) == "42c9d5afa288ac9e"
    assert set(make_spec().to_json()) & {"core", "anchors"} == set()


def test_spec_over_other_agents_takes_the_anchors_by_name() -> None:
    spec = make_spec(anchors=(1.0, 2.0, 3.0), theta=-1.0, score="anchored")
    kept = spec.for_agents(("coder", "solver"))
    assert (kept.agents, kept.anchors, kept.theta) == (("coder", "solver"), (3.0, 1.0), -1.0)
    joined = spec.for_agents((*AGENTS, "lawyer"))
    assert (joined.agents, joined.anchors, joined.theta) == ((*AGENTS, "lawyer"), None, None)
    plain = make_spec(theta=-1.0).for_agents(("lawyer",))
    assert (plain.agents, plain.anchors, plain.theta) == (("lawyer",), None, -1.0)


def test_input_width_by_preset() -> None:
    default = GateSpec.from_config(GateConfig(), AGENTS)
    paper = GateSpec.from_config(GateConfig(preset="paper"), AGENTS)
    assert default.input_dim == 2 * 384 + 4
    assert paper.input_dim == 384
    assert default.cascade
    assert not paper.cascade


def test_spec_follows_the_configuration() -> None:
    config = GateConfig(
        core="mlp",
        hidden=7,
        temperature=0.5,
        score="anchored",
        activation=ActivationConfig(rule="fixed", mass=0.6, max_agents=2, cascade=False),
    )
    assert GateSpec.from_config(config, AGENTS) == GateSpec(
        preset="default",
        head="linear",
        hidden=7,
        temperature=0.5,
        agents=AGENTS,
        rule="fixed",
        mass=0.6,
        max_agents=2,
        cascade=False,
        score="anchored",
        core="mlp",
    )


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("changes", [{}, {"core": "linear"}, {"anchors": (0.1, -2.0, 3.0), "score": "anchored"}])
def test_spec_survives_json(preset: str, changes: dict[str, object]) -> None:
    spec = make_spec(preset=preset, cascade=preset == "default", theta=-2.5, **changes)
    assert GateSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preset", "best"),
        ("head", 3),
        ("hidden", 0),
        ("hidden", "5"),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("mass", 1.5),
        ("max_agents", 0),
        ("cascade", "yes"),
        ("rule", "all"),
        ("score", None),
        ("agents", []),
        ("agents", "abc"),
        ("agents", ["a", "a"]),
        ("agents", ["a", 1]),
        ("embedding_dim", 0),
        ("embedding_dim", 4.0),
        ("theta", math.inf),
        ("theta", "low"),
        ("theta", True),
        ("core", "lstm"),
        ("core", None),
        ("anchors", []),
        ("anchors", [1.0, 2.0]),
        ("anchors", [1.0, 2.0, math.nan]),
        ("anchors", [1.0, 2.0, True]),
        ("anchors", "abc"),
    ],
)
def test_spec_refuses_bad_values_naming_the_field(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        GateSpec.from_json({**make_spec().to_json(), key: value})


def test_spec_refuses_unknown_and_missing_keys() -> None:
    tree = make_spec().to_json()
    with pytest.raises(CheckpointError, match="unknown keys \\['colour'\\]"):
        GateSpec.from_json({**tree, "colour": "red"})
    for key in tree:
        with pytest.raises(CheckpointError, match=f"missing keys \\['{key}'\\]"):
            GateSpec.from_json({k: v for k, v in tree.items() if k != key})
