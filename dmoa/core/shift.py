"""Notices that the stream of queries is not what it was: other questions, or agents that are as sure as they never were.

A reference of earlier queries says how far from its neighbours a usual query lies. How unusual the next one is becomes a
p-value among all since, a bet against it, and the bets of all possible beginnings of a shift are summed up (Shiryaev-Roberts).
While queries are exchangeable the mean number of queries to a false alarm is at least `run_length`, whatever their
distribution. Sources: conformal test martingales (Vovk 2003), e-detectors (Shin, Ramdas, Rinaldo 2022); the distances ours,
after LOF (Breunig 2000).

Shape letters: D embedding, A agents; in this file alone R rows of the reference, Q queries that wait to join it.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dmoa.core.scores import Array, known_mean
from dmoa.errors import ConfigError

NEIGHBOURS = 5
"""Rows of the reference that a query is compared with."""
MAX_ROWS = 512
"""Rows of the reference; a new one takes the place of any."""
MAX_SEEN = 20_000
"""Earlier queries that the next one is compared with; of more any one goes."""
FAMILIAR = 0.1
"""Least p-value of a query's input for its signals to be compared with those of its neighbours."""
PARDON = 0.45
"""Mean p-value of an odd agent's last `SETTLE` signals, by what was usual before, at which it is odd no longer."""
SETTLE = 40
"""Queries after a shift, and before the first, that are looked at before any is judged."""
Cause = Literal["inputs", "signals"]
"""Questions unlike those before, or replies as sure or unsure as none before to such questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """A change of the stream."""

    at: int
    """Number of the query, from 1, at which it was noticed."""
    cause: Cause
    evidence: float
    """What the sum of bets came to."""


class _Evidence:
    """The bets on one kind of unusual: their sum, and what it would be without those on the queries of a key."""

    def __init__(self, calibration: list[float]) -> None:
        self.calibration = sorted(calibration)
        self._seen = list(self.calibration)
        self.total = 0.0
        self._without: dict[str, float] = {}
        """Keys that made a difference of late; without any other key it is the total."""
        self._newest: deque[tuple[str, float]] = deque(maxlen=SETTLE)

    def add(self, score: float, rng: np.random.Generator, key: str = "", enough: float = math.inf) -> float:
        """Bet on a query being more unusual than those before (mixture of the power bets, Vovk); return its p-value.

        What a key asks that alone makes the sum be `enough` does not become usual: the others would seem so beside it.
        """
        above = len(self._seen) - bisect.bisect_right(self._seen, score)
        ties = len(self._seen) - above - bisect.bisect_left(self._seen, score)
        p = (above + float(rng.uniform()) * (ties + 1)) / (len(self._seen) + 1)
        own = self._without.get(key, self.total)
        self._newest.append((key, score))
        bisect.insort(self._seen, score)
        if own < enough <= self.total:
            for one in [one for one in self._newest if one[0] == key and one[1] in self._seen]:
                self._newest.remove(one)
                self._seen.remove(one[1])
        if len(self._seen) > MAX_SEEN:
            del self._seen[int(rng.integers(MAX_SEEN))]
        pays, self.total = bet(p), (self.total + 1.0) * bet(p)
        others = {name: (total + 1.0) * pays for name, total in self._without.items() if name != key} | {key: own}
        self._without = {name: total for name, total in others.items() if abs(total - self.total) > 0.01 * self.total}
        return p

    def counted(self, key_share: float, enough: float) -> float:
        """Return the sum of bets; less, where one key gives more than its share of the logarithm of `enough`."""
        least = min(self._without.values(), default=self.total)
        return self.total if key_share >= 1.0 else min(self.total, least * enough**key_share)


def bet(p: float) -> float:
    """Return what a bet on small p-values pays: the integral of k p^(k - 1) over k from 0 to 1, whose mean is 1 for uniform p."""
    p = min(max(p, 1e-12), 1.0 - 1e-6)
    log = math.log(p)
    return (1.0 - p + p * log) / (p * log * log)


Row = tuple[Array, Array]
"""Embedding [D] and signals [A] of a query."""


class ShiftDetector:
    """Looks at queries one by one. The same queries and seed give the same verdicts."""

    def __init__(self, *, run_length: float = 20_000.0, seed: int = 0) -> None:
        """`run_length`: least mean number of queries between false alarms. Raises ConfigError for less than 2."""
        if not run_length >= 2:
            raise ConfigError(f"shift detector: run_length is {run_length!r}; expected a number of queries from 2")
        self.run_length = run_length
        self.seen = 0
        self.shifts: list[Shift] = []
        self.odd_agents: set[int] = set()
        """Agents whose signals are unlike their own before while most others' are not, and those that were never heard.

        The former until their signals are again what they were.
        """
        self.usual_A: Array = np.zeros(0)
        """Of the last query, per agent the p-value of its signal [A]; NaN where it could not be compared."""
        self._rng = np.random.default_rng(seed)
        self._waiting: list[Row] = []
        self._recent: deque[Row] = deque(maxlen=SETTLE // 2)
        self._reference: _Reference | None = None
        self._inputs: _Evidence | None = None
        self._agents: list[_Evidence] = []
        self._key_share = 1.0
        self._again: dict[int, tuple[list[float], deque[float]]] = {}
        """Odd agent -> what was usual before, in order, and its newest p-values by that."""

    @property
    def is_settling(self) -> bool:
        """Whether it is still learning what is usual."""
        return self._inputs is None

    @property
    def evidence(self) -> float:
        """What speaks for a shift, as a share of what an alarm takes."""
        return max(self._shares().values(), default=0.0)

    def _shares(self) -> dict[Cause, float]:
        """Return the evidence for each cause. Half of the false alarms may come of inputs, the rest of any agent's signals."""
        if self._inputs is None:
            return {}
        signals = self._of_most(self._agent_shares(self._key_share))
        enough = 2 * self.run_length
        return {"inputs": self._inputs.counted(self._key_share, enough) / enough, "signals": signals}

    def _of_most(self, shares: list[float]) -> float:
        """Return what speaks for a change of most agents: of the middle one of them."""
        known = [share for agent, share in enumerate(shares) if agent not in self.odd_agents or share >= 1.0]
        return sorted(known)[(len(known) - 1) // 2] if len(known) > 1 else 0.0

    def _agent_shares(self, key_share: float = 1.0) -> list[float]:
        enough = 2 * len(self._agents) * self.run_length
        return [kind.counted(key_share, enough) / enough for kind in self._agents]

    def prime(self, input_RD: npt.ArrayLike, signal_RA: npt.ArrayLike) -> None:
        """Begin with earlier queries as what is usual; agents without a signal among them are odd. Too few change nothing."""
        rows = list(zip(np.asarray(input_RD, np.float64), np.asarray(signal_RA, np.float64), strict=True))
        if len(rows) < SETTLE:
            return
        self._waiting = [rows[place] for place in self._rng.permutation(len(rows))[: 2 * MAX_ROWS]]
        self._settle()
        heard_A = np.isfinite(np.stack([signal_A for _, signal_A in rows])).sum(axis=0) >= NEIGHBOURS
        self.odd_agents |= set(np.flatnonzero(~heard_A).tolist())

    def see(self, input_D: npt.ArrayLike, signal_A: npt.ArrayLike, key: str = "", key_share: float = 1.0) -> Shift | None:
        """Take the next query: its embedding, and per agent how sure it was (any number, NaN where nothing is known).

        Returns the shift that it completes, else None. Inputs that are not finite are not looked at. `key`: whose query it is;
        `key_share`: most of the evidence that one key may give, 1 where there is no other.
        """
        row = np.asarray(input_D, np.float64), np.asarray(signal_A, np.float64)
        if not np.isfinite(row[0]).all():
            return None
        self.seen += 1
        self._key_share = key_share
        self.usual_A = np.full(len(row[1]), np.nan)
        if self._inputs is None or self._reference is None:
            self._waiting.append(row)
            if len(self._waiting) >= SETTLE:
                self._settle()
            return None
        self._recent.append(row)
        apart, off_A = self._reference.unusual(*row)
        p = self._inputs.add(apart, self._rng, key, 2 * self.run_length if key_share < 1.0 else math.inf)
        is_familiar = p >= FAMILIAR and self._inputs.counted(key_share, 2 * self.run_length) < math.sqrt(self.run_length)
        if is_familiar:  # else its neighbours tell nothing about it
            for agent in np.flatnonzero(np.isfinite(off_A)):
                self.usual_A[agent] = self._agents[agent].add(float(off_A[agent]), self._rng, key)
            self._pardon(off_A)
        shares = self._shares()
        cause = max(shares, key=lambda kind: shares[kind])
        if shares[cause] < 1.0:
            found = self._agent_shares()
            if self._of_most(found) >= 1.0:  # on the queries of one key, which says nothing of the agents
                found = self._agent_shares(key_share)
                cleared = [agent for agent in self._again if found[agent] < 1.0]
                self.odd_agents.difference_update(cleared)
                self._again = {agent: known for agent, known in self._again.items() if agent not in cleared}
            odd = {agent for agent, share in enumerate(found) if share >= 1.0} - self.odd_agents
            self.odd_agents |= odd
            self._again |= {agent: (self._agents[agent].calibration, deque(maxlen=SETTLE)) for agent in odd}
            return None
        if cause == "signals":
            self.odd_agents, self._again = set(), {}
        shift = Shift(at=self.seen, cause=cause, evidence=shares[cause])
        self.shifts.append(shift)
        # The queries that gave the alarm are the first of what is usual from now on.
        self._waiting, self._inputs, self._agents = list(self._recent), None, []
        return shift

    def _pardon(self, off_A: Array) -> None:
        """Hear odd agents again whose signals are what they were; what they said meanwhile has not become usual."""
        for agent in [agent for agent in self._again if np.isfinite(off_A[agent])]:
            before, newest = self._again[agent]
            above = len(before) - bisect.bisect_left(before, float(off_A[agent]))
            newest.append((above + 1) / (len(before) + 1))
            if len(newest) == SETTLE and sum(newest) >= PARDON * SETTLE:
                self.odd_agents.discard(agent)
                self._agents[agent] = _Evidence(before)
                del self._again[agent]

    def _settle(self) -> None:
        """Make the queries that waited part of the reference, and judge the next ones as unusual as half of these are."""
        odd = list(self.odd_agents)
        for _, signal_A in self._waiting:
            signal_A[odd] = np.nan  # what they say now is not to become usual
        # In the order of Thue and Morse: of a stream that takes turns every second query may be of one kind.
        joined, held = ([row for at, row in enumerate(self._waiting) if at.bit_count() % 2 == part] for part in (0, 1))
        rows = [*(self._reference.rows if self._reference else ()), *joined]
        if len(rows) > MAX_ROWS:
            room = max(MAX_ROWS - len(joined), 0)
            old = self._rng.permutation(len(rows) - len(joined))[:room]
            rows = [*(rows[place] for place in sorted(old)), *joined[:MAX_ROWS]]
        self._reference = _Reference(rows)
        found = [self._reference.unusual(*row) for row in held]
        self._inputs = _Evidence([apart for apart, _ in found])
        off_HA = np.stack([off_A for _, off_A in found])
        self._agents = [_Evidence(off_H[np.isfinite(off_H)].tolist()) for off_H in off_HA.T]
        self._waiting = []


class _Reference:
    """Queries that are usual, and how far apart such lie."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self._input_RD = np.stack([input_D for input_D, _ in rows])
        self._signal_RA = np.stack([signal_A for _, signal_A in rows])
        distance_RR = np.sqrt(np.maximum(_squares(self._input_RD, self._input_RD), 0.0))
        np.fill_diagonal(distance_RR, np.inf)
        near_RR = np.partition(distance_RR, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
        # Copies of one query lie nowhere apart; what is near them must not count as infinitely far.
        self._usual_R = np.maximum(near_RR.mean(axis=1), 1e-3)

    def unusual(self, input_D: Array, signal_A: Array) -> tuple[float, Array]:
        """Return how much farther off than its neighbours are a query lies, and per agent how far its signal is from theirs."""
        distance_R = np.sqrt(np.maximum(_squares(input_D[None], self._input_RD)[0], 0.0))
        near = np.argpartition(distance_R, NEIGHBOURS - 1)[:NEIGHBOURS]
        off_A: Array = np.abs(signal_A - known_mean(self._signal_RA[near]))
        return float(distance_R[near].mean() / self._usual_R[near].mean()), off_A


def _squares(x_QD: Array, y_RD: Array) -> Array:
    found_QR: Array = (x_QD**2).sum(axis=1)[:, None] + (y_RD**2).sum(axis=1)[None] - 2.0 * x_QD @ y_RD.T
    return found_QR
