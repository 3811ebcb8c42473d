"""Controls for what the gate learns from: gates trained with one thing changed, and rollouts with their entropies dealt out anew.

`within_rows` should teach nothing (random routing), `across_rows` only which agent is surest overall (one global favourite).
Used by `dmoa evaluate --ablations` and the study under `jobs/`. Source: ours.
"""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from dmoa import checkpoint
from dmoa.config import Config
from dmoa.core.features import FEEDBACK_FEATURES
from dmoa.core.gate import Gate
from dmoa.errors import ConfigError
from dmoa.flat import flat
from dmoa.storage import write_whole
from dmoa.training.options import TrainOptions
from dmoa.training.rollouts import Manifest, RolloutFolder, read_manifest, read_table
from dmoa.training.trainer import TrainContext, run_training
from dmoa.types import EntropySum

EVIDENCE = (*flat(EntropySum(), "entropy_"), "finish_reason")
"""The columns that the ranking loss reads of a reply; they move together."""

Rows = Callable[[pa.Table, int], pa.Table]
"""Changes a table of rollouts, given a seed."""


def within_rows(rollouts: pa.Table, seed: int) -> pa.Table:
    """Deal the evidence of every step out among the agents that ran in it."""
    return _dealt(rollouts, ("query_id", "step"), seed)


def across_rows(rollouts: pa.Table, seed: int) -> pa.Table:
    """Deal the evidence of every agent out among the queries, step by step."""
    return _dealt(rollouts, ("agent", "step"), seed)


def _dealt(rollouts: pa.Table, keys: Sequence[str], seed: int) -> pa.Table:
    """Return the table with the evidence permuted within the groups of `keys`, among replies that have any."""
    rng = np.random.default_rng(seed)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    names = list(zip(*(rollouts[key].to_pylist() for key in keys), strict=True))
    for row, (name, tokens) in enumerate(zip(names, rollouts["entropy_tokens"].to_pylist(), strict=True)):
        if tokens:
            groups[name].append(row)
    source = np.arange(rollouts.num_rows)
    for name in sorted(groups, key=str):
        source[groups[name]] = rng.permutation(groups[name])
    dealt = rollouts
    for column in EVIDENCE:
        dealt = _with_column(dealt, column, rollouts[column].take(pa.array(source)))
    return dealt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """One change."""

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `TrainOptions`."""
    rows: Rows | None = None
    """Change of the rollouts."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the trained gate's specification; its weights stay."""
    preset: str | None = None
    """The preset that the gate is trained in; None: the pool's."""
    is_blind: bool = False
    """Whether the trained gate's weights on the summary are set to zero."""
    not_in_paper: str = ""
    """Why it is left out where the pool's gate has the `paper` preset; empty: it is not."""


