"""Score `posterior`: a label model fitted on the rollouts of a training, and what tau and theta are under it.

Between the episodes (`training/dataset`) and the objective. No label gets in: what a reply says, how unsure it is and who agrees
with it are all that is read. Shape letters: N steps of all episodes, R rows looked at, A agents in the pool, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dmoa.core.activation import probabilities
from dmoa.core.calibration import OperatingPoint, fit_level, fit_theta, num_active, tau_levels
from dmoa.core.gate import GateSpec
from dmoa.core.in_step import context_part
from dmoa.core.label_model import MIN_ROWS, LabelModel, fit_label_model
from dmoa.core.scores import Array, BoolArray, IntArray, posterior_scores, scores
from dmoa.core.sequential import standing
from dmoa.core.witnesses import NOT_ASKED, Witnesses, usual_doubts
from dmoa.errors import ConfigError
from dmoa.training.dataset import Episodes
from dmoa.training.objective import Scale
from dmoa.training.outcomes import Outcome, credit_replies, no_outcome_fits
from dmoa.training.rollouts import Manifest, read_table
from dmoa.types import FloatArray

THETA_ALPHA = 0.1
"""Share of the held-back queries that may go on to another step, where nothing else is asked for."""
_MOST_NAMED = 2
_CREDITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Log odds of being right that the gate is credited with for each nat by which it prefers an agent."""
_SHARES = (1.0, 0.5, 0.0)
"""How much of the competence counts that the gate may have learnt as well."""


def witnesses_of_steps(episodes: Episodes, steps_R: IntArray, spec: GateSpec) -> Witnesses:
    """Return the replies of some steps as witnesses. The episodes must have been read with their answers."""
    answer_RA = episodes.answer_NA[steps_R]
    is_said_RA = answer_RA != NOT_ASKED
    return Witnesses(
        answer_RA=answer_RA,
        doubt_RA=np.where(is_said_RA, scores(episodes.sum_NA[steps_R], episodes.tokens_NA[steps_R]), np.nan),
        length_RA=np.where(is_said_RA, episodes.length_NA[steps_R], np.nan),
        outcome_RA=np.where(is_said_RA, episodes.outcome_NA[steps_R], np.nan),
        embedding_RD=context_part(episodes.input_NX[steps_R], spec.preset).astype(np.float64),
    )


def with_outcomes(
    episodes: Episodes, outcomes: Sequence[Outcome], folders: Sequence[Path], manifests: Sequence[Manifest]
) -> tuple[Episodes, int]:
    """Return the episodes with what outcomes say of the replies to first steps, and how many outcomes that were.

    One that could be of several folders is of the newest, of equally new ones of the last: the same query was asked anew there,
    and may have been answered otherwise.

    Raises ConfigError where none of them is about these rollouts.
    """
    outcome_NA = np.full(episodes.ran_NA.shape, np.nan)
    left = list(outcomes)
    age = [(manifest.ended_unix_s or manifest.started_unix_s, place) for place, manifest in enumerate(manifests)]
    for _, place in sorted(age, reverse=True):
        manifest = manifests[place]
        found = credit_replies(left, read_table(folders[place]), seed=manifest.seed, round_=manifest.round)
        left = [one for at, one in enumerate(left) if at not in found.places]
        mine_Q = np.array([key.folder == place for key in episodes.key_Q], dtype=np.bool_)
        queries = [key.query_id for key in episodes.key_Q if key.folder == place]
        outcome_NA[episodes.start_Q[:-1][mine_Q]] = found.array(queries, episodes.agents)
    if len(left) == len(outcomes):
        raise no_outcome_fits(len(outcomes))
    return replace(episodes, outcome_NA=outcome_NA), len(outcomes) - len(left)


def are_readable(episodes: Episodes, steps: IntArray) -> bool:
    """Tell whether answers can be read in enough of some steps to learn from, or there are too few steps to tell."""
    return len(steps) < MIN_ROWS or _num_answered(episodes, steps) >= min(MIN_ROWS, len(steps) / 2)


def _num_answered(episodes: Episodes, steps: IntArray) -> int:
    return int((episodes.answer_NA[steps] >= 0).any(axis=1).sum())


