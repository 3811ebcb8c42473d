"""The recurrent gate: a GRU over the steps of a query and a head that gives every agent a logit.

First stage of routing: `core/features` -> gate -> `core/activation`; `core/inference` runs both for serving, training
differentiates `Gate.forward` through the steps. Cores without memory stand in for the GRU in ablations. Shape letters:
B queries, A agents in the pool, D embedding, H gate hidden, X gate input; in this file alone C outputs of the core, which
the head reads (H, or X for the `linear` core).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dmoa.config import Core, GateConfig, parse_gate
from dmoa.core.features import FEEDBACK_FEATURES
from dmoa.core.label_model import LabelModel
from dmoa.core.sequential import AGENT_PRICE
from dmoa.errors import CheckpointError, ConfigError
from dmoa.validation import is_finite, short

Rule = Literal["top_mass", "fixed", "effective_count"]
MAX_EMBEDDING_DIM = 65_536
_NEWER = {"core", "anchors", "fitted_left", "agent_price"}
"""Fields of a spec that older ones lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """Everything about a gate but its weights; frozen with the gate version."""

    preset: Literal["default", "paper"]
    head: Literal["linear", "profile"]
    hidden: int
    """H."""
    temperature: float
    """T of the softmax over gate logits."""
    agents: tuple[str, ...]
    """Names of the agents, in the order of the logits."""
    embedding_dim: int = 384
    """D."""
    rule: Rule
    mass: float
    """tau of `top_mass`, (0, 1]."""
    fitted_left: float | None = None
    """1 - tau as it was fitted, which `mass` rounds for sharp gates; None where nothing was fitted."""
    max_agents: int
    """K, and the k of `fixed`."""
    cascade: bool
    """Whether unsure steps run the next-ranked agent too; acts only with `theta`."""
    theta: float | None = None
    """Highest score of a sure reply, as `core.scores` gives it; None where nothing was fitted."""
    score: Literal["raw", "anchored", "posterior"]
    core: Core = "gru"
    """What the head reads: `gru` the state of the GRU, `reset` the same from a state of zeros at every step, `linear` the
    input itself, `mlp` one hidden layer over it. All but `gru` are ablations."""
    anchors: tuple[float, ...] | None = None
    """Per agent, what the anchored score subtracts; None where nothing was fitted."""
    agent_price: float = AGENT_PRICE
    """Probability of a right answer that one more reply must be expected to bring; read with a label model only."""

    @property
    def input_dim(self) -> int:
        """X: D in the `paper` preset, else 2D + F."""
        return self.embedding_dim if self.preset == "paper" else 2 * self.embedding_dim + FEEDBACK_FEATURES

    @property
    def mass_left(self) -> float:
        """The probability that the active set may leave to the others: 1 - tau, exactly where it was fitted."""
        return 1.0 - self.mass if self.fitted_left is None or 1.0 - self.fitted_left != self.mass else self.fitted_left

    @classmethod
    def from_config(cls, config: GateConfig, agents: tuple[str, ...]) -> GateSpec:
        """Return the spec of an untrained gate: settings of the pool file, no theta; `paper` has no cascade."""
        activation = config.activation
        return cls(
            preset=config.preset,
            head=config.head,
            hidden=config.hidden,
            temperature=config.temperature,
            agents=tuple(agents),
            rule=activation.rule,
            mass=activation.mass,
            max_agents=activation.max_agents,
            cascade=activation.cascade and config.preset != "paper",
            score=config.score,
            core=config.core,
            agent_price=config.agent_price,
        )

    def for_agents(self, agents: tuple[str, ...]) -> GateSpec:
        """Return the spec over other agents: anchors by name, and neither them nor theta where one is not known."""
        known = dict(zip(self.agents, self.anchors, strict=True)) if self.anchors is not None else {}
        if self.anchors is None or set(agents) <= set(known):
            return dataclasses.replace(self, agents=agents, anchors=tuple(known[name] for name in agents) if known else None)
        return dataclasses.replace(self, agents=agents, anchors=None, theta=None)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads.

        What has a default is left out at it: versions are hashes of this, and older ones lack the newer fields.
        """
        newer = {field.name: field.default for field in dataclasses.fields(self) if field.name in _NEWER}
        tree = {name: list(value) if type(value) is tuple else value for name, value in dataclasses.asdict(self).items()}
        return {name: value for name, value in tree.items() if name not in newer or value != newer[name]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> GateSpec:
        """Build the spec from `to_json`'s dictionary. Raises CheckpointError for any key or value that does not fit."""
        names = {field.name for field in dataclasses.fields(cls)}
        for word, keys in (("unknown", set(tree) - names), ("missing", names - _NEWER - set(tree))):
            if keys:
                raise CheckpointError(
                    f"gate spec: {word} keys {sorted(keys)}; expected exactly {sorted(names)}; "
                    "use a checkpoint written by this version of dmoa"
                )
        settings: dict[str, Any] = {
            key: tree[key] for key in ("preset", "head", "hidden", "temperature", "score", "core", "agent_price") if key in tree
        }
        activation = {key: tree[key] for key in ("rule", "mass", "cascade", "max_agents")}
        try:
            config = parse_gate({**settings, "activation": activation})
        except ConfigError as error:
            raise CheckpointError(f"gate spec: {error}") from error
        spec = cls.from_config(config, _agent_names(tree["agents"]))
        dim, theta, left = tree["embedding_dim"], tree["theta"], tree.get("fitted_left")
        if type(dim) is not int or not 1 <= dim <= MAX_EMBEDDING_DIM:
            raise CheckpointError(f"gate spec: embedding_dim is {short(dim)}; expected 1 to {MAX_EMBEDDING_DIM}")
        if theta is not None and not is_finite(theta):
            raise CheckpointError(f"gate spec: theta is {short(theta)}; expected null or a finite number")
        if left is not None and not (is_finite(left) and 1.0 - left == spec.mass):
            raise CheckpointError(f"gate spec: fitted_left is {short(left)}; expected null or 1 - mass, {1.0 - spec.mass!r}")
        spec = dataclasses.replace(spec, fitted_left=None if left is None else float(left))
        anchors = _anchors(tree.get("anchors"), len(spec.agents))
        return dataclasses.replace(spec, embedding_dim=dim, theta=None if theta is None else float(theta), anchors=anchors)


