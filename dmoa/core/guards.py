"""Verdicts on an offered gate, from arrays alone: each guard says whether it passed, what it saw, its bound, and why in words.

`serving/router` brings the arrays: routing of the current gate and the offered one on the same inputs, values of replayed
queries, what canary queries came to. Sequential tests are tests by betting: evidence is the wealth of one who bets that the
mean of bounded differences lies above a margin, and 1 / error_rate of it is a finding whenever it is looked at (Ville's
inequality; Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by betting"). That such a test may
stop as soon as it knows is what TensorZero's adaptive experiments do with a generalised likelihood ratio (track and stop,
Garivier and Kaufmann 2016); betting needs no model of the differences. The choice of signals and bounds is ours.

Shape letters: R rows (inputs, queries), A agents.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmoa.core.scores import Array, BoolArray, IntArray
from dmoa.errors import CheckpointError

BETS = (0.05, 0.15, 0.35, 0.65, 0.95)
"""Shares of the largest stake; the evidence is the mean wealth of one player for each (method of mixtures)."""
HIGHER = (0.15, 0.4, 0.8)
"""How far the rates of a rate test's alternatives lie between its own and 1."""
BASELINE = 50
"""Newest queries of the control whose rate of failures is the usual one."""
RECENT = 5
"""Newest of them whose rate counts where it is higher: what fails with either arm has begun only just."""
PRIOR = 4.0
"""Queries of one context for which the rate of all counts."""
MIN_PROBABILITY = 1e-6
"""Routing probabilities below it count as it: an agent that is never chosen costs at most 14 nats."""
RISE = 3.0
"""Standard errors by which an agent's sureness must rise, and its agreement fall, to be distrusted, ..."""
MIN_REPLIES = 8
"""... of at least so many replies before and after, in contexts that both have."""
GAIN = 0.05
"""Share of the load by which a gate may favour distrusted agents more than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one guard found."""

    guard: str
    passed: bool
    value: float
    bound: float
    words: str
    """One sentence."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; numbers that JSON has no name for as null."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in asdict(self).items()
        }


class Wealth:
    """The wealth of several bettors against one hypothesis, looked at after every bet; the evidence is the mean of it.

    While the hypothesis holds (given the past), the probability that evidence ever reaches 1 / error_rate is at most
    error_rate. With `restarts` wealth below 1 is made good at every step, so that a change after a long quiet time is found as
    fast as one at the start; then false findings come 1 / error_rate bets apart or more on average (e-detector: Shin, Ramdas and
    Rinaldo 2023).
    """

    def __init__(self, num_bets: int, error_rate: float, *, restarts: bool = False) -> None:
        self.threshold = 1.0 / error_rate
        self._restarts = restarts
        self.log_wealth = [0.0] * num_bets
        """By bettor, for another test to go on with."""

    def _grow(self, log_gains: Iterable[float]) -> None:
        before = [max(value, 0.0) for value in self.log_wealth] if self._restarts else self.log_wealth
        self.log_wealth = [value + gain for value, gain in zip(before, log_gains, strict=True)]

    @property
    def evidence(self) -> float:
        """The mean wealth: 1 at first."""
        return math.fsum(math.exp(min(value, 700.0)) for value in self.log_wealth) / len(self.log_wealth)

    @property
    def is_found(self) -> bool:
        """Whether the hypothesis is given up, by what came so far."""
        return self.evidence >= self.threshold


class SequentialTest(Wealth):
    """Tests whether the mean of differences in [-1, 1] is at most a margin."""

    def __init__(self, margin: float, error_rate: float, **options: Any) -> None:
        """`options` as of `Wealth`."""
        super().__init__(len(BETS), error_rate, **options)
        self.margin = margin
        self._stakes = [bet / (1.0 + margin) for bet in BETS]

    def update(self, difference: float) -> None:
        """Take one difference; what lies outside [-1, 1] counts as its end. NaN says nothing."""
        if not math.isnan(difference):
            gain = min(max(difference, -1.0), 1.0) - self.margin
            self._grow(math.log1p(stake * gain) for stake in self._stakes)


class RateTest(Wealth):
    """Tests whether events, each 0 or 1, happen at a given rate at most: a likelihood ratio for each of some higher rates.

    Three failures where one in twenty is allowed are evidence enough: differences of pairs would take ten.
    """

    def __init__(self, error_rate: float, **options: Any) -> None:
        """`options` as of `Wealth`."""
        super().__init__(len(HIGHER), error_rate, **options)

    def update(self, event: float, rate: float) -> None:
        """Take one event; `rate`, between 0 and 1, must not depend on it."""
        rates = [rate + part * (1.0 - rate) for part in HIGHER]
        self._grow(event * math.log(other / rate) + (1.0 - event) * math.log((1.0 - other) / (1.0 - rate)) for other in rates)


def finite(arrays: Mapping[str, npt.NDArray[Any]]) -> Verdict:
    """Judge whether all weights are numbers."""
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    words = f"{bad[0]} holds NaN or infinity" if bad else "all weights are finite"
    return Verdict(guard="finite", passed=not bad, value=float(len(bad)), bound=0.0, words=words)


def kl(new_RA: npt.ArrayLike, old_RA: npt.ArrayLike) -> Array:
    """Return the Kullback-Leibler divergence KL(new || old) of every row [R], in nats."""
    new, old = (np.maximum(np.asarray(rows, dtype=np.float64), MIN_PROBABILITY) for rows in (new_RA, old_RA))
    new, old = new / new.sum(axis=1, keepdims=True), old / old.sum(axis=1, keepdims=True)
    found_R: Array = (new * np.log(new / old)).sum(axis=1)
    return found_R


def drift(new_RA: npt.ArrayLike, old_RA: npt.ArrayLike, max_nats: float) -> Verdict:
    """Judge how far the routing probabilities on the same inputs moved: mean KL(new || old)."""
    divergence_R = kl(new_RA, old_RA) if len(np.asarray(new_RA)) else np.zeros(1)
    value = float(divergence_R.mean())
    words = f"routing moved by {value:.3g} nats on average, {max_nats:g} are allowed"
    return Verdict(guard="drift", passed=value <= max_nats, value=value, bound=max_nats, words=words)


def distance(new: Mapping[str, npt.NDArray[Any]], anchor: Mapping[str, npt.NDArray[Any]], max_share: float) -> Verdict:
    """Judge how far the weights lie from the anchor's: L2 distance over the anchor's norm. Both have the same names."""
    gap = math.sqrt(sum(float(((new[name].astype(np.float64) - anchor[name]) ** 2).sum()) for name in anchor))
    norm = math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in anchor.values()))
    value = gap / norm if norm > 0 else math.inf if gap > 0 else 0.0
    words = f"weights lie {value:.3g} of the anchor's norm from it, {max_share:g} is allowed"
    return Verdict(guard="distance", passed=value <= max_share, value=value, bound=max_share, words=words)


def not_worse(guard: str, loss_R: Iterable[float], *, margin: float, error_rate: float) -> Verdict:
    """Judge paired differences, value of the current gate minus that of the offered one, each in [-1, 1], in an order by chance.

    Refuses where the offered gate is worse by more than `margin` beyond reasonable doubt; a gate that is not is refused with
    probability `error_rate` at most. Few rows find gross losses only: `detectable` says which.
    """
    test, total, count, lead = SequentialTest(margin, error_rate), 0.0, 0, 1.0
    for loss in loss_R:
        if math.isnan(loss):
            continue
        test.update(loss)
        total, count, lead = total + loss, count + 1, max(lead, test.evidence)
    mean = total / count if count else 0.0
    seen = f"evidence that it is worse by more than {margin:g} is {lead:.3g} of {test.threshold:g}"
    blind = f"a loss below {margin + detectable(count, error_rate):.2g} need not show"
    words = f"quality on {count} queries {-mean:+.3f}; {seen}; {blind}"
    return Verdict(guard=guard, passed=lead < test.threshold, value=lead, bound=test.threshold, words=words)


def detectable(count: int, error_rate: float) -> float:
    """Return about the smallest mean loss beyond the margin that so many differences find, as far as they differ (Hoeffding)."""
    return min(1.0, math.sqrt(2.0 * math.log(len(BETS) / error_rate) / count)) if count else 1.0


def effective_agents(load_RA: npt.ArrayLike) -> float:
    """Return how many agents share the load in effect: exp of the entropy of their mean shares; 0 without rows."""
    load = np.asarray(load_RA, dtype=np.float64)
    if not len(load):
        return 0.0
    share_A = load.mean(axis=0)
    share_A = share_A[share_A > 0] / share_A.sum()
    return float(np.exp(-(share_A * np.log(share_A)).sum()))


def load(new_RA: npt.ArrayLike, old_RA: npt.ArrayLike, floor: float) -> Verdict:
    """Judge whether the load [R, A] collapses onto few agents; where it has already, whether it does so further."""
    value, before = effective_agents(new_RA), effective_agents(old_RA)
    bound = min(floor, 0.75 * before)
    words = f"{value:.3g} agents share the load in effect, before {before:.3g}; at least {bound:.3g} are wanted"
    return Verdict(guard="load", passed=value >= bound, value=value, bound=bound, words=words)


def distrusted(sureness_RA: Array, agreement_RA: Array, context_R: IntArray) -> BoolArray:
    """Return which agents [A] became surer while fewer agreed with them: the later half of their replies against the earlier.

    Rows are in order of time; NaN where an agent did not reply. `sureness_RA`: minus the score, `agreement_RA`: the share of
    the other replies that gave the same answer. Both are compared within a context (a group of similar queries), because a
    change of traffic moves both by itself. Source: ours.
    """
    found = [
        _rise(sureness_R, agreement_R, context_R) >= RISE and _rise(-agreement_R, sureness_R, context_R) >= RISE
        for sureness_R, agreement_R in zip(sureness_RA.T, agreement_RA.T, strict=True)
    ]
    return np.array(found, dtype=np.bool_)


def _rise(value_R: Array, other_R: Array, context_R: IntArray) -> float:
    """Return the rise of the later half over the earlier within contexts, in standard errors; rows with both values count."""
    known = np.isfinite(value_R) & np.isfinite(other_R)
    is_late_R = np.zeros(len(value_R), dtype=np.bool_)
    is_late_R[np.flatnonzero(known)[known.sum() // 2 :]] = True
    rise, variance, before, after = 0.0, 0.0, 0, 0
    for context in np.unique(context_R[known]):
        rows = known & (context_R == context)
        early, late = value_R[rows & ~is_late_R], value_R[rows & is_late_R]
        if len(early) < 2 or len(late) < 2:
            continue
        weight = len(early) * len(late) / (len(early) + len(late))
        rise += weight * (late.mean() - early.mean())
        variance += weight**2 * (early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
        before, after = before + len(early), after + len(late)
    if min(before, after) < MIN_REPLIES or rise <= 0:
        return 0.0
    return float(rise / math.sqrt(variance)) if variance > 0 else math.inf


def disagreement(new_RA: npt.ArrayLike, old_RA: npt.ArrayLike, distrusted_A: BoolArray, agents: Sequence[str]) -> Verdict:
    """Judge whether the load [R, A] moves to agents that are distrusted."""
    new, old = np.asarray(new_RA, dtype=np.float64), np.asarray(old_RA, dtype=np.float64)
    gain = float((new - old).mean(axis=0)[distrusted_A].sum()) if len(new) and distrusted_A.any() else 0.0
    names = ", ".join(name for name, bad in zip(agents, distrusted_A, strict=True) if bad)
    words = f"{names} became surer while fewer agreed; their load changes by {gain:+.3f}" if names else "no agent is distrusted"
    return Verdict(guard="disagreement", passed=gain <= GAIN, value=gain, bound=GAIN, words=words)


class _Comparison:
    """What both kinds of comparison of two arms have."""

    def __init__(self, test: Wealth) -> None:
        self.test = test
        self.pairs = 0
        """Differences, or queries of the suspect."""
        self.mean = 0.0
        """By how much the suspect is worse."""

    def state(self) -> dict[str, Any]:
        """Return what another one goes on with, as plain values."""
        return {"log_wealth": list(self.test.log_wealth), "pairs": self.pairs, "mean": self.mean}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with the state of another one. Raises CheckpointError for that of another kind."""
        if (seen := len(state["log_wealth"])) != len(self.test.log_wealth):
            raise CheckpointError(f"a test of a trial: log_wealth has {seen} numbers; expected {len(self.test.log_wealth)}")
        self.test.log_wealth = list(state["log_wealth"])
        self.pairs, self.mean = int(state["pairs"]), float(state["mean"])

    def _met(self, difference: float) -> None:
        self.pairs += 1
        self.mean += (difference - self.mean) / self.pairs