def without_summary(rollouts: pa.Table, seed: int) -> pa.Table:
    """Return rollouts of the `default` preset whose contexts hold the query alone."""
    contexts = np.array(rollouts["context"].to_pylist(), dtype=np.float32)
    contexts[:, contexts.shape[1] // 2 :] = 0.0
    return _with_lists(rollouts, "context", contexts)


def as_paper(rollouts: pa.Table, seed: int) -> pa.Table:
    """Return the first steps of rollouts of the `default` preset as the `paper` preset would have embedded them.

    At the first step there is no summary, so one embedding of both is the query's.
    """
    first = rollouts.filter(pc.equal(rollouts["step"], 0))
    contexts = np.array(first["context"].to_pylist(), dtype=np.float32)
    first = _with_lists(first, "context", contexts[:, : contexts.shape[1] // 2])
    first = _with_lists(first, "feedback", np.zeros((first.num_rows, FEEDBACK_FEATURES), dtype=np.float32))
    return _with_column(first, "num_steps", pa.array(np.ones(first.num_rows, dtype=np.int64)))


ABLATIONS: dict[str, Ablation] = {
    "default": Ablation(summary="the default configuration"),
    "raw": Ablation(summary="raw score", options={"score": "raw"}),
    "anchored": Ablation(summary="anchored score", options={"score": "anchored"}),
    "posterior": Ablation(summary="score by the probability of being right", options={"score": "posterior"}),
    "no-memory": Ablation(summary="hidden state reset at every step", options={"core": "reset"}),
    "linear": Ablation(summary="linear router, no hidden layer", options={"core": "linear"}),
    "mlp": Ablation(summary="one hidden layer, no memory", options={"core": "mlp"}),
    "no-summary": Ablation(
        summary="the gate never reads the summary",
        rows=without_summary,
        is_blind=True,
        not_in_paper="gate.preset paper embeds query and summary together",
    ),
    "hard": Ablation(summary="the paper's hard pairwise loss", options={"loss": "hard"}),
    "hinge": Ablation(summary="hinge loss", options={"loss": "hinge"}),
    "listnet": Ablation(summary="ListNet loss", options={"loss": "listnet"}),
    "fixed-1": Ablation(summary="always one agent", spec={"rule": "fixed", "max_agents": 1, "cascade": False}),
    "fixed-3": Ablation(summary="always three agents", spec={"rule": "fixed", "max_agents": 3, "cascade": False}),
    "no-cascade": Ablation(summary="unsure steps ask nobody else", spec={"cascade": False}),
    "paper": Ablation(
        summary="the paper's preset, trained on first steps",
        rows=as_paper,
        preset="paper",
        options={"loss": "hard", "score": "raw"},
        not_in_paper="the pool's gate.preset is paper already",
    ),
    # Controls of the raw score: anchors take off what an agent gives on average, and leave no favourite to find.
    "shuffled-within": Ablation(
        summary="control: entropies dealt out among the agents of a step", rows=within_rows, options={"score": "raw"}
    ),
    "shuffled-across": Ablation(
        summary="control: entropies dealt out among the queries of an agent", rows=across_rows, options={"score": "raw"}
    ),
}
"""By name, in the order of tables."""


def left_out(config: Config) -> dict[str, str]:
    """Return the ablations that do not apply to a pool, each with the reason."""
    is_paper = config.gate.preset == "paper"
    return {name: ablation.not_in_paper for name, ablation in ABLATIONS.items() if is_paper and ablation.not_in_paper}


def train_ablation(
    name: str, rollouts: Path, out: Path, config: Config, context: TrainContext, options: Mapping[str, Any] | None = None
) -> Path:
    """Train one ablation in process, or take the one that is there, and return the folder of its checkpoint.

    `options` change what all ablations have in common, such as the seed. Raises ConfigError, for one that does not apply to
    the pool too, CheckpointError, DmoaError.
    """
    ablation = ABLATIONS[name]
    if name in left_out(config):
        allowed = ", ".join(other for other in ABLATIONS if other not in left_out(config))
        raise ConfigError(f"ablation is {name!r}; {left_out(config)[name]}; choose one of {allowed}")
    folder, common = out / name, dict(options or {})
    if ablation.preset is not None:
        gate = config.gate.model_copy(update={"preset": ablation.preset, "head": "linear"})
        config = config.model_copy(update={"gate": gate})
    source = rollouts
    if ablation.rows is not None:
        source = folder / "rollouts"
        write_changed(rollouts, source, ablation.rows, seed=int(common.get("seed", 0)), preset=ablation.preset)
    values = {**common, **ablation.options, "rollouts": source, "out": folder, "workers": 0, "track": "none"}
    result = run_training(TrainOptions.parse(values), config, context)
    if not ablation.spec and not ablation.is_blind:
        return result.checkpoint
    trained, record = checkpoint.load(result.checkpoint)
    changed = _changed(trained, ablation)
    described = checkpoint.describe_gate(
        changed,
        fingerprint=record.pool_fingerprint,
        trained_on=record.trained_on,
        parent=record.version,
        anchor_set=record.anchor_set,
        metrics=record.metrics,
    )
    return checkpoint.save(folder / "changed", changed, described)


def _changed(trained: Gate, ablation: Ablation) -> Gate:
    """Return a trained gate as an ablation would have it: the same weights, another activation, or blind to the summary."""
    spec = dataclasses.replace(trained.spec, **ablation.spec)
    gate = Gate.of(spec, trained.state_dict(), label_model=trained.label_model)
    if ablation.is_blind:
        with torch.no_grad():
            _input_weights(gate)[:, spec.embedding_dim : 2 * spec.embedding_dim] = 0.0
    return gate


def _input_weights(gate: Gate) -> torch.Tensor:
    """Return the weights [.., X] that the gate's input meets first."""
    if gate.spec.core == "linear":
        return gate.head_weight if gate.spec.head == "linear" else gate.query_weight
    return gate.layer_weight if gate.spec.core == "mlp" else gate.weight_ih


def write_changed(rollouts: Path, out: Path, rows: Rows, *, seed: int, preset: str | None = None) -> None:
    """Write a copy of rollouts with changed rows, in one part; a copy that is there is left alone."""
    folder, asked = RolloutFolder(out), RolloutFolder(rollouts).queries
    if folder.manifest.exists():
        return
    manifest: Manifest = read_manifest(rollouts)
    changed = rows(read_table(rollouts), seed)
    folder.parts.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(changed, buffer, write_page_checksum=True)
    write_whole(folder.parts / "part-00000.parquet", buffer.getvalue())
    if asked.exists():  # answers are read by what was asked
        write_whole(folder.queries, asked.read_bytes())
    if preset is not None:
        manifest = manifest.model_copy(update={"preset": preset})
    write_whole(folder.manifest, (manifest.model_dump_json(indent=2) + "\n").encode())


def _with_lists(table: pa.Table, name: str, values: np.ndarray[Any, Any]) -> pa.Table:
    """Return a table with a column of float32 lists replaced by the rows of an array."""
    ends = pa.array(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32))
    return _with_column(table, name, pa.ListArray.from_arrays(ends, pa.array(values.ravel())))


def _with_column(table: pa.Table, name: str, column: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), column)
