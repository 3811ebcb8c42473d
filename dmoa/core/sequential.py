"""Whom to ask next about one query, and whether to: the worth of one more reply, given those that came.

Reads a label model (`core/label_model`). The worth of a reply is how much it is expected to raise the probability that the final
answer is right, looking up to two replies ahead: one that can only break a tie of two is worth something too. Source: ours, after
the expected value of sample information.

Shape letters: A agents, B candidates to ask, F those looked at two replies ahead, J answers known, Z candidates for the truth,
K nodes of difficulty, S states of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dmoa.core.label_model import LabelModel
from dmoa.core.posterior import MAX_SHARED, ONE_WITNESS, right_of
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
    before_RAK = 1 / (1 + np.exp(-model.logits(witnesses)))
    truth, before_AK = model.truth(witnesses, before_RAK), before_RAK[0]
    answer_A = witnesses.answer_RA[0]
    is_open_A = (answer_A == NOT_ASKED) & ~(model.copy_AA[:, answer_A >= 0] >= ONE_WITNESS).any(axis=1)
    if available_A is not None:
        is_open_A = is_open_A & available_A
    weight_ZK = truth.weight_RZK[0]
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
    asked = [agent for agent in model.order.tolist() if answer_A[agent] >= 0]
    shared_BJ = np.zeros((len(open_B), answers))
    for agent in asked:
        column_B = shared_BJ[:, answer_A[agent]]
        np.maximum(column_B, model.copy_AA[open_B, agent], out=column_B)
    lead = float(state_ZK[:-1].sum(axis=1).max()) if answers else 0.0
    first_BJZK = extended(state_ZK[None], right_BK[None], shared_BJ[None])[0]
    best_BJ = first_BJZK[:, :, :-1].sum(axis=3).max(axis=2)
    worth_B: Array = best_BJ.sum(axis=1) - lead - price
    ahead_F = np.argsort(-right_B, kind="stable")[:_AHEAD]
    if len(ahead_F) > 1:
        later_FJ = _best_after(
            first_BJZK[ahead_F], shared_BJ[ahead_F], right_BK[ahead_F], model.copy_AA[np.ix_(*[open_B[ahead_F]] * 2)], price
        )
        worth_F = np.maximum(best_BJ[ahead_F], later_FJ).sum(axis=1) - lead - price
        worth_B[ahead_F] = np.maximum(worth_B[ahead_F], worth_F)
    return worth_B


def _best_after(state_FJZK: Array, shared_FJ: Array, right_FK: Array, copy_FF: Array, price: float) -> Array:
    """Return, for every first candidate and answer, the weight of a right answer if the best other one is asked next [F, J + 1].

    Net of the second price, which is paid where the first answer comes out so. `shared_FJ`: what each candidate shares with the
    answers there before; the new answer, if there is one, is that of the first candidate alone.
    """
    num_first, num_answers = len(shared_FJ), shared_FJ.shape[1] + 1
    shared_FJFL = np.zeros((num_first, num_answers, num_first, num_answers))
    shared_FJFL[..., :-1] = shared_FJ
    said = np.arange(num_answers)
    shared_FJFL[:, said, :, said] = np.maximum(shared_FJFL[:, said, :, said], copy_FF)
    states = num_first * num_answers
    after = extended(
        state_FJZK.reshape(states, *state_FJZK.shape[2:]),
        np.broadcast_to(right_FK, (states, *right_FK.shape)),
        shared_FJFL.reshape(states, num_first, num_answers),
    )
    best_FJF = after[..., :-1, :].sum(axis=-1).max(axis=-1).sum(axis=-1).reshape(num_first, num_answers, num_first)
    best_FJF[np.arange(num_first), :, np.arange(num_first)] = -np.inf
    best_FJ: Array = best_FJF.max(axis=-1) - price * state_FJZK.sum(axis=(2, 3))
    return best_FJ


def extended(state_SZK: Array, right_SBK: Array, shared_SBJ: Array) -> Array:
    """Return the joint weights after each possible answer of each candidate in each state [S, B, J + 1, J + 2, K].

    `state_SZK` are the weights before, Z = J + 1: the J answers that are known, and none of them; after it a new answer comes
    behind the known ones. `shared_SBJ`: how probable a wrong candidate repeats each known answer if that is wrong too.
    Summed over all but S and B it is what the state sums to.
    """
    num_states, num_agents, num_answers = shared_SBJ.shape
    # Given truth z, the wrong answers that may be repeated are all others.
    total_SBZ = np.empty((num_states, num_agents, num_answers + 1))
    total_SBZ[..., -1] = shared_SBJ.sum(axis=2)
    total_SBZ[..., :-1] = total_SBZ[..., -1:] - shared_SBJ
    scale_SBZ = MAX_SHARED / np.maximum(total_SBZ, MAX_SHARED)
    chance_SBJZ = np.empty((num_states, num_agents, num_answers + 1, num_answers + 2))
    chance_SBJZ[:, :, :-1, :-1] = shared_SBJ[..., None] * scale_SBZ[:, :, None]
    chance_SBJZ[:, :, -1, :-1] = 1 - total_SBZ * scale_SBZ
    chance_SBJZ[..., -1] = chance_SBJZ[..., -2]
    wrong_SBJZK = chance_SBJZ[..., None] * (1 - right_SBK)[:, :, None, None]
    spot = np.arange(num_answers + 1)
    wrong_SBJZK[:, :, spot, spot] = right_SBK[:, :, None]
    wrong_SBJZK *= np.concatenate([state_SZK, state_SZK[:, -1:]], axis=1)[:, None, None]
    wrong_SBJZK[:, :, :-1, -2] = 0.0  # an answer that nobody gave is no candidate of its own
    return wrong_SBJZK
