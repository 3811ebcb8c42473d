"""Adaptation: one update of a deployed gate's weights from newly answered queries, label-free, with a replay of old domains.

`dmoa adapt` drives it over the first queries of a benchmark, the long-lived job over the feedback of a running swarm. Loss,
targets and batches are those of training (`training/objective`, `training/loop`); what is added is the replay, the pull back to
the deployed weights, and that tau, theta, anchors and label model stay as deployed unless a shift is declared. Source: replay
and anchoring after CoTTA and EATA, the rest ours. Shape letters: Q episodes, N steps, A agents, X gate input.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dmoa.checkpoint import AnchorSet, Checkpoint, describe_gate
from dmoa.core.gate import Gate, GateSpec
from dmoa.core.in_step import context_part
from dmoa.core.inference import one_thread
from dmoa.core.label_model import MIN_ROWS
from dmoa.core.scores import CONSTANT_PENALTY, USUAL_SHARE, IntArray, fit_eta, same_reply_shares, scores
from dmoa.core.told import OutcomeTable
from dmoa.core.witnesses import NOT_ASKED
from dmoa.errors import ConfigError
from dmoa.feedback import MARK, Feedback
from dmoa.training.dataset import EpisodeBuilder, Episodes, asked_of
from dmoa.training.distributed import WorkerGroup
from dmoa.training.judging import fit_judge, judged, witnesses_of_steps
from dmoa.training.loop import Learner, TrainJob
from dmoa.training.objective import Scale, Split, TrainingData, anchor_sample, build_data, fit_scale, unroll
from dmoa.training.options import AdaptSettings, TrainOptions
from dmoa.training.rollouts import RolloutQuery, table_of
from dmoa.training.trainer import FittedTargets, fit_spec
from dmoa.types import Answer, Stage, supervision_of

_PROBED = 64
"""Replayed queries, at most, that the drift is measured on."""
_CLUSTERS = 8
_MAX_KNOWN = 10_000
"""Newest queries that are known by name; one that waits to teach is in its last batch long before so many others were."""
_LED = "led by outcomes"
_HEARD = 4
"""Replies to queries of the stream, at least, by which an agent shows that it does not say the same to everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One answered query to learn from: every step with its decision, its gate input, and the replies with their propensities."""

    query_id: str
    answer: Answer
    asked: str = ""
    """What was asked, for reading the answers; empty where their texts are tokens (`dmoa/feedback`)."""
    stages: tuple[Stage, ...] = ()
    outcomes: Mapping[str, float] = field(default_factory=dict)
    """Agent -> how good its reply to the first step was found to be, 0 to 1. Read by score posterior only."""


def lesson_of(record: Feedback, outcomes: Mapping[str, float] | None = None) -> Lesson:
    """Return a query of the traffic as a lesson, with what outcomes say of its first replies."""
    return Lesson(query_id=f"{MARK}{record.answer.trace_id}", answer=record.answer, outcomes=outcomes or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptUpdate:
    """What one call of `Adapter.learn` did."""

    number: int
    """Updates so far, this one included; calls that changed nothing do not count."""
    loss: float | None
    """Mean over its gradient steps, each by the weights before it; None where nothing could be learned from."""
    used: int
    """Records that were taken in."""
    skipped: Mapping[str, int]
    """Reason -> records that were not."""
    replayed: int
    """Replayed queries, over all gradient steps."""
    bad_steps: int
    """Gradient steps that were left out because loss or gradient was not finite."""
    drift: float
    """KL(deployed routing || this one), nats, mean over replayed steps, over the stream's where nothing is replayed."""
    distance: float
    """||weights - deployed|| / ||deployed||."""
    refitted: bool
    """Whether anchors, eta, label model, tau and theta were fitted anew."""