def _agent_names(value: object) -> tuple[str, ...]:
    ok = isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value)
    if not ok or len(set(value)) != len(value):  # type: ignore[arg-type, call-overload]  # checked one line above
        raise CheckpointError(f"gate spec: agents is {short(value)}; expected a list of different agent names")
    return tuple(value)  # type: ignore[arg-type]  # a list of strings by the check above


def _anchors(value: object, num_agents: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != num_agents or not all(map(is_finite, value)):
        raise CheckpointError(
            f"gate spec: anchors is {short(value)}; expected null or {num_agents} finite numbers, one per agent"
        )
    return tuple(float(number) for number in value)


class GateOutput(NamedTuple):
    """What one step of the gate gives."""

    logits_BA: Tensor
    """[B, A], before temperature and masks."""
    hidden_BH: Tensor
    """[B, H], the state for the next step; zeros for the cores `linear` and `mlp`."""


class Gate(nn.Module):
    """GRU over steps with a head over agents. Source: paper (GRU, linear head); sizes, `profile` head, ablations ours.

    Weights are raw tensors, the GRU's in the layout of `torch.nn.GRUCell` (gates r, z, n), zero until `init_gate` or
    `load_state_dict` fills them. With the `profile` head the agents are rows of the buffer `profile_AD` (embeddings
    of their profile texts), so an agent joins or leaves by another buffer with the same weights.
    """

    def __init__(self, spec: GateSpec, profile_AD: Tensor | None = None, *, label_model: LabelModel | None = None) -> None:
        """Raises ConfigError where the profile embeddings do not fit the spec."""
        super().__init__()
        self.spec = spec
        self.label_model = label_model
        """Judges the replies of a step where the gate was trained on its probabilities (score posterior); no weight."""
        hidden, num_agents, features = spec.hidden, len(spec.agents), spec.hidden
        if spec.core in ("gru", "reset"):
            self.weight_ih = nn.Parameter(torch.zeros(3 * hidden, spec.input_dim))
            self.weight_hh = nn.Parameter(torch.zeros(3 * hidden, hidden))
            self.bias_ih = nn.Parameter(torch.zeros(3 * hidden))
            self.bias_hh = nn.Parameter(torch.zeros(3 * hidden))
        elif spec.core == "mlp":
            self.layer_weight = nn.Parameter(torch.zeros(hidden, spec.input_dim))
            self.layer_bias = nn.Parameter(torch.zeros(hidden))
        else:
            features = spec.input_dim
        if spec.head == "linear":
            self.head_weight = nn.Parameter(torch.zeros(num_agents, features))
            self.head_bias = nn.Parameter(torch.zeros(num_agents))
            return
        expected = (num_agents, spec.embedding_dim)
        if profile_AD is None or tuple(profile_AD.shape) != expected:
            seen = "none" if profile_AD is None else f"shape {tuple(profile_AD.shape)}"
            raise ConfigError(
                f"gate.head: 'profile' needs profile embeddings of shape {expected}, seen: {seen}; embed the profiles"
            )
        self.query_weight = nn.Parameter(torch.zeros(hidden, features))
        self.key_weight = nn.Parameter(torch.zeros(hidden, spec.embedding_dim))
        self.register_buffer("profile_AD", profile_AD.detach().to(torch.float32).clone())

    @classmethod
    def of(cls, spec: GateSpec, weights: Mapping[str, Tensor], *, label_model: LabelModel | None = None) -> Gate:
        """Return a gate with these weights and buffers, which become float32. Raises ConfigError as `__init__` does."""
        gate = cls(spec, weights.get("profile_AD"), label_model=label_model)
        gate.load_state_dict(weights)
        return gate

    def head(self) -> tuple[Tensor, Tensor]:
        """Return (weight [A, C], bias [A]) of the map from the core's output to logits, differentiable.

        For the `profile` head: logit_a = sqrt(D / H) (Q h) . (E e_a), h the core's output, the bias 0. The factor gives
        logits the variance that the linear head has, whatever D is.
        """
        if self.spec.head == "linear":
            return self.head_weight, self.head_bias
        profile_AD = self.get_buffer("profile_AD").to(self.key_weight.dtype)
        key_AH = linear(profile_AD, self.key_weight) * math.sqrt(self.spec.embedding_dim / self.spec.hidden)
        return key_AH @ self.query_weight, key_AH.new_zeros(len(self.spec.agents))

    def forward(self, x_BX: Tensor, hidden_BH: Tensor) -> GateOutput:
        """Take one step: inputs [B, X] and the state [B, H] (zeros at the first step) to logits and the next state."""
        core, weight_AC, bias_A = self.spec.core, *self.head()
        if core in ("gru", "reset"):
            input_BG = linear(x_BX, self.weight_ih, self.bias_ih)
            next_BH = self._recur(input_BG, torch.zeros_like(hidden_BH) if core == "reset" else hidden_BH)
            return GateOutput(linear(next_BH, weight_AC, bias_A), next_BH)
        return GateOutput(linear(self._features(x_BX), weight_AC, bias_A), torch.zeros_like(hidden_BH))

    def unroll(self, x_BSX: Tensor) -> Tensor:
        """Return the logits [B, S, A] of S steps from the first on: what `forward` gives step by step, up to rounding.

        Inputs and head are one product each for all steps, and so are their gradients.
        """
        weight_AC, bias_A = self.head()
        if self.spec.core not in ("gru", "reset"):
            return linear(self._features(x_BSX), weight_AC, bias_A)
        input_BSG = linear(x_BSX, self.weight_ih, self.bias_ih)
        hidden_BH = start_BH = x_BSX.new_zeros(x_BSX.shape[0], self.spec.hidden)
        states: list[Tensor] = []
        for input_BG in input_BSG.unbind(1):
            hidden_BH = self._recur(input_BG, start_BH if self.spec.core == "reset" else hidden_BH)
            states.append(hidden_BH)
        return linear(torch.stack(states, dim=1), weight_AC, bias_A)

    def _features(self, x: Tensor) -> Tensor:
        """Return what the head reads where nothing recurs."""
        return torch.tanh(linear(x, self.layer_weight, self.layer_bias)) if self.spec.core == "mlp" else x

    def _recur(self, input_BG: Tensor, hidden_BH: Tensor) -> Tensor:
        """Return the next state from the projected input [B, 3H] and the state."""
        input_r, input_z, input_n = input_BG.chunk(3, dim=1)
        state_r, state_z, state_n = linear(hidden_BH, self.weight_hh, self.bias_hh).chunk(3, dim=1)
        reset = torch.sigmoid(input_r + state_r)
        update = torch.sigmoid(input_z + state_z)
        new = torch.tanh(input_n + reset * state_n)
        return new + update * (hidden_BH - new)


def init_gate(spec: GateSpec, *, seed: int, profile_AD: Tensor | None = None) -> Gate:
    """Return a gate with untrained weights that depend on spec and seed alone; the global generator is not touched.

    Bounds are those of torch.nn.GRUCell and torch.nn.Linear (uniform, 1/sqrt(H)); `key_weight` has variance 1/D.
    `profile_AD` [A, D]: unit-length embeddings of the profiles, for the `profile` head. Raises ConfigError.
    """
    gate = Gate(spec, profile_AD)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in gate.named_parameters():
            bound = math.sqrt(3 / spec.embedding_dim) if name == "key_weight" else 1 / math.sqrt(spec.hidden)
            weight.uniform_(-bound, bound, generator=generator)
    return gate


def weights_version(gate: Gate) -> str:
    """Return the content hash that names a gate version: 16 hex digits of SHA-256 over spec, tensors, label model."""
    digest = hashlib.sha256(json.dumps(gate.spec.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(gate.state_dict().items()):
        digest.update(f"\n{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    if gate.label_model is not None:
        digest.update(f"\nlabel model {gate.label_model.digest()}".encode())
    return digest.hexdigest()[:16]
