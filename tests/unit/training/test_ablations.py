"""Ablations: each changes what it names and nothing else, and the controls do what must be expected of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoa import checkpoint
from dmoa.config import Config
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.testing import AGENTS, domain_rows, write_rollouts
from dmoa.testing import CONTEXT_DIM as DIM
from dmoa.testing import scripted_pool as pool
from dmoa.training.ablations import ABLATIONS, _changed, as_paper, train_ablation, without_summary, write_changed
from dmoa.training.rollouts import RolloutFolder, RolloutQuery, read_manifest, read_table
from tests.unit.training.in_process import AROUND


@pytest.fixture(scope="module")
def config() -> Config:
    return pool()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    return write_rollouts(tmp_path_factory.mktemp("rollouts") / "dense", domain_rows(48, steps=2), config)


def trained(name: str, rollouts: Path, out: Path, config: Config) -> Gate:
    folder = train_ablation(name, rollouts, out, config, AROUND, {"epochs": 15, "lr": 3e-3})
    gate, record = checkpoint.load(folder)
    assert record.trained_on is not None
    return gate


def first_choices(gate: Gate, rollouts: Path) -> np.ndarray:  # type: ignore[type-arg]
    """The most probable agent at the first step of every query."""
    rows = read_table(rollouts).to_pylist()
    inputs = {row["query_id"]: [*row["context"], *row["feedback"]] for row in rows if row["step"] == 0}
    input_QX = torch.tensor([inputs[query] for query in sorted(inputs)])
    with torch.no_grad():
        return gate(input_QX, torch.zeros(len(input_QX), gate.spec.hidden)).logits_BA.argmax(dim=1).numpy()


@pytest.mark.contract
def test_every_ablation_trains_on_the_same_rollouts(rollouts: Path, config: Config, tmp_path: Path) -> None:
    gates = {name: trained(name, rollouts, tmp_path, config) for name in ABLATIONS}
    spec = gates["default"].spec
    assert (gates["no-memory"].spec.core, gates["linear"].spec.core, gates["mlp"].spec.core) == ("reset", "linear", "mlp")
    assert gates["posterior"].spec == spec
    assert [gates[name].spec.score for name in ("default", "raw", "anchored")] == ["posterior", "raw", "anchored"]
    assert [gates[name].spec.anchors is None for name in ("default", "raw", "anchored")] == [True, True, False]
    # Anchors would leave the controls no favourite to find.
    assert {gates[name].spec.score for name in ("shuffled-within", "shuffled-across", "paper")} == {"raw"}
    assert (gates["fixed-1"].spec.rule, gates["fixed-1"].spec.max_agents) == ("fixed", 1)
    assert (spec.cascade, gates["no-cascade"].spec.cascade, gates["paper"].spec.preset) == (True, False, "paper")
    # Same weights, another activation.
    for name in ("fixed-1", "fixed-3", "no-cascade"):
        for key, tensor in gates["default"].state_dict().items():
            assert torch.equal(gates[name].state_dict()[key], tensor)
    domain_Q = np.arange(48) % 3
    assert (first_choices(gates["default"], rollouts) == domain_Q).mean() > 0.9
    # A gate that was taught noise, or one favourite, cannot know the domains.
    assert (first_choices(gates["shuffled-within"], rollouts) == domain_Q).mean() < 0.75


def test_a_gate_without_the_summary_does_not_move_with_it(rollouts: Path, config: Config, tmp_path: Path) -> None:
    gate = trained("no-summary", rollouts, tmp_path, config)
    x_BX = torch.randn(2, gate.spec.input_dim, generator=torch.Generator().manual_seed(0))
    x_BX[1] = x_BX[0]
    x_BX[1, DIM : 2 * DIM] += 5.0
    with torch.no_grad():
        logits_BA = gate(x_BX, torch.zeros(2, gate.spec.hidden)).logits_BA
    assert torch.equal(logits_BA[0], logits_BA[1])


def test_rows_are_changed_as_named(rollouts: Path) -> None:
    table = read_table(rollouts)
    before = np.array(table["context"].to_pylist())
    blind = np.array(without_summary(table, 0)["context"].to_pylist())
    assert np.array_equal(blind[:, :DIM], before[:, :DIM])
    assert not blind[:, DIM:].any()
    paper = as_paper(table, 0)
    assert set(paper["step"].to_pylist()) == {0}
    assert set(paper["num_steps"].to_pylist()) == {1}
    assert paper.schema == table.schema
    assert len(paper) == 48 * len(AGENTS)
    assert {len(context) for context in paper["context"].to_pylist()} == {DIM}


def test_an_ablation_that_is_there_is_taken(rollouts: Path, config: Config, tmp_path: Path) -> None:
    first = trained("shuffled-across", rollouts, tmp_path, config)
    written = (tmp_path / "shuffled-across" / "rollouts" / "rollouts.json").stat().st_mtime_ns
    again = trained("shuffled-across", rollouts, tmp_path, config)
    assert (tmp_path / "shuffled-across" / "rollouts" / "rollouts.json").stat().st_mtime_ns == written
    assert torch.equal(first.weight_ih, again.weight_ih)
    assert read_manifest(tmp_path / "shuffled-across" / "rollouts").agents == list(AGENTS)


@pytest.mark.parametrize(("core", "head"), [("linear", "linear"), ("linear", "profile"), ("mlp", "linear"), ("reset", "linear")])
def test_gates_of_every_core_can_be_blinded(core: str, head: str) -> None:
    embedding = np.eye(3, DIM, dtype=np.float32)
    base = pool(gate=f"{{hidden: 16, core: {core}, head: {head}, activation: {{max_agents: 2}}}}").gate
    spec = GateSpec.from_config(base, AGENTS)
    gate = _changed(init_gate(spec, seed=3, profile_AD=torch.from_numpy(embedding)), ABLATIONS["no-summary"])
    x_BX = torch.ones(2, spec.input_dim)
    x_BX[1, DIM : 2 * DIM] += 5.0
    with torch.no_grad():
        logits_BA = gate(x_BX, torch.zeros(2, spec.hidden)).logits_BA
    assert logits_BA[0].any()
    assert torch.equal(logits_BA[0], logits_BA[1])


def test_changed_rollouts_ask_the_same(rollouts: Path, tmp_path: Path) -> None:
    """Answers are read by the form of what was asked."""
    source = tmp_path / "source"
    shutil.copytree(rollouts, source)
    query = RolloutQuery(query_id="q000", source="s", split="train", text="Why?\u2028")
    RolloutFolder(source).queries.write_text(query.model_dump_json() + "\n", encoding="utf-8")
    write_changed(source, tmp_path / "changed", without_summary, seed=0)
    assert RolloutFolder(tmp_path / "changed").queries.read_bytes() == RolloutFolder(source).queries.read_bytes()