def fit_judge(
    episodes: Episodes, among_Q: IntArray, spec: GateSpec, *, seed: int, earlier: LabelModel | None = None
) -> LabelModel:
    """Return the label model of the dense first steps of some episodes; `earlier` where there are too few of them.

    First steps, because in later ones the agents read a summary and agree with it. Raises ConfigError for too few steps and no
    earlier model, and where hardly any reply has an answer.
    """
    dense, steps = episodes.dense_steps(among_Q), episodes.steps_of(among_Q)
    first = dense[np.isin(dense, episodes.start_Q)]
    rows = first if len(first) >= MIN_ROWS else dense
    if len(rows) >= MIN_ROWS and are_readable(episodes, rows):
        return fit_label_model(witnesses_of_steps(episodes, rows, spec), seed=seed)
    if earlier is not None and are_readable(episodes, steps):
        return earlier
    if earlier is None and len(rows) < MIN_ROWS:
        raise ConfigError(
            f"score is 'posterior'; it needs {MIN_ROWS} dense steps to learn from, and these rollouts have {len(rows)}; add a "
            "folder collected with --dense, start from a checkpoint of that score, or use score 'anchored'"
        )
    seen = rows if earlier is None else steps
    raise ConfigError(
        f"score is 'posterior'; no answer can be read from these replies: in {_num_answered(episodes, seen)} of {len(seen)} "
        "steps an agent gives one; use --score anchored, which goes by entropies, or ask for a last line such as `Answer: 12`"
    )


def judged(scale: Scale, model: LabelModel, episodes: Episodes, spec: GateSpec) -> Scale:
    """Return the scale with the label model, what replies are worth by it, and what the gate learns of them."""
    witnesses = witnesses_of_steps(episodes, np.arange(len(episodes.input_NX)), spec)
    right_NA: Array = np.where(witnesses.asked, model.right_probability(witnesses), np.nan)
    return replace(scale, label_model=model, right_NA=right_NA, target_NA=learnt(model, witnesses, right_NA))


def learnt(model: LabelModel, witnesses: Witnesses, right_RA: Array) -> Array:
    """Return the probability that a gate learns of each reply [R, A]. `right_RA`: of being right, given all replies of its step.

    It is the mean of two estimates: that one, and how probably an agent is right that is as unsure as it is on queries like this
    (`usual_doubts`, `LabelModel.foretold`). The first is a draw, all but right or wrong: of an agent that errs on a third of some
    kind of query, the few rows of that kind may show no error; and where an expert happens to be less sure than another agent
    always is on that kind, it takes the other's side. The second knows the kind, which is all that a gate can see. Where outcomes
    are known, or no answer could be read, the first speaks alone. Source: ours, after Rao and Blackwell.
    """
    is_sole_RA = (witnesses.answer_RA < 0) | np.isfinite(witnesses.outcome_RA).any(axis=1, keepdims=True)
    foretold_RA = model.foretold(replace(witnesses, doubt_RA=usual_doubts(witnesses)))
    return np.where(is_sole_RA, right_RA, (right_RA + foretold_RA) / 2)


def competence_bias(model: LabelModel, logits_RA: Array, right_RA: Array, temperature: float) -> Array:
    """Return what to add to the gate's logits so that it departs from the most competent agent where that pays alone [A].

    A gate that has learnt from some 60 queries prefers agents by chance where none is better for some queries than for others.
    Held-back rows tell what its preferences are worth: P(a is right, of a and b the one) = sigmoid(share (competence_a -
    competence_b) + credit (logit_a - logit_b) / temperature), in which the difficulty of the query cancels (Rasch). Taken are
    the share and the credit of the highest likelihood. Source: ours.
    """
    rows_C = np.maximum([trust.rows for trust in model.trust], 1) if model.trust else np.ones(len(model.ability_CA))
    competence_A: Array = np.average(model.competence(), axis=0, weights=rows_C)
    known_RA = np.isfinite(right_RA)
    right_RA = np.where(known_RA, right_RA, 0.0)
    won_RAA = right_RA[:, :, None] * np.where(known_RA, 1.0 - right_RA, 0.0)[:, None, :]
    logits_RA = logits_RA / temperature
    tried = [(share, credit) for share in _SHARES for credit in _CREDITS]
    valued = (share * competence_A + credit * logits_RA for share, credit in tried)
    losses = [float((won_RAA * np.logaddexp(0.0, -(v_RA[:, :, None] - v_RA[:, None, :]))).sum()) for v_RA in valued]
    share, credit = tried[int(np.argmin(losses))]
    bias_A: Array = (competence_A - competence_A.mean()) * temperature * share / credit
    return bias_A


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What steps come to that ask by the label model."""

    count_R: IntArray
    """Agents asked."""
    asked_RA: BoolArray
    """Which."""
    right_R: Array
    """Probability that the answer they end with is right, given everybody's replies."""
    score_R: Array
    """Score of that answer as the step itself sees it; NaN where it has none."""


