"""Whom to ask next about one query, and whether to: the worth of one more reply, given those that came.

Reads a label model (`core/label_model`). The worth of a reply is how much it is expected to raise the probability that the final
answer is right, looking up to two replies ahead: one that can only break a tie of two is worth something too. Source: ours, after
the expected value of sample information.

Shape letters: A agents, B candidates to ask, J answers that one may give, Z candidates for the truth, K nodes of difficulty;
C and L as B and J, of the reply after.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmoa.core.label_model import LabelModel
from dmoa.core.posterior import MAX_SHARED, MIN_CHANCE, right_of, shared_errors
from dmoa.core.witnesses import NO_ANSWER, NOT_ASKED, Array, IntArray, Witnesses

AGENT_PRICE = 0.02
"""Probability of a right answer that one more call must be expected to bring."""
_AHEAD = 5
"""Candidates that are looked at two replies ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a query stands after the replies so far."""

    leader: int | None
    """Agent whose reply is the leading answer: of those that gave it the most trusted; None without any answer."""
    probability: float
    """That the leading answer is right; 0 without one."""
    right_A: Array
    """Probability of each agent being right: of those asked given all replies, of the others before theirs."""
    worth_A: Array
    """What asking is worth, in probability of a right final answer and net of price; -inf for agents not available."""

    @property
    def next_agent(self) -> int | None:
        """The agent to ask next; None: stop."""
        best = int(np.argmax(self.worth_A)) if len(self.worth_A) else -1
        return best if best >= 0 and self.worth_A[best] > 0 else None


def standing(
    model: LabelModel,
    witnesses: Witnesses,
    *,
    price: float = AGENT_PRICE,
    available_A: npt.NDArray[np.bool_] | None = None,
) -> Standing:
    """Return where the one query of `witnesses` [1, A] stands and what each further reply is worth."""
    truth = model.truth(witnesses)
    answer_A = witnesses.answer_RA[0]
    is_open_A = answer_A == NOT_ASKED
    if available_A is not None:
        is_open_A = is_open_A & available_A
    weight_ZK = truth.weight_RZK[0]
    before_AK = 1 / (1 + np.exp(-model.logits(witnesses)[0]))
    given_A = right_of(truth.weight_RZK, witnesses.answer_RA)[0].sum(axis=1)
    right_A = np.where(answer_A == NOT_ASKED, before_AK @ weight_ZK.sum(axis=0), given_A)
    leader = _leader(weight_ZK.sum(axis=1), answer_A, before_AK.mean(axis=1))
    worth_A = np.full(len(answer_A), -np.inf)
    open_B = np.flatnonzero(is_open_A)
    if len(open_B):
        worth_A[open_B] = _worth(model, weight_ZK, answer_A, open_B, before_AK[open_B], right_A[open_B], price)
    probability = 0.0 if leader is None else float(given_A[leader])
    return Standing(leader=leader, probability=probability, right_A=right_A, worth_A=worth_A)


def _leader(mass_Z: Array, answer_A: IntArray, before_A: Array) -> int | None:
    given = np.flatnonzero(answer_A >= 0)
    if not len(given):
        replied = np.flatnonzero(answer_A == NO_ANSWER)
        return int(replied[np.argmax(before_A[replied])]) if len(replied) else None
    said = answer_A[given]
    backers = given[said == said[np.argmax(mass_Z[said])]]
    return int(backers[np.argmax(before_A[backers])])


def _worth(
    model: LabelModel, weight_ZK: Array, answer_A: IntArray, open_B: IntArray, right_BK: Array, right_B: Array, price: float
) -> Array:
    """Return the worth of each candidate [B], net of price, the better of one and of two replies ahead."""
    answers = int(max(answer_A.max(), -1)) + 1
    state_ZK = np.concatenate([weight_ZK[:answers], weight_ZK[-1:]])  # the answers given, none of them
    asked = np.flatnonzero(answer_A >= 0)
    asked = asked[np.argsort(model.ability_CA.mean(axis=0)[asked])[::-1]]
    shared_BJ = np.stack([shared_errors(answer_A[None], model.copy_AA[b], asked)[0, :answers] for b in open_B])
    lead = float(state_ZK[:-1].sum(axis=1).max()) if answers else 0.0
    first_BJZK = extended(state_ZK, right_BK, shared_BJ)
    best_BJ = first_BJZK[:, :, :-1].sum(axis=3).max(axis=2)
    worth_B: Array = best_BJ.sum(axis=1) - lead - price
    ahead = np.argsort(-right_B, kind="stable")[:_AHEAD]
    if len(open_B) > 1:
        for place in ahead:
            others = ahead[ahead != place]
            if not len(others):
                continue
            copy_C = model.copy_AA[open_B[place], open_B[others]]
            later = _best_after(first_BJZK[place], best_BJ[place], shared_BJ[others], copy_C, right_BK[others], price)
            worth_B[place] = max(worth_B[place], later - lead - price)
    return worth_B


def _best_after(state_JZK: Array, best_J: Array, shared_CZ: Array, copy_C: Array, right_CK: Array, price: float) -> float:
    """Return the expected probability of a right answer, net of the second price, if the first reply may be followed by another.

    `shared_CZ`: what the candidates share with the answers there before the first reply; its own answer is class J - 1 if new.
    """
    num_answers = len(state_JZK) - 1
    total = 0.0
    for said in range(num_answers + 1):
        shared = np.concatenate([shared_CZ, np.zeros((len(shared_CZ), 1))], axis=1)
        shared[:, said] = np.maximum(shared[:, said], copy_C)
        state_ZK = state_JZK[said]
        after_CLZK = extended(state_ZK, right_CK, shared)
        after_C = after_CLZK[:, :, :-1].sum(axis=3).max(axis=2).sum(axis=1) - price * state_ZK.sum()
        total += max(float(best_J[said]), float(after_C.max()))
    return total


def extended(state_ZK: Array, right_BK: Array, shared_BJ: Array) -> Array:
    """Return the joint weights after each candidate's each possible answer [B, J + 1, Z + 1, K], given those before [Z, K].

    The J answers known so far come first and a new one after them, "none of them" is the last candidate for the truth: Z = J + 1
    before. Summed over all but B it is 1 again where the state sums to 1.
    """
    num_answers = shared_BJ.shape[1]
    # Given truth z, the wrong answers that may be repeated are all others.
    total_BZ = shared_BJ.sum(axis=1, keepdims=True) - np.concatenate([shared_BJ, np.zeros((len(shared_BJ), 1))], axis=1)
    scale_BZ = MAX_SHARED / np.maximum(total_BZ, MAX_SHARED)
    chance_BJZ = np.empty((len(shared_BJ), num_answers + 1, num_answers + 2))
    chance_BJZ[:, :num_answers, :-2] = shared_BJ[:, :, None] * scale_BZ[:, None, :-1]
    chance_BJZ[:, :num_answers, -2:] = (shared_BJ * scale_BZ[:, -1:])[:, :, None]
    chance_BJZ[:, -1, :-2] = 1 - (total_BZ * scale_BZ)[:, :-1]
    chance_BJZ[:, -1, -2:] = (1 - (total_BZ * scale_BZ)[:, -1])[:, None]
    before_ZK = np.concatenate([state_ZK, state_ZK[-1:]])
    wrong_BJZK = np.maximum(chance_BJZ, MIN_CHANCE)[..., None] * (1 - right_BK)[:, None, None, :]
    spot = np.arange(num_answers + 1)
    wrong_BJZK[:, spot, spot] = right_BK[:, None, :]
    out_BJZK: Array = before_ZK * wrong_BJZK
    out_BJZK[:, :num_answers, -2] = 0.0  # an answer nobody gave is no candidate of its own
    return out_BJZK