class ArmComparison(_Comparison):
    """Compares two arms of a stream in which chance sends every query to one of them: each arm's newest against the other's.

    A difference is made as soon as both arms have something new: what the suspect gave since the last one, minus what the
    control gave, the mean over all pairs of the two, each cut to [-1, 1]. One arm has a single value then, and to cut after
    means are taken would make equal arms differ where few values lie far off. What is not known (NaN) is left out.
    """

    test: SequentialTest

    def __init__(self, test: SequentialTest) -> None:
        super().__init__(test)
        self._new: tuple[list[float], list[float]] = ([], [])

    def add(self, value: float, *, is_suspect: bool) -> None:
        """Take what one query came to; higher is worse."""
        if math.isnan(value):
            return
        self._new[is_suspect].append(value)
        control, suspect = self._new
        if control and suspect:
            pairs = [min(max(theirs - ours, -1.0), 1.0) for theirs in suspect for ours in control]
            difference = math.fsum(pairs) / len(pairs)
            self.test.update(difference)
            self._met(difference)
            self._new = ([], [])


class RateComparison(_Comparison):
    """Compares how often one arm fails with the other: the suspect's failures against the rate of the control's newest queries.

    That rate is estimated, with one standard error on top, so the stated error rate holds as far as the control's own rate is
    steady over `BASELINE` queries, or rises for both at once.
    """

    test: RateTest

    def __init__(self, test: RateTest, margin: float, whole: RateComparison | None = None) -> None:
        """`whole`: of all queries, where these are some of them; its rate counts for as many as `PRIOR` of theirs."""
        super().__init__(test)
        self._margin, self._whole = margin, whole
        self._control: deque[float] = deque(maxlen=BASELINE)

    @property
    def usual(self) -> float:
        """The control's rate: half a failure in one query is taken for known beforehand, or what holds for the whole."""
        prior, weight = (0.5, 1.0) if self._whole is None else (self._whole.usual, PRIOR)
        count = len(self._control) + weight
        rate = (math.fsum(self._control) + prior * weight) / count
        return max(min(rate + math.sqrt(rate * (1.0 - rate) / count), 1.0), self._recent)

    @property
    def _recent(self) -> float:
        newest = list(self._control)[-RECENT:]
        return max(math.fsum(newest) / RECENT, 0.0 if self._whole is None else self._whole._recent)

    def add(self, value: float, *, is_suspect: bool) -> None:
        """Take whether one query failed, 0 or 1; NaN says nothing."""
        if math.isnan(value):
            return
        if not is_suspect:
            self._control.append(value)
            return
        usual = self.usual
        self.test.update(value, min(usual + self._margin, 0.99))
        self._met(value - usual)

    def state(self) -> dict[str, Any]:
        """Return what another one goes on with: the control's rate is part of it."""
        return super().state() | {"control": "".join(str(int(value)) for value in self._control)}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with the state of another one."""
        super().take_up(state)
        self._control.extend(float(digit) for digit in state.get("control", ""))


Comparison = ArmComparison | RateComparison


class ByContext:
    """A comparison of all queries, and the same within every kind of them: what fails in one of many contexts is found too.

    The evidence is a mean: half of it that of all queries, the other half spread evenly over as many contexts as there may be.
    A mean of wealth is wealth, so the error rate is that of one test, however many contexts come.
    """

    def __init__(self, whole: Comparison, part: Callable[[], Comparison], max_contexts: int) -> None:
        """`part` begins the comparison of a context that was not seen before."""
        self.whole = whole
        self._part, self._share = part, 0.5 / max_contexts
        self._parts: dict[int, Comparison] = {}
        self._waiting: list[tuple[float, int | None]] = []

    def add(self, value: float, context: int | None, *, is_suspect: bool) -> None:
        """Take what one query came to; higher is worse. Its context is None where it is not known.

        A failure of the suspect is tested once the control is heard of again: it may be that everything fails now.
        """
        if is_suspect and isinstance(self.whole, RateComparison):
            self._waiting.append((value, context))
            return
        self._add(value, context, is_suspect=is_suspect)
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            self._add(*one, is_suspect=True)

    def _add(self, value: float, context: int | None, *, is_suspect: bool) -> None:
        self.whole.add(value, is_suspect=is_suspect)
        if context is not None:
            self._of(context).add(value, is_suspect=is_suspect)

    def _of(self, context: int) -> Comparison:
        if context not in self._parts:
            self._parts[context] = self._part()
        return self._parts[context]

    def state(self) -> dict[str, Any]:
        """Return what another one goes on with, as plain values."""
        return self.whole.state() | {"parts": {str(context): one.state() for context, one in self._parts.items()}}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on with the state of another one, or of a comparison of all queries."""
        self.whole.take_up(state)
        for context, part in state.get("parts", {}).items():
            self._of(int(context)).take_up(part)

    @property
    def evidence(self) -> float:
        """That the suspect is worse: 1 at first."""
        unseen = 0.5 - self._share * len(self._parts)
        return (
            0.5 * self.whole.test.evidence + unseen + self._share * math.fsum(one.test.evidence for one in self._parts.values())
        )

    @property
    def is_found(self) -> bool:
        """Whether it is worse, by what came so far."""
        return self.evidence >= self.whole.test.threshold

    @property
    def suspicion(self) -> float:
        """The most evidence of any context by itself, or of all queries; with many contexts no finding."""
        return max(one.test.evidence for one in (self.whole, *self._parts.values()))

    @property
    def where(self) -> str:
        """Where the evidence lies, in words."""
        worst = max(self._parts.values(), key=lambda one: one.test.evidence, default=self.whole)
        is_local = self._share * worst.test.evidence > 0.5 * self.whole.test.evidence
        return f"worse by {worst.mean:.3f} in one kind of queries" if is_local else f"worse by {self.whole.mean:.3f}"
