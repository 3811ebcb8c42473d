"""A whole training of a gate: the start, the data, the epochs, what is fitted after them, the checkpoint and its curves.

`run_training` is what `dmoa train`, rounds and ablations call; `training/loop` holds the updates, which run here or in the
workers of `training/ray_train`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmoa import checkpoint
from dmoa.agents.pool import build_pool_gate, check_files, fingerprint
from dmoa.checkpoint import AnchorSet, Checkpoint, describe_gate
from dmoa.config import Config
from dmoa.core.calibration import ENTROPY_PRICE, OperatingPoint, fit_operating_point
from dmoa.core.gate import Gate, GateSpec
from dmoa.core.scores import Array, IntArray, scores
from dmoa.errors import ConfigError, DmoaError
from dmoa.reading import offsets
from dmoa.storage import display_path, write_whole
from dmoa.tracking import FINISH_TIMEOUT_S, Tracker, is_logged, keep_run_id, open_tracker
from dmoa.training.dataset import Episodes, read_episodes, read_manifests
from dmoa.training.distributed import SingleWorker
from dmoa.training.gate_metrics import Ranking, load_shares, logits_of, measure_gate, ranking_of
from dmoa.training.judging import (
    competence_bias,
    fit_judge,
    fit_judged_point,
    judged,
    tell_trust,
    with_outcomes,
    witnesses_of_steps,
)
from dmoa.training.loop import TrainJob, train_gate
from dmoa.training.objective import Batches, Scale, TrainingData, anchor_sample, build_data, fit_scale, split_episodes
from dmoa.training.options import TrainOptions
from dmoa.training.outcomes import read_outcomes
from dmoa.training.rollouts import FileRecord, Manifest, RolloutFolder
from dmoa.training.state import EpochRecord, StateStore, TrainProgress
from dmoa.types import supervision_of
from dmoa.validation import redact

_POLL_S = 0.25
_REMOTE_POLL_S = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialGate:
    """The gate that training begins with."""

    gate: Gate
    parent: str | None
    """Version of the checkpoint that it is; None for untrained weights."""
    fingerprint: str
    """Of the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What is learned from, ready for the workers."""

    job: TrainJob
    evidence: FittedTargets
    trained_on: dict[str, Any]
    """As the checkpoint records it."""
    outcomes: tuple[int, int] | None = None
    """How many outcomes are of these rollouts, and how many were handed over."""


def build_start(options: TrainOptions, config: Config) -> InitialGate:
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
                    f"train: {name} is {wanted!r}; the checkpoint to start from has {seen!r}, and training cannot "
                    "change it; leave one of the two out"
                )
    changes: dict[str, Any] = {
        "score": options.score or gate.spec.score,
        "max_agents": options.max_agents or gate.spec.max_agents,
    }
    if changes["score"] == "posterior" and options.agent_price is not None:
        if options.agent_price > 1:
            raise ConfigError(
                f"train: agent_price is {options.agent_price:g}; with score posterior it is a gain of probability, 0 to 1"
            )
        changes["agent_price"] = options.agent_price
    begun = Gate.of(dataclasses.replace(gate.spec, **changes), gate.state_dict(), label_model=gate.label_model)
    return InitialGate(gate=begun, parent=parent, fingerprint=fingerprint(config))


def check_rollouts(options: TrainOptions, start: InitialGate) -> list[Manifest]:
    """Return the manifests of the rollouts to learn from. Raises ConfigError for what a look at the folders shows to be wrong."""
    if options.anchor_rollouts is not None:
        read_manifests([options.anchor_rollouts], start.gate.spec, start.fingerprint)
    return read_manifests(options.rollouts, start.gate.spec, start.fingerprint)


def prepare_training(options: TrainOptions, start: InitialGate, manifests: Sequence[Manifest], *, on_ray: bool) -> TrainingSet:
    """Read the rollouts and make of them what training needs. Raises ConfigError for what cannot be learned from."""
    spec = start.gate.spec
    episodes = read_episodes(options.rollouts, spec, start.fingerprint, on_ray=on_ray)
    supervision, outcomes = supervision_of(start.parent or ""), None
    if options.outcomes is not None:
        if spec.score != "posterior":
            raise ConfigError(f"--outcomes: score is {spec.score!r}, which reads none; add --score posterior, or leave them out")
        given = read_outcomes(options.outcomes)
        episodes, used = with_outcomes(episodes, given, options.rollouts, manifests)
        supervision, outcomes = f"outcomes({used})", (used, len(given))
    split = split_episodes(episodes, options.holdout)
    sample, anchors_of = anchor_sample(episodes, split.train_Q, spec.embedding_dim), "rollouts"
    if options.anchor_rollouts is not None:
        others = read_episodes([options.anchor_rollouts], spec, start.fingerprint, on_ray=on_ray)
        sample, anchors_of = anchor_sample(others, np.arange(len(others.key_Q)), spec.embedding_dim), others.digest()
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
    if spec.score == "posterior":
        judge = fit_judge(episodes, split.train_Q, spec, seed=options.seed, earlier=start.gate.label_model)
        scale = judged(scale, judge, episodes, spec)
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
        "dense_steps": len(episodes.dense_steps(np.arange(len(episodes.key_Q)))),
        "options": options.identity(),
        "supervision": supervision,
    }
    job = TrainJob(options=options, spec=spec, weights=weights, data=data, eta=scale.eta, identity=identity)
    evidence = FittedTargets(episodes=episodes, data=data, scale=scale)
    return TrainingSet(job=job, evidence=evidence, trained_on=trained_on, outcomes=outcomes)


def tell_outcomes(training_set: TrainingSet) -> list[str]:
    """Return a line on how many of the outcomes count, if there are any."""
    if training_set.outcomes is None:
        return []
    used, given = training_set.outcomes
    rest = "; the others are of other queries, agents or later steps, or of a final answer that no first reply is known to give"
    return [f"{used} of {given} outcomes are of these rollouts{rest if used < given else ''}"]


def tell_constant(training_set: TrainingSet) -> list[str]:
    """Return a line for every agent that gives one reply to nearly all dense steps: what it is, and its effect."""
    scale, agents = training_set.evidence.scale, training_set.job.spec.agents
    if scale.score == "raw":
        then = "with score raw its sureness counts as everybody's; --score anchored discounts it"
    elif scale.score == "posterior":
        then = "it counts for as much as others confirm"
    elif scale.is_discounted:
        then = "it counts as less sure than everybody else; --keep-constant takes its sureness as it is"
    else:
        then = "its sureness is taken as it is, as asked for"
    return [f"{agents[agent]} gives one reply to {share:.0%} of the dense steps: {then}" for agent, share in scale.constant]


def tell_silent(training_set: TrainingSet) -> list[str]:
    """Return a line for every agent that no reply with a score is known of: nothing is learned about it."""
    evidence, agents = training_set.evidence, training_set.job.spec.agents
    heard_A, asked_A = (np.asarray(found_NA.any(axis=0)) for found_NA in (evidence.data.ran_NA, evidence.episodes.asked_NA))
    then = "the gate learns nothing about it and ranks it by accident"
    return [
        f"{name} {'never answered with an entropy' if is_asked else 'was never asked'} in these rollouts: {then}; "
        f"{'mend it and collect again, or take it out of the pool' if is_asked else 'collect dense rollouts'}"
        for name, is_heard, is_asked in zip(agents, heard_A, asked_A, strict=True)
        if not is_heard
    ]


def tell_trusted(training_set: TrainingSet) -> list[str]:
    """Return a line for every context of the label model, if there is one: what it goes by."""
    model = training_set.evidence.scale.label_model
    return [] if model is None else tell_trust(model, training_set.job.spec.agents)


def _targets(scale: Scale) -> str:
    """Return what scores are measured by, in words: by another version's fit, a run is another run."""
    anchors = ", ".join(f"{value:.6g}" for value in scale.anchors or ())
    judge = "" if scale.label_model is None else f", label model {scale.label_model.digest()}"
    return f"eta {scale.eta:.6g}, anchors [{anchors}]{judge}"


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