class Adapter:
    """A deployed gate that follows new records. Not safe to use from two threads at once.

    Every worker of `world` makes its own from the same arguments and calls `learn` with the same records, in the same order
    (`WorkerGroup.share` gives the first worker's to all); each takes its part of every batch, and all hold the same weights.
    """

    def __init__(
        self, gate: Gate, checkpoint: Checkpoint, replay: Episodes | None, options: AdaptSettings, world: WorkerGroup
    ) -> None:
        """`gate` and `checkpoint`: as deployed. `replay`: dense or exploring episodes of old domains; None: none are known.

        Raises ConfigError for a replay of other agents.
        """
        if replay is not None and replay.agents != gate.spec.agents:
            raise ConfigError(f"replay: agents are {', '.join(replay.agents)}; expected {', '.join(gate.spec.agents)}")
        self.updates = 0
        self.used = 0
        """Queries that were taken in, each counted once, however many batches it was in."""
        self.outcomes = 0
        """Those of them that came with an outcome; 0 for scores that read none."""
        self._known: OrderedDict[str, bool] = OrderedDict()
        """Newest queries that were taken in, and whether an outcome came with them."""
        self._deployed, self._checkpoint, self._options, self._world = gate, checkpoint, options, world
        self.spec = gate.spec
        """Of the deployed gate: how records are to be read."""
        self._recent = EpisodeBuilder(gate.spec.agents, gate.spec.input_dim, has_feedback=False).pack()
        self._old = self._recent if replay is None else replay
        self._joined = len(self._old.key_Q)
        """Queries that have joined the replay so far, those that it began with included."""
        self._draw_Q = np.random.default_rng([options.seed, 0]).random(self._joined)
        """Of the replayed queries; those with the lowest draws stay."""
        self._scale = self._deployed_scale()
        self._table = self._new_table()
        self._is_own_scale = False
        self._refits = 0
        self._point: tuple[GateSpec, AnchorSet | None] | None = None
        """tau, theta and anchors of the last refit, once a candidate was made after it."""
        self._made: dict[str, tuple[Episodes, Scale, TrainingData]] = {}
        """What was made of the replay and of the recent queries, with what it was made of."""
        weights = {name: tensor.detach().clone() for name, tensor in gate.state_dict().items()}
        nothing = _data(self._recent, Scale(score="raw", eta=1.0, anchors=None), gate.spec)
        self._start = TrainJob(options=_training(options), spec=gate.spec, weights=weights, data=nothing, eta=1.0, identity={})
        self._learner = Learner(self._start, world)
        self._home = [parameter.detach().clone() for parameter in self._learner.gate.parameters()]
        self._home_gate = self._start.build_gate(world.device)

    def _deployed_scale(self) -> Scale | None:
        """Return what the deployed gate measures replies by; None where it was never fitted."""
        spec, judge = self.spec, self._deployed.label_model
        if (spec.score == "anchored" and spec.anchors is None) or (spec.score == "posterior" and judge is None):
            return None
        eta = 1.0 if spec.score == "posterior" else self._checkpoint.metrics.get("eta")
        if eta is None and len(self._old.key_Q):
            used = spec.anchors if spec.score == "anchored" else None
            eta = fit_eta(scores(self._old.sum_NA, self._old.tokens_NA, used))
        if eta is None:
            return None
        anchor_set = self._checkpoint.anchor_set
        barred = () if anchor_set is None or spec.score != "anchored" else anchor_set.constant
        constant = tuple((spec.agents.index(name), 1.0) for name in barred)
        return Scale(
            score=spec.score, eta=eta, anchors=spec.anchors, constant=constant, is_discounted=bool(constant), label_model=judge
        )

    def _new_table(self) -> OutcomeTable | None:
        """Return an empty table of outcomes for the label model that is measured by; None without one, or without a replay."""
        if self._scale is None or self._scale.label_model is None or not len(self._old.key_Q):
            return None
        first_QX = self._old.input_NX[self._old.start_Q[:-1]]
        return OutcomeTable(self._scale.label_model, context_part(first_QX, self.spec.preset).astype(np.float64))

    def _first_heard(self, episode: Episodes) -> tuple[int, int]:
        """Return how many queries, and how many outcomes of queries, are heard of for the first time."""
        queries = outcomes = 0
        for key, first in zip(episode.key_Q, episode.start_Q, strict=False):
            is_judged = self.spec.score == "posterior" and bool(np.isfinite(episode.outcome_NA[first]).any())
            was_judged = self._known.get(key.query_id)
            queries += was_judged is None
            outcomes += is_judged and not was_judged
            self._known[key.query_id] = is_judged or bool(was_judged)
            self._known.move_to_end(key.query_id)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return queries, outcomes

    def _tabled(self, fresh: Sequence[Episodes], heard: Sequence[tuple[int, int]]) -> list[Episodes]:
        """Enter what is `heard` for the first time in the table of outcomes; return those that the weights may learn from.

        In a context that nobody knows, agreement teaches the wrong competences: without entropies the table leads there alone.
        """
        if self._table is None or self._scale is None:
            return list(fresh)
        kept, before = [], self._table.judged
        for episode, news in zip(fresh, heard, strict=True):
            witnesses = witnesses_of_steps(episode, episode.start_Q[:-1], self.spec)
            take = self._table.hear if any(news) else self._table.is_new
            is_new = [take(witnesses.rows(slice(row, row + 1))) for row in range(len(witnesses.answer_RA))]
            if not any(is_new) or np.isfinite(witnesses.doubt_RA).any():
                kept.append(episode)
        if self._table.judged != before:
            self._scale = dataclasses.replace(self._scale, label_model=self._table.model())
        return kept

    def learn(self, records: Sequence[Feedback | Lesson | Episodes], *, shift: bool = False) -> AdaptUpdate:
        """Take records in, or episodes that were made of them, and update the weights once, by `steps` gradient steps.

        With `shift`, anchors, eta, label model, tau and theta are fitted anew before, on all dense steps that are kept; the same
        goes for a gate without any, as soon as there are enough of them.
        """
        fresh, skipped = self._taken(records)
        with one_thread():
            refitted = bool(fresh) and self._refitted(shift)
            self._scale = self._pardoned(self._scale)
            if not fresh or self._scale is None:
                return self._update(None, fresh, skipped, replayed=0, bad=0, refitted=False)
            self._follow()
            rng = np.random.default_rng([self._options.seed, self.updates])
            results, replayed = [], 0
            for _ in range(self._options.steps):
                episodes, count = self._drawn(rng, fresh)
                results.append(self._learner.update(episodes))
                replayed += count
                self._pull()
        total, weight = sum(one.total for one in results), sum(one.weight for one in results)
        bad = sum(one.is_bad for one in results)
        self.updates += weight > 0
        return self._update(total / weight if weight else None, fresh, skipped, replayed=replayed, bad=bad, refitted=refitted)

    def _update(
        self, loss: float | None, fresh: int, skipped: Mapping[str, int], *, replayed: int, bad: int, refitted: bool
    ) -> AdaptUpdate:
        here = [parameter.detach() for parameter in self._learner.gate.parameters()]
        moved = sum(float(((now - home) ** 2).sum()) for now, home in zip(here, self._home, strict=True)) ** 0.5
        length = sum(float((home**2).sum()) for home in self._home) ** 0.5
        return AdaptUpdate(
            number=self.updates,
            loss=loss,
            used=fresh,
            skipped=skipped,
            replayed=replayed,
            bad_steps=bad,
            drift=self._drift() if loss is not None else 0.0,
            distance=moved / length if length else 0.0,
            refitted=refitted,
        )

    def _taken(self, records: Sequence[Feedback | Lesson | Episodes]) -> tuple[int, dict[str, int]]:
        """Keep what can be learned from among the recent queries; return how many, and why the others are left out."""
        skipped: Counter[str] = Counter()
        fresh: list[Episodes] = []
        for record in records:
            found = self._episodes(record)
            if isinstance(found, str):
                skipped[found] += 1
            else:
                fresh.append(found)
        heard = [self._first_heard(one) for one in fresh]
        taught = self._tabled(fresh, heard)
        skipped[_LED] += len(fresh) - len(taught)
        if taught:
            self._recent = self._retire(Episodes.joined([self._recent, *taught]))
        self.used += sum(queries for queries, _ in heard)
        self.outcomes += sum(outcomes for _, outcomes in heard)
        return len(taught), dict(+skipped)

    def _episodes(self, record: Feedback | Lesson | Episodes) -> Episodes | str:
        """Return a record as episodes, or why nothing can be learned from it."""
        if not isinstance(record, Episodes):
            return episodes_of(lesson_of(record) if isinstance(record, Feedback) else record, self.spec)
        return record if _is_comparable(record) else _ALONE

    def _retire(self, recent: Episodes) -> Episodes:
        """Let the oldest of the recent queries join the replay; a fair sample stays of all that ever did (bottom-k)."""
        spare = len(recent.key_Q) - self._options.recent
        if spare <= 0:
            return recent
        ends = np.arange(len(recent.key_Q))
        retired = recent.take(ends[:spare])
        old = Episodes.joined([self._old, retired])
        rng = np.random.default_rng([self._options.seed, self._joined])
        self._joined += spare
        self._draw_Q = np.concatenate([self._draw_Q, rng.random(spare)])
        if len(old.key_Q) > self._options.replay_queries:
            stays = np.sort(np.argsort(self._draw_Q)[: self._options.replay_queries])
            old, self._draw_Q = old.take(stays), self._draw_Q[stays]
        self._old = old
        return recent.take(ends[spare:])

    def _refitted(self, shift: bool) -> bool:
        """Fit the scale and the operating point anew where that is due; tell whether it was done."""
        is_first = self._scale is None or self._is_own_scale
        if not (shift or (is_first and self.used <= self._options.recent)):
            return False
        kept, spec = Episodes.joined([self._old, self._recent]), self.spec
        everything = np.arange(len(kept.key_Q))
        if len(kept.dense_steps(everything)) < MIN_ROWS:
            return False
        scale = fit_scale(
            kept,
            Split(train_Q=everything, held_Q=everything),
            anchor_sample(kept, everything, spec.embedding_dim),
            score=spec.score,
            num_clusters=_CLUSTERS,
            seed=self._options.seed,
            earlier=spec.anchors,
        )
        if spec.score == "posterior":
            try:
                judge = fit_judge(kept, everything, spec, seed=self._options.seed, earlier=self._deployed.label_model)
            except ConfigError:  # no answer can be read from what is kept
                return False
            scale = dataclasses.replace(scale, label_model=judge)
        self._scale, self._is_own_scale, self._refits, self._point = scale, is_first, self._refits + 1, None
        self._table = self._new_table()
        return True

    def _pardoned(self, scale: Scale | None) -> Scale | None:
        """Return the scale without the discount of agents that say different things to the queries of the stream.

        An agent that no old query was for may say one thing to all of them. Where nobody asks what it is good at it looks like
        one that always says the same, and would stay discounted when its own queries come. Source: ours.
        """
        if scale is None or not scale.is_discounted or scale.anchors is None:
            return scale
        share_A = same_reply_shares(self._recent.reply_NA, self._recent.ran_NA, _HEARD)
        varied = {agent for agent, _ in scale.constant if share_A[agent] <= USUAL_SHARE}
        if not varied:
            return scale
        self._point = None
        return dataclasses.replace(
            scale,
            anchors=tuple(value + CONSTANT_PENALTY * (agent in varied) for agent, value in enumerate(scale.anchors)),
            constant=tuple(one for one in scale.constant if one[0] not in varied),
        )

    def _follow(self) -> None:
        """Hand replay and recent queries, with the targets of this moment, to the learner."""
        assert self._scale is not None
        parts = {name: part for name, part in (("old", self._old), ("recent", self._recent)) if len(part.key_Q)}
        for name, part in parts.items():
            if name not in self._made or self._made[name][0] is not part or self._made[name][1] is not self._scale:
                self._made[name] = (part, self._scale, _data(part, self._scale, self.spec))
        data = _joined([self._made[name][2] for name in parts])
        self._learner.follow(dataclasses.replace(self._start, data=data, eta=self._scale.eta))

    def _drawn(self, rng: np.random.Generator, fresh: int) -> tuple[IntArray, int]:
        """Return a global batch: the newest queries, others of the stream, and the replay on top; and how many are replayed."""
        num_old, num_recent = len(self._old.key_Q), len(self._recent.key_Q)
        newest = np.arange(num_recent)[::-1][:fresh]
        wanted = max(self._options.batch_queries - len(newest), 0)
        rest = rng.permutation(num_recent - len(newest))[:wanted]
        ratio = self._options.replay_ratio
        most = max(1, int(num_old / ratio)) if num_old and ratio else None  # few old queries allow few new ones
        stream = np.concatenate([rng.permutation(newest), rest])[:most]
        count = min(num_old, int(np.ceil(ratio * len(stream))))
        return np.concatenate([num_old + stream, rng.permutation(num_old)[:count]]).astype(np.int64), count

    def _pull(self) -> None:
        with torch.no_grad():
            for parameter, home in zip(self._learner.gate.parameters(), self._home, strict=True):
                parameter.lerp_(home, self._options.pull)

    def _drift(self) -> float:
        """Return how far the routing of the replayed queries is from the deployed gate's."""
        probed = np.arange(len(self._old.key_Q) or len(self._recent.key_Q))[-_PROBED:]
        batch = self._learner.batches.gather(probed)
        with torch.no_grad():
            before, now = (
                torch.log_softmax(unroll(gate, batch) / self.spec.temperature, dim=-1)
                for gate in (self._home_gate, self._learner.gate)
            )
            return float((before.exp() * (before - now)).sum(dim=-1).mean())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights and buffers as they are now, in the precision that is trained."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._learner.gate.state_dict().items()}

    def candidate(self) -> tuple[Gate, Checkpoint]:
        """Return the gate as it is now, in float32, and its record: the version is a hash of its content."""
        weights = self.weights()
        scale, record = self._scale, self._checkpoint
        judge = self._deployed.label_model if scale is None else scale.label_model
        spec, anchor_set = self.spec, record.anchor_set
        if self._refits and scale is not None:
            self._point = spec, anchor_set = self._point or self._fitted_spec(Gate.of(spec, weights), scale)
        elif scale is not None and scale.used_anchors not in (None, spec.anchors) and anchor_set is not None:
            spec = dataclasses.replace(spec, anchors=scale.used_anchors)
            constant = tuple(spec.agents[agent] for agent, _ in scale.constant)
            anchor_set = anchor_set.model_copy(update={"means": scale.used_anchors, "constant": constant})
        metrics = {} if scale is None else {"eta": scale.eta}
        gate = Gate.of(spec, weights, label_model=judge)
        return gate, describe_gate(
            gate,
            fingerprint=record.pool_fingerprint,
            trained_on=self._trained_on() if self.updates or record.trained_on else None,  # untouched weights stay untrained
            parent=record.version,
            anchor_set=anchor_set,
            metrics=metrics,
            code_revision=record.code_revision,
        )

    def _fitted_spec(self, gate: Gate, scale: Scale) -> tuple[GateSpec, AnchorSet | None]:
        """Return the spec with tau, theta and anchors as everything that is kept gives them."""
        kept = Episodes.joined([self._old, self._recent])
        everything = np.arange(len(kept.key_Q))
        if scale.score == "posterior" and scale.label_model is not None:
            scale = judged(scale, scale.label_model, kept, self.spec)
        data = build_data(kept, Split(train_Q=everything, held_Q=everything), scale)
        evidence = FittedTargets(episodes=kept, data=data, scale=scale)
        spec, _ = fit_spec(gate, evidence, _training(self._options))
        return spec, evidence.anchor_set(spec.agents, _CLUSTERS) if spec.anchors is not None else None

    def _trained_on(self) -> dict[str, Any]:
        """Return the account of the training: the parent's, and what was adapted to since."""
        parent = self._checkpoint
        earlier = supervision_of(parent.version)
        before = int(earlier[len("outcomes(") : -1]) if earlier != "none" else 0
        told = before + self.outcomes
        adapted = {
            "parent": parent.version,
            "updates": self.updates,
            "queries": self.used,
            "outcomes": self.outcomes,
            "replay": len(self._old.key_Q),
            "refits": self._refits,
            "options": self._options.model_dump(mode="json", include=set(AdaptSettings.model_fields)),
        }
        return {
            **(parent.trained_on or {}),
            "source": "adaptation",
            "adapted": adapted,
            "supervision": f"outcomes({told})" if told else "none",
        }