def ask_in_turn(
    model: LabelModel, witnesses: Witnesses, right_RA: Array, ranking_RA: IntArray, k_R: IntArray, *, limit: int, price: float
) -> Asked:
    """Return what steps come to that ask their first k agents and go on while a reply is worth its price."""
    counts, rights, found_scores, asked = [], [], [], []
    for row, (ranking_A, k) in enumerate(zip(ranking_RA, k_R, strict=True)):
        whole = witnesses.rows(slice(row, row + 1))
        asked_1A = np.zeros(whole.answer_RA.shape, dtype=np.bool_)
        asked_1A[0, ranking_A[:k]] = True
        is_there_A = whole.asked[0]
        while True:
            found = standing(model, whole.only(asked_1A), price=price, available_A=is_there_A & ~asked_1A[0])
            if found.next_agent is None or asked_1A.sum() >= limit:
                break
            asked_1A[0, found.next_agent] = True
        is_answer = found.leader is not None and whole.answer_RA[0, found.leader] >= 0
        counts.append(int(asked_1A.sum()))
        asked.append(asked_1A[0])
        rights.append(float(right_RA[row, found.leader]) if is_answer else 0.0)
        found_scores.append(float(posterior_scores(found.probability)) if is_answer else np.nan)
    return Asked(count_R=np.array(counts), asked_RA=np.array(asked), right_R=np.array(rights), score_R=np.array(found_scores))


def fit_judged_point(
    spec: GateSpec,
    model: LabelModel,
    witnesses: Witnesses,
    logits_RA: FloatArray,
    right_RA: Array,
    *,
    alphas: Sequence[float],
    theta_alpha: float | None,
) -> tuple[OperatingPoint, dict[str, float]]:
    """Return the tau and theta that serve held-back dense steps best, and what the steps come to by the label model.

    Of tau's levels the one with the most right answers, net of the price of the agents; theta lies above the score of the answer
    that a step ends with on a share of 1 - theta_alpha of the rows. Rows without any answer are left out. Source: ours.
    """
    has_answer_R: BoolArray = np.asarray((witnesses.answer_RA >= 0).any(axis=1))
    witnesses, logits_RA, right_RA = witnesses.rows(has_answer_R), logits_RA[has_answer_R], right_RA[has_answer_R]
    p_RA = probabilities(logits_RA, np.ones(logits_RA.shape, dtype=np.bool_), spec.temperature)
    ranking_RA = np.argsort(-p_RA, axis=1, kind="stable")
    limit = min(spec.max_agents, logits_RA.shape[1])
    best_R = np.nanmax(right_RA, axis=1)
    found: list[tuple[OperatingPoint, Asked]] = []
    for alpha in tau_levels(alphas):
        left = fit_level(p_RA, posterior_scores(right_RA), alpha)
        k_R = num_active(spec, logits_RA, left)
        asked = ask_in_turn(
            model, witnesses, right_RA, ranking_RA, k_R, limit=limit if spec.cascade else int(k_R.max()), price=spec.agent_price
        )
        level = None if spec.preset == "paper" else theta_alpha or THETA_ALPHA
        point = OperatingPoint(
            alpha=alpha,
            theta_alpha=level,
            mass_left=left,
            theta=None if level is None or not np.isfinite(asked.score_R).any() else fit_theta(asked.score_R[:, None], level),
            agents=float(asked.count_R.mean()),
            regret=float((best_R - asked.right_R).mean()),
        )
        found.append((point, asked))
    point, asked = min(found, key=lambda one: round(one[0].regret + spec.agent_price * one[0].agents, 9))
    first_R = np.nan_to_num(right_RA[np.arange(len(right_RA)), ranking_RA[:, 0]])
    return point, {"right": float(asked.right_R.mean()), "right_first": float(first_R.mean()), "right_best": float(best_R.mean())}


def tell_trust(model: LabelModel, agents: Sequence[str]) -> list[str]:
    """Return a line for every signal that the label model goes by: for how many queries, why, and who is right most often."""
    lines = []
    for signal in dict.fromkeys(trust.signal for trust in model.trust):
        contexts = [context for context, trust in enumerate(model.trust) if trust.signal == signal]
        rows_C = np.array([model.trust[context].rows for context in contexts])
        largest = model.trust[contexts[int(rows_C.argmax())]]
        right_A = np.average(1 / (1 + np.exp(-model.ability_CA[contexts])), axis=0, weights=np.maximum(rows_C, 1))
        named = ", ".join(f"{agents[a]} {right_A[a]:.0%}" for a in np.argsort(-right_A, kind="stable")[:_MOST_NAMED])
        of = "" if len(contexts) == 1 else f" of {len(contexts)} kinds"
        lines.append(
            f"label model: {rows_C.sum()} queries{of} go by {signal}, {largest.reason}; by its account right most often: {named}"
        )
    return lines