class Curves:
    """The tracker of a training, and the thread that feeds it."""

    def __init__(
        self, options: TrainOptions, pool: str, identity: Mapping[str, Any], finish_timeout_s: float = FINISH_TIMEOUT_S
    ) -> None:
        """Follow the run in `options.out`; its tracker is opened when there is something to log. `identity`: of the training."""
        self._options, self._out, self._finish_timeout_s = options, options.out.absolute(), finish_timeout_s
        self._settings = {"pool_name": pool, **identity}
        self._of = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._opened: Tracker | None = None
        if options.track != "none":
            keep_run_id(self._out, of=self._of)  # what another run logged here is set aside
        self._logged = _logged_epochs(self._out / "metrics.jsonl")

    @property
    def _tracker(self) -> Tracker:
        if self._opened is None:
            mode, name = self._options.track, self._out.name or "train"
            self._opened = open_tracker(
                mode,
                run_dir=self._out,
                name=name,
                of=self._of,
                config=self._settings,
                after=self._options.rollouts,
                finish_timeout_s=self._finish_timeout_s,
            )
        return self._opened

    @contextmanager
    def follow(self, store: StateStore, watch: Callable[[EpochRecord], None]) -> Iterator[None]:
        """Call `watch` with each epoch that ends in this block, and log every epoch that is not logged yet."""
        done = threading.Event()
        seen = len(before.epochs) if (before := store.read_progress()) else 0

        def look() -> None:
            nonlocal seen
            with suppress(ConfigError, OSError):  # a look that fails is made up for by the next
                progress = store.read_progress()
                for record in progress.epochs if progress else ():
                    self._log(record)
                    if record.epoch > seen:
                        seen = record.epoch
                        watch(record)

        def loop() -> None:
            while not done.wait(_REMOTE_POLL_S if "://" in store.place else _POLL_S):
                look()

        thread = threading.Thread(target=loop, name="curves", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            look()

    def _log(self, record: EpochRecord) -> None:
        if record.epoch not in self._logged:
            self._logged.add(record.epoch)
            values = {name: value for name, value in record.model_dump().items() if name != "epoch" and value is not None}
            self._tracker.log(values, step=record.epoch)

    def end(self, trained: Checkpoint, load: Mapping[str, float], folder: Path, parent: str | None) -> None:
        """Log the results (metrics, the routing table, the checkpoint), and link the rollouts and the gate that it started from.

        Nothing where that is logged already.
        """
        name = checkpoint.artifact_name(trained.version)
        if is_logged(self._out, "artifact", name=name, kind="checkpoint", role="output"):
            return
        self._tracker.log({f"held/{name}": value for name, value in trained.metrics.items()})
        self._tracker.table("first_choices", ["agent", "share of held-back steps"], [list(item) for item in load.items()])
        self._tracker.artifact(folder, name, "checkpoint")
        # After the output: W&B waits for inputs that it does not have yet.
        options = self._options
        anchors = [] if options.anchor_rollouts is None else [options.anchor_rollouts]
        for rollouts in map(RolloutFolder, dict.fromkeys((*options.rollouts, *anchors))):
            self._tracker.artifact(rollouts.parts, rollouts.artifact, "rollouts", role="input")
        if options.start_from is not None and parent is not None:
            self._tracker.artifact(options.start_from, checkpoint.artifact_name(parent), "checkpoint", role="input")

    def close(self) -> None:
        """End the logging."""
        if self._opened is not None:
            self._opened.finish()


def _logged_epochs(path: Path) -> set[int]:
    """Return the epochs that a file of curves holds already."""
    found: set[int] = set()
    for _, line in offsets(path):
        with suppress(ValueError, KeyError, TypeError):
            message = json.loads(line)
            if message["op"] == "log" and message["step"] is not None:
                found.add(int(message["step"]))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTargets:
    """What a gate was trained and is judged on."""

    episodes: Episodes
    data: TrainingData
    scale: Scale

    @property
    def batches(self) -> Batches:
        """Its steps in the precision that is served."""
        return Batches(self.data, torch.float32, torch.device("cpu"))

    @property
    def dense(self) -> IntArray:
        """The held-back dense steps [R]."""
        return self.episodes.dense_steps(self.data.held_Q)

    def dense_logits(self, gate: Gate) -> Array:
        """Return a gate's logits of the held-back dense steps [R, A]."""
        held_Q = self.data.held_Q
        return logits_of(gate, self.batches, held_Q)[np.isin(self.episodes.steps_of(held_Q), self.dense)]

    def anchor_set(self, agents: tuple[str, ...], clusters: int) -> AnchorSet | None:
        """Return the anchors as a checkpoint keeps them, None without any."""
        scale = self.scale
        if scale.anchors is None:
            return None
        constant = tuple(agents[agent] for agent, _ in scale.constant) if scale.is_discounted else ()
        return AnchorSet(means=scale.anchors, rows=scale.anchor_rows, clusters=clusters, constant=constant)


def fit_spec(gate: Gate, evidence: FittedTargets, options: TrainOptions) -> tuple[GateSpec, dict[str, float]]:
    """Return the gate's spec with tau, theta and anchors as the held-back dense steps give them, and the point's metrics.

    Without such steps (with score posterior: without an answer in them) tau and theta stay as they are, and there are no metrics.
    theta is fitted on finished replies only, and left out in the `paper` preset, whose steps end by the summarizer. Source: ours.
    """
    spec, episodes, scale = gate.spec, evidence.episodes, evidence.scale
    anchors = tuple(float(value) for value in scale.used_anchors) if scale.used_anchors is not None else None
    spec = dataclasses.replace(spec, score=scale.score, anchors=anchors)
    dense = evidence.dense
    if not evidence.data.ran_NA[dense].any():
        return spec, {}
    logits_NA = evidence.dense_logits(gate).astype(np.float32)
    if scale.label_model is not None and scale.right_NA is not None:
        witnesses = witnesses_of_steps(episodes, dense, spec)
        if not (witnesses.answer_RA >= 0).any():
            return spec, {}
        point, shares = fit_judged_point(
            spec,
            scale.label_model,
            witnesses,
            logits_NA,
            scale.right_NA[dense],
            alphas=options.alphas,
            theta_alpha=options.theta_alpha or (None if options.alpha == "auto" else options.alpha),
        )
        return _at_point(spec, point, shares)
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
        price=ENTROPY_PRICE if options.agent_price is None else options.agent_price,
    )
    return _at_point(spec, point, {})