_ALONE = "fewer than two replies to compare"


def episodes_of(lesson: Lesson, spec: GateSpec) -> Episodes | str:
    """Return an answered query as an episode of a gate, or why nothing can be learned from it."""
    steps = lesson.answer.steps
    decisions = [step.decision for step in steps if step.decision is not None and step.route is not None]
    if not steps or len(decisions) < len(steps):
        return "no gate decided it"
    if not {name for decision in decisions for name in decision.agents} <= set(spec.agents):
        return "agents that the gate does not know"
    query = RolloutQuery(query_id=lesson.query_id, source="adaptation", split="train", text=lesson.asked, stages=lesson.stages)
    try:
        found = episodes_of_table(table_of(query, lesson.answer, preset=spec.preset, seed=0, fingerprint=""), query, spec)
    except ConfigError:
        return "numbers that are not finite, or do not fit the gate"
    return with_credit(found, lesson.outcomes) if _is_comparable(found) else _ALONE


def episodes_of_table(table: pa.Table, query: RolloutQuery, spec: GateSpec) -> Episodes:
    """Return the rows of one query as an episode of a gate. Raises ConfigError for numbers that cannot be learned from."""
    asked = [asked_of([query])] if spec.score == "posterior" else None
    builder = EpisodeBuilder(spec.agents, spec.input_dim, has_feedback=spec.preset != "paper", asked=asked)
    builder.add(table, 0)
    return builder.build()


