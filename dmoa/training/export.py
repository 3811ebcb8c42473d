"""What comes out of a training: the best weights as a dmoa checkpoint, with what was fitted on the held-back queries.

Shape letters: N steps that are looked at, A agents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmoa.checkpoint import AnchorSet, Checkpoint, describe_gate
from dmoa.core.calibration import OperatingPoint, fit_operating_point
from dmoa.core.gate import Gate, GateSpec
from dmoa.core.scores import scores
from dmoa.training.episodes import Episodes
from dmoa.training.objective import Batches
from dmoa.training.options import TrainOptions
from dmoa.training.run_state import Progress
from dmoa.training.targets import Scale, TrainingData
from dmoa.training.validation import logits_of, measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained gate and its record."""

    gate: Gate
    record: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a gate was trained and is judged on."""

    episodes: Episodes
    data: TrainingData
    scale: Scale


def fit_spec(gate: Gate, evidence: Evidence, options: TrainOptions) -> tuple[GateSpec, OperatingPoint | None]:
    """Return the gate's spec with tau, theta and anchors as the held-back dense steps give them, and the point they make.

    Without such steps tau and theta stay as they are, and there is no point. theta is fitted on finished replies only, and left
    out in the `paper` preset, whose steps end by the summarizer. Source: ours.
    """
    spec, episodes, scale = gate.spec, evidence.episodes, evidence.scale
    anchors = tuple(float(value) for value in scale.used_anchors) if scale.used_anchors is not None else None
    spec = dataclasses.replace(spec, score=scale.score, anchors=anchors)
    dense = episodes.dense_steps(evidence.data.held_Q)
    if not episodes.ran_NA[dense].any():
        return spec, None
    is_dense_N = np.isin(episodes.steps_of(evidence.data.held_Q), dense)
    logits_NA = logits_of(gate, _float32_batches(evidence.data), evidence.data.held_Q)[is_dense_N].astype(np.float32)
    finished_NA = np.where(
        episodes.cut_NA[dense], np.nan, scores(episodes.sum_NA[dense], episodes.tokens_NA[dense], scale.used_anchors)
    )
    has_theta = spec.preset != "paper" and bool(np.isfinite(finished_NA).any())
    point = fit_operating_point(
        spec,
        logits_NA,
        evidence.data.score_NA[dense],
        finished_NA if has_theta else None,
        alphas=options.alphas,
        theta_alphas=options.theta_alphas,
        price=options.agent_price,
    )
    return dataclasses.replace(spec, mass=point.tau, theta=point.theta), point


def build_trained(
    spec: GateSpec,
    weights: dict[str, torch.Tensor],
    evidence: Evidence,
    options: TrainOptions,
    progress: Progress,
    *,
    fingerprint: str,
    parent: str | None,
    trained_on: dict[str, Any],
    code_revision: str,
) -> Trained:
    """Return the gate with the given weights, fitted and measured, and its record."""
    gate = Gate(spec, profile_AD=weights.get("profile_AD"))
    gate.load_state_dict(weights)  # float64 weights become float32 here
    fitted, point = fit_spec(gate, evidence, options)
    final = Gate(fitted, profile_AD=weights.get("profile_AD"))
    final.load_state_dict(gate.state_dict())
    metrics = measure(final, _float32_batches(evidence.data), evidence.episodes, evidence.data)
    metrics |= {"eta": evidence.scale.eta, "epochs": float(len(progress.epochs)), "best_epoch": float(progress.best_epoch)}
    metrics |= {"updates": float(progress.num_updates), "bad_steps": float(progress.bad_steps)}
    metrics |= {} if progress.best_loss is None else {"held_loss": progress.best_loss}
    metrics |= {} if point is None else _metrics_of(point)
    record = describe_gate(
        final,
        fingerprint=fingerprint,
        trained_on=trained_on,
        parent=parent,
        anchor_set=_anchor_set(evidence.scale, spec, options),
        metrics=metrics,
        code_revision=code_revision,
    )
    return Trained(gate=final, record=record)


def _metrics_of(point: OperatingPoint) -> dict[str, float]:
    found = {"alpha": point.alpha, "agents": point.agents, "regret": point.regret}
    return found if point.theta_alpha is None else found | {"theta_alpha": point.theta_alpha}


def _anchor_set(scale: Scale, spec: GateSpec, options: TrainOptions) -> AnchorSet | None:
    if scale.anchors is None:
        return None
    constant = tuple(spec.agents[agent] for agent, _ in scale.constant) if scale.is_discounted else ()
    return AnchorSet(means=scale.anchors, rows=scale.anchor_rows, clusters=options.clusters, constant=constant)


def _float32_batches(data: TrainingData) -> Batches:
    return Batches(data, torch.float32, torch.device("cpu"))