def _credit_competence(gate: Gate, evidence: FittedTargets) -> None:
    """Let a linear gate of score posterior start from the competence of its agents (`judging.competence_bias`)."""
    scale, dense = evidence.scale, evidence.dense
    if scale.label_model is None or scale.target_NA is None or gate.spec.head != "linear" or not len(dense):
        return
    bias_A = competence_bias(scale.label_model, evidence.dense_logits(gate), scale.target_NA[dense], gate.spec.temperature)
    with torch.no_grad():
        gate.head_bias.add_(torch.from_numpy(bias_A))


def build_trained(
    start: InitialGate, training_set: TrainingSet, progress: TrainProgress, weights: dict[str, Tensor], code_revision: str
) -> tuple[Gate, Checkpoint]:
    """Return the gate with the given weights, fitted and measured, and its record. Raises DmoaError where it gives no numbers."""
    job, evidence = training_set.job, training_set.evidence
    gate = Gate.of(job.spec, weights)
    if not np.isfinite(logits_of(gate, evidence.batches, evidence.data.held_Q)).all():
        raise DmoaError(f"train: the gate's logits of held-back queries are not finite; lower lr, which is {job.options.lr:g}")
    _credit_competence(gate, evidence)
    fitted, point = fit_spec(gate, evidence, job.options)
    final = Gate.of(fitted, gate.state_dict(), label_model=evidence.scale.label_model)
    metrics = measure_gate(final, evidence.batches, evidence.episodes, evidence.data)
    metrics |= {"eta": evidence.scale.eta, "epochs": float(len(progress.epochs)), "best_epoch": float(progress.best_epoch)}
    metrics |= {"updates": float(progress.num_updates), "bad_steps": float(progress.bad_steps)}
    metrics |= {} if progress.best_loss is None else {"held_loss": progress.best_loss}
    metrics |= point
    record = describe_gate(
        final,
        fingerprint=start.fingerprint,
        trained_on=training_set.trained_on,
        parent=start.parent,
        anchor_set=evidence.anchor_set(fitted.agents, job.options.clusters),
        metrics=metrics,
        code_revision=code_revision,
    )
    return final, record