def with_credit(episode: Episodes, outcomes: Mapping[str, float]) -> Episodes:
    """Return an episode with what is known of the replies to its first step, by agent."""
    outcome_NA = np.full(episode.ran_NA.shape, np.nan)
    outcome_NA[0] = [outcomes.get(name, np.nan) for name in episode.agents]
    return dataclasses.replace(episode, outcome_NA=outcome_NA)


def _is_comparable(episode: Episodes) -> bool:
    """Tell whether some step has two replies that a target can be made of: an entropy each, or an answer that can be judged."""
    replied_NA = episode.ran_NA | (episode.answer_NA != NOT_ASKED)
    return bool((replied_NA.sum(axis=1) >= 2).any())


def _data(episodes: Episodes, scale: Scale, spec: GateSpec) -> TrainingData:
    """Return inputs and targets of episodes that are all learned from."""
    everything = np.arange(len(episodes.key_Q))
    if scale.score == "posterior" and scale.label_model is not None:
        scale = judged(scale, scale.label_model, episodes, spec)
    return build_data(episodes, Split(train_Q=everything, held_Q=everything[:0]), scale)


def _joined(parts: Sequence[TrainingData]) -> TrainingData:
    """Return the data of all parts, one after the other, all of it to be learned from."""
    names = ("input_NX", "score_NA", "ran_NA", "weight_NA", "noise_NA")
    starts = np.cumsum([0, *(len(part.input_NX) for part in parts)])
    begun = [part.start_Q[:-1] + at for part, at in zip(parts, starts, strict=False)]
    everything = np.arange(sum(map(len, begun)))
    return TrainingData(
        start_Q=np.concatenate([*begun, starts[-1:]]),
        train_Q=everything,
        held_Q=everything[:0],
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )


def _training(options: AdaptSettings) -> TrainOptions:
    """Return the settings as options of a training, which names places that nothing reads or writes."""
    return TrainOptions(
        rollouts=(Path(),),
        out=Path(),
        lr=options.lr,
        weight_decay=0.0,
        clip=options.clip,
        loss=options.loss,
        dtype=options.dtype,
        seed=options.seed,
    )
