"""What a training begins with: the gate, and the rollouts as inputs and targets. Next stop: `training/train_loop`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dmoa import checkpoint
from dmoa.agents.pool import build_pool_gate, check_files, fingerprint
from dmoa.config import Config
from dmoa.core.gate import Gate
from dmoa.errors import ConfigError
from dmoa.storage import display_path
from dmoa.training.episodes import Episodes
from dmoa.training.export import Evidence
from dmoa.training.options import TrainOptions
from dmoa.training.reading import read_episodes, read_manifests
from dmoa.training.rollout_records import Manifest
from dmoa.training.targets import IndexArray, Scale, anchor_sample, build_data, fit_scale, split_episodes
from dmoa.training.train_loop import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The gate that training begins with."""

    gate: Gate
    parent: str | None
    """Version of the checkpoint that it is; None for untrained weights."""
    fingerprint: str
    """Of the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What is learned from, ready for the workers."""

    job: Job
    evidence: Evidence
    trained_on: dict[str, Any]
    """As the checkpoint records it."""


def build_start(options: TrainOptions, config: Config) -> Start:
    """Return the gate to begin with: `start_from`'s, else untrained weights of the pool's gate, changed as the options say.

    Blocks while an encoder loads, for the `profile` head. Raises ConfigError, CheckpointError.
    """
    check_files(config)
    gate, _ = build_pool_gate(options.gate_config(config))
    parent = None
    if options.start_from is not None:
        parent = checkpoint.load(options.start_from)[1].version
        for name in ("core", "head", "hidden", "temperature"):
            wanted, seen = getattr(options, name), getattr(gate.spec, name)
            if wanted not in (None, seen):
                raise ConfigError(
                    f"train: {name}: value seen: {wanted!r}; the checkpoint to start from has {seen!r}, and training cannot "
                    "change it; leave one of the two out"
                )
    changes = {"score": options.score or gate.spec.score, "max_agents": options.max_agents or gate.spec.max_agents}
    begun = Gate(dataclasses.replace(gate.spec, **changes), profile_AD=gate.state_dict().get("profile_AD"))  # type: ignore[arg-type] # typed by the fields
    begun.load_state_dict(gate.state_dict())
    return Start(gate=begun, parent=parent, fingerprint=fingerprint(config))


def check_rollouts(options: TrainOptions, start: Start) -> list[Manifest]:
    """Return the manifests of the rollouts to learn from. Raises ConfigError for what a look at the folders shows to be wrong."""
    if options.anchor_rollouts is not None:
        read_manifests([options.anchor_rollouts], start.gate.spec, start.fingerprint)
    return read_manifests(options.rollouts, start.gate.spec, start.fingerprint)


def prepare(options: TrainOptions, start: Start, manifests: Sequence[Manifest], *, on_ray: bool) -> Material:
    """Read the rollouts and make of them what training needs. Raises ConfigError for what cannot be learned from."""
    spec = start.gate.spec
    episodes = read_episodes(options.rollouts, spec, start.fingerprint, on_ray=on_ray)
    split = split_episodes(episodes, options.holdout)
    sample, anchors_of = anchor_sample(episodes, split.train_Q, spec.embedding_dim), "rollouts"
    if options.anchor_rollouts is not None:
        others = read_episodes([options.anchor_rollouts], spec, start.fingerprint, on_ray=on_ray)
        sample, anchors_of = anchor_sample(others, _all(others), spec.embedding_dim), others.digest()
    scale = fit_scale(
        episodes,
        split,
        sample,
        score=spec.score,
        num_clusters=options.clusters,
        seed=options.seed,
        earlier=spec.anchors,
        discounts_constant=options.discount_constant,
    )
    data = build_data(episodes, split, scale)
    weights = {name: tensor.detach().clone() for name, tensor in start.gate.state_dict().items()}
    identity = {
        "options": options.identity(),
        "pool": start.fingerprint,
        "rollouts": episodes.digest(),
        "anchors": anchors_of,
        "targets": _targets(scale),
        "begins with": _digest(weights),
    }
    trained_on = {
        "rollouts": episodes.digest(),
        "anchors": anchors_of,
        "folders": [_summary(*pair) for pair in zip(options.rollouts, manifests, strict=True)],
        "queries": len({key.query_id for key in episodes.key_Q}),
        "episodes": len(split.train_Q),
        "held_back_episodes": len(split.held_Q),
        "steps": len(episodes.input_NX),
        "dense_steps": len(episodes.dense_steps(_all(episodes))),
        "options": options.identity(),
    }
    job = Job(options=options, spec=spec, weights=weights, data=data, eta=scale.eta, identity=identity)
    return Material(job=job, evidence=Evidence(episodes=episodes, data=data, scale=scale), trained_on=trained_on)


def tell_constant(material: Material) -> list[str]:
    """Return a line for every agent that gives one reply to nearly all dense steps: what it is, and what came of it."""
    scale, agents = material.evidence.scale, material.job.spec.agents
    if scale.score == "raw":
        then = "with score raw its sureness counts as everybody's; --score anchored discounts it"
    elif scale.is_discounted:
        then = "it counts as less sure than everybody else; --keep-constant takes its sureness as it is"
    else:
        then = "its sureness is taken as it is, as asked for"
    return [f"{agents[agent]} gives one reply to {share:.0%} of the dense steps: {then}" for agent, share in scale.constant]


def tell_silent(material: Material) -> list[str]:
    """Return a line for every agent that no reply with an entropy is known of: nothing is learned about it."""
    episodes, agents = material.evidence.episodes, material.job.spec.agents
    heard_A, asked_A = (np.asarray(found_NA.any(axis=0)) for found_NA in (episodes.ran_NA, episodes.asked_NA))
    then = "the gate learns nothing about it and ranks it by accident"
    return [
        f"{name} {'never answered with an entropy' if is_asked else 'was never asked'} in these rollouts: {then}; "
        f"{'mend it and collect again, or take it out of the pool' if is_asked else 'collect dense rollouts'}"
        for name, is_heard, is_asked in zip(agents, heard_A, asked_A, strict=True)
        if not is_heard
    ]


def _all(episodes: Episodes) -> IndexArray:
    return np.arange(len(episodes.key_Q))


def _targets(scale: Scale) -> str:
    """Return what scores are measured by, in words: by another version's fit, a run is another run."""
    anchors = ", ".join(f"{value:.6g}" for value in scale.anchors or ())
    return f"eta {scale.eta:.6g}, anchors [{anchors}]"


def _summary(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": display_path(folder),
        "gate_version": manifest.gate_version,
        "mode": manifest.mode,
        "epsilon": manifest.epsilon,
        "round": manifest.round,
        "seed": manifest.seed,
        "sources": {source.name: source.queries for source in manifest.sources},
        "engines": list(manifest.engines),
    }


def _digest(weights: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {list(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