def _at_point(spec: GateSpec, point: OperatingPoint, shares: dict[str, float]) -> tuple[GateSpec, dict[str, float]]:
    """Return a spec with the numbers of an operating point, and the point's metrics."""
    spec = dataclasses.replace(spec, mass=1.0 - point.mass_left, fitted_left=point.mass_left, theta=point.theta)
    found = {"alpha": point.alpha, "agents": point.agents, "regret": point.regret}
    found |= {} if point.theta_alpha is None else {"theta_alpha": point.theta_alpha}
    return spec, found | shares


class TrainReport(FileRecord):
    """`train.json`: what a training was, and its results."""

    schema_version: int = 1
    command: str
    """The command line; secrets are taken out."""
    code_revision: str
    options: dict[str, Any]
    pool: str
    pool_fingerprint: str
    workers: int
    """Of the last session; 0: in process."""
    workers_note: str
    """Why this number of workers was chosen."""
    trained_on: dict[str, Any]
    parent: str | None
    """Version of the gate that training began with; null: untrained weights."""
    version: str
    """Of the checkpoint."""
    ended: str
    """Why training was over."""
    epochs: list[EpochRecord]
    metrics: dict[str, float]
    """Of the checkpoint's weights, on the held-back queries."""
    ranking: Ranking = "unknown"
    """Whether the interval of `pairwise` among the metrics lies above 0.5."""
    trust: list[str] = Field(default_factory=list)
    """With score posterior, a line for every context of the label model: what it goes by there, and why."""
    silent: list[str] = Field(default_factory=list)
    """A line for every agent that the rollouts hold no reply of: what that means."""
    load: dict[str, float]
    """By agent, on which share of the held-back steps it is the most probable one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished training."""

    checkpoint: Path
    record: Checkpoint
    report: TrainReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """What a training needs of the command that runs it."""

    open_ray: Callable[[], AbstractContextManager[None]] = nullcontext
    """Joins or starts Ray; not called for a training in process."""
    say: Say = lambda text: None
    watch: Callable[[EpochRecord, int], None] = lambda epoch, most: None
    """Called with each epoch of this session, and how many there may be."""
    command: str = ""
    code_revision: str = ""
    finish_timeout_s: float = FINISH_TIMEOUT_S
    """How long the end of the logging is waited for."""


def run_training(options: TrainOptions, config: Config, context: TrainContext) -> TrainResult:
    """Train a gate for a pool, or go on with the training in `options.out`.

    Raises ConfigError and CheckpointError for bad input, DmoaError where training stops; an earlier checkpoint in the folder
    stays as it is then, and the state that was kept last too.
    """
    if options.gpu and options.workers == 0 and not torch.cuda.is_available():  # those of workers are Ray's to count
        raise ConfigError("train: gpu is set, workers is 0, and torch finds no GPU on this machine; leave --gpu out")
    store = StateStore(options.storage_path or str(options.out.absolute() / "state"))
    store.check()
    checkpoint.check_replaced(options.out / "checkpoint")
    start = build_start(options, config)
    manifests = check_rollouts(options, start)
    on_ray = options.workers != 0
    with context.open_ray() if on_ray else nullcontext():
        training_set = prepare_training(options, start, manifests, on_ray=on_ray)
        for line in (*tell_outcomes(training_set), *tell_constant(training_set), *tell_trusted(training_set)):
            context.say(line)
        before = _progress_before(store, training_set.job)
        if before is not None:
            context.say(
                f"going on after epoch {len(before.epochs)}" if before.ended is None else f"already trained: {before.ended}"
            )
        workers, note = _choose(options)
        context.say(f"{workers} worker{'s' if workers > 1 else ''}: {note}" if workers else note)
        curves = Curves(options, config.name, training_set.job.identity, context.finish_timeout_s)
        try:
            with curves.follow(store, lambda epoch: context.watch(epoch, options.epochs)):
                if (before is None or before.ended is None) and workers:
                    from dmoa.training.ray_train import train_on_ray

                    train_on_ray(training_set.job, store, workers)
                elif before is None or before.ended is None:
                    train_gate(training_set.job, SingleWorker(torch.device("cuda" if options.gpu else "cpu")), store)
            return _finish(config, start, training_set, store, curves, context, (workers, note))
        finally:
            curves.close()


def _progress_before(store: StateStore, job: TrainJob) -> TrainProgress | None:
    """Return how far the run in the folder is. Raises ConfigError where it is another one's, naming what differs."""
    before = store.read_progress()
    if before is None or before.identity == job.identity:
        return before
    then, now = _flat(before.identity), _flat(job.identity)
    names = [name for name in then | now if then.get(name) != now.get(name)]
    different = "; ".join(f"{name}: begun with {then.get(name)}, now {now.get(name)}" for name in names)
    raise ConfigError(
        f"--out: {display_path(job.options.out)!r} holds another training; {different}; repeat its options and rollouts to go on "
        "with it, or name another folder"
    )


def _places(options: TrainOptions) -> dict[str, Any]:
    """Return the options that are places as a user knows them: what lies at a URI is read from a local copy."""
    found: dict[str, Any] = {name: display_path(value) for name, value in options if isinstance(value, Path)}
    return found | {"rollouts": [display_path(folder) for folder in options.rollouts]}


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in identity.items() if name != "options"}
    return {**identity.get("options", {}), **rest}


def _choose(options: TrainOptions) -> tuple[int, str]:
    """Return the number of workers, and why."""
    if options.workers == "auto":
        return 1, "an update of a gate is shorter than what several workers would need to agree on it"
    return options.workers, "in process, without Ray" if options.workers == 0 else "as asked for"


def _finish(
    config: Config,
    start: InitialGate,
    training_set: TrainingSet,
    store: StateStore,
    curves: Curves,
    context: TrainContext,
    workers: tuple[int, str],
) -> TrainResult:
    """Measure and export the best weights, and write down what the training was."""
    state = store.read()
    assert state is not None
    assert state.progress.ended is not None
    options, evidence = training_set.job.options, training_set.evidence
    gate, record = build_trained(start, training_set, state.progress, state.part("best"), context.code_revision)
    report = TrainReport(
        command=context.command,
        code_revision=context.code_revision,
        options=redact(options.model_dump(mode="json") | _places(options)),
        pool=config.name,
        pool_fingerprint=start.fingerprint,
        workers=workers[0],
        workers_note=workers[1],
        trained_on=training_set.trained_on,
        parent=start.parent,
        version=record.version,
        ended=state.progress.ended,
        epochs=list(state.progress.epochs),
        metrics=record.metrics,
        ranking=ranking_of(record.metrics),
        trust=tell_trusted(training_set),
        silent=tell_silent(training_set),
        load=load_shares(gate, evidence.batches, evidence.data.held_Q),
    )
    out = options.out.absolute()
    folder = checkpoint.save(out / "checkpoint", gate, record)
    write_whole(out / "train.json", (report.model_dump_json(indent=2) + "\n").encode())
    curves.end(record, report.load, folder, start.parent)
    return TrainResult(checkpoint=folder, record=record, report=report)
