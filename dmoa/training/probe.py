"""Can predictive entropy route this pool? A dense look at about thirty unlabelled queries, before anything is trained.

Entropy routes only where agents differ in *which* rows they are sure of: the interaction of agent and row in log PE. The
probe measures it, names agents that ignore their input, says what a router without training would do, and, where rows with
known answers are given, finds agents that are sure and wrong. Shape letters: R rows, A agents, D embedding.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.stats import binomtest, rankdata

from dmoa.core.label_model import MIN_ROWS
from dmoa.core.scores import SCORE_OFFSET_NATS, Array, BoolArray
from dmoa.errors import ConfigError
from dmoa.training.cluster_router import ProbeSample, fit_clusters
from dmoa.training.probe_answers import AnswerFinding, commonest, probe_answers, replies_of, say_one_thing
from dmoa.training.rollouts import FileRecord

Verdict = Literal["can", "cannot", "audit"]
AUDIT_ROWS = 30
"""Rows with known answers that tell an agent of 50 % from one of 80 % nineteen times out of twenty."""
_ENOUGH_INTERACTION = 0.05
"""Share of Var(log PE) below which differences between agents are noise. Role prompts on one small model stay below 0.01."""
_FEWEST = 4
"""Queries with an entropy of every agent that entropies are compared on at the least."""
_NO_VARIANCE = 1e-12
"""Of log PE: what is left of entropies that are all the same, since a mean is rounded."""
_EACH_ALONE, _FOLDS = 100, 20
"""Rows that are left out one by one at the most; of more so many parts are, or four hundred would take minutes."""
_FAVOURITE = 0.9
_SAME_TEXT = 0.8
_ROUNDS = 1000
_ALPHA = 0.05
_GAP = 0.2
_LEAST_GAIN = 0.005
"""Share of the possible gain that clusters must reach; less reads as 0 %."""


class AgentFinding(FileRecord):
    """What the probe saw of one agent."""

    agent: str
    entropy_nats: float | None
    """Mean over the rows of the mean entropy per token; null where none is known."""
    surest: float | None
    """Share of rows on which it is the surest."""
    row_spread: float | None
    """Standard deviation over rows of its log PE."""
    same_text: float
    """Share of its replies that are its commonest one."""
    ignores_input: bool
    """It says the same to most rows, while another that replied to them does not."""
    accuracy: float | None = None
    """On the rows with known answers."""
    auroc: float | None = None
    """How well its entropy tells its wrong answers from its right ones; null without both."""
    sure_and_wrong: list[str] = Field(default_factory=list)
    """Sources whose rows it would win by sureness although another agent is right far more often."""


class PairFinding(FileRecord):
    """Two agents."""

    a: str
    b: str
    a_surer: float
    """Share of rows on which a is surer."""
    interaction: float
    """Share of the variance of their log PEs that is neither the rows' nor the agents' own."""


class ProbeReport(FileRecord):
    """Everything that the probe found."""

    rows: int
    known_rows: int
    row_share: float
    """Share of Var(log PE) that rows explain: some queries are harder for everybody."""
    agent_share: float
    """Share that agents explain: some are surer about everything."""
    interaction_share: float
    """The rest: who is sure depends on the row. What a router can live on."""
    interaction_low: float
    """Lower end of the 95 % bootstrap interval over rows."""
    interaction_high: float
    agents: list[AgentFinding]
    pairs: list[PairFinding]
    cluster_choices: dict[str, float]
    """What "k-means over embeddings + surest agent of the cluster" would choose, as shares of the rows; each row is judged
    by clusters that were fitted without it."""
    cluster_gain: float | None
    """Its gain in sureness over the best single agent, as a share of what the surest agent of every row gains; null where
    there is nothing to gain."""
    verdict: Verdict
    """Whether entropy can route the pool; what can is said in `answers`."""
    reasons: list[str]
    answers: AnswerFinding | None = None
    """What the answers tell; null for fewer than eight queries."""
    audit_rows: int = AUDIT_ROWS


def probe_pool(sample: ProbeSample, *, known: ProbeSample | None = None, seed: int = 0) -> ProbeReport:
    """Return the report of a sample; `known` is another of the same agents, of rows with known answers.

    Entropies are compared on rows where all agents have one; where these are too few, what answers tell is reported alone.

    Raises ConfigError for fewer than two agents, and where nobody replied or nothing is known of anybody.
    """
    if len(sample.agents) < 2:
        raise one_agent(sample.agents[0])
    log_RA = np.log(sample.entropy_RA + SCORE_OFFSET_NATS)
    whole_R = np.asarray(np.isfinite(log_RA).all(axis=1))
    num_whole = int(whole_R.sum())
    are_compared = num_whole >= _FEWEST
    if not are_compared and (sample.heard_RA is None or not sample.heard_RA.any()):
        silent = [name for name, is_heard in zip(sample.agents, np.isfinite(log_RA).any(axis=0), strict=True) if not is_heard]
        advice = f"{', '.join(silent)}: no reply with an entropy to any query; mend that, or take it out of the pool"
        raise ConfigError(
            f"probe: {num_whole} queries that all of {len(sample.agents)} agents replied to; {_FEWEST} is the least; "
            f"{advice if silent else 'give more queries'}"
        )
    log_RA = log_RA[whole_R & are_compared]
    findings = _agents(sample, log_RA, whole_R, known)
    shares, (low, high), choices, gain, pairs = (0.0, 0.0, 0.0), (0.0, 0.0), dict[str, float](), None, list[PairFinding]()
    verdict: Verdict
    verdict, reasons = "cannot", _unknown(sample, num_whole)
    if are_compared:
        shares, (low, high) = variance_shares(log_RA), _interval(log_RA, seed)
        choices, gain = _untrained(log_RA, np.asarray(sample.embedding_RD)[whole_R], sample.agents, seed)
        pairs = [_pair(sample.agents, log_RA, a, b) for a, b in combinations(range(len(sample.agents)), 2)]
        verdict, reasons = _verdict(shares[2], low, findings, gain)
    return ProbeReport(
        rows=len(log_RA) or len(sample.texts),
        known_rows=0 if known is None else len(known.sources),
        row_share=shares[0],
        agent_share=shares[1],
        interaction_share=shares[2],
        interaction_low=low,
        interaction_high=high,
        agents=findings,
        pairs=pairs,
        cluster_choices=choices,
        cluster_gain=gain,
        verdict=verdict,
        reasons=[*reasons, *_too_few(sample)],
        answers=probe_answers(sample, can_entropy=verdict == "can", seed=seed),
    )


def one_agent(name: str) -> ConfigError:
    """Return the error of a pool that leaves nothing to route."""
    return ConfigError(f"probe: {name} is the pool's only agent, which leaves nothing to route; two are the least: add another")


def _unknown(sample: ProbeSample, whole: int) -> list[str]:
    """Return in words why entropies cannot be compared."""
    known_RA, heard_RA = np.isfinite(sample.entropy_RA), sample.replied
    columns = list(zip(sample.agents, known_RA.T, heard_RA.T, strict=True))
    silent = [name for name, _, heard_R in columns if not heard_R.any()]
    without = [name for name, known_R, heard_R in columns if heard_R.any() and not known_R.any()]
    reasons = [f"{', '.join(silent)}: no reply to any query; mend that, or take it out of the pool"] if silent else []
    if not known_RA.any():
        return [*reasons, "no entropies are known"]
    if without:
        return [*reasons, f"no entropies are known of {', '.join(without)}; they are compared where all agents have one"]
    least = f"{_FEWEST} are the least; ask all agents the same queries"
    return reasons or [f"{whole} queries have an entropy of every agent, {least}"]


def _too_few(sample: ProbeSample) -> list[str]:
    """Return in words that answers tell nothing, where that is so."""
    rows = len(sample.texts)
    return [f"{rows} queries are too few for what answers tell; {MIN_ROWS} are the least"] if rows < MIN_ROWS else []


def variance_shares(log_RA: Array) -> tuple[float, float, float]:
    """Return the shares of Var(log PE) of rows, of agents, and of their interaction (two-way layout, one reply a cell)."""
    centred_RA = log_RA - log_RA.mean()
    total = float((centred_RA**2).mean())
    if total < _NO_VARIANCE:
        return 0.0, 0.0, 0.0
    row_R1, agent_1A = centred_RA.mean(axis=1, keepdims=True), centred_RA.mean(axis=0, keepdims=True)
    rest_RA = centred_RA - row_R1 - agent_1A
    return float((row_R1**2).mean()) / total, float((agent_1A**2).mean()) / total, float((rest_RA**2).mean()) / total


def _interval(log_RA: Array, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn = [variance_shares(log_RA[rng.integers(0, len(log_RA), len(log_RA))])[2] for _ in range(_ROUNDS)]
    low, high = np.quantile(drawn, (_ALPHA / 2, 1 - _ALPHA / 2))
    return float(low), float(high)


def _untrained(
    log_RA: Array, embedding_RD: npt.NDArray[np.floating], agents: tuple[str, ...], seed: int
) -> tuple[dict[str, float], float | None]:
    """Return what clusters would choose, each row left out (of many a twentieth at once), and how much they gain."""
    num_rows = len(log_RA)
    fold_R = np.arange(num_rows)
    if num_rows > _EACH_ALONE:
        fold_R = np.random.default_rng(seed).permutation(num_rows) % _FOLDS
    chosen = np.zeros(num_rows, dtype=np.int64)
    for fold in np.unique(fold_R):
        is_left_out_R = fold_R == fold
        router = fit_clusters(
            embedding_RD[~is_left_out_R], log_RA[~is_left_out_R], num_clusters=min(8, max(2, num_rows // 5)), seed=seed
        )
        chosen[is_left_out_R] = router.rank(embedding_RD[is_left_out_R])[:, 0]
    counts = np.bincount(chosen, minlength=len(agents)) / num_rows
    best, perfect = float(log_RA.mean(axis=0).min()), float(log_RA.min(axis=1).mean())
    reached = float(log_RA[np.arange(num_rows), chosen].mean())
    gain = (best - reached) / (best - perfect) if best - perfect > 1e-9 else None
    return {agent: float(share) for agent, share in zip(agents, counts, strict=True)}, gain


def _agents(sample: ProbeSample, log_RA: Array, whole_R: BoolArray, known: ProbeSample | None) -> list[AgentFinding]:
    """Return what was seen of each agent. `log_RA`: the rows `whole_R`, of which all entropies are known; there may be none."""
    said = [[None if text is None else text.strip() for text in row] for row in replies_of(sample)]
    ignoring = say_one_thing([[text or None for text in row] for row in said], _SAME_TEXT)  # an empty reply ignores nothing
    surest_A = _surest(log_RA)
    found = []
    for index, (agent, ignores_input) in enumerate(zip(sample.agents, ignoring, strict=True)):
        entropy_R = sample.entropy_RA[whole_R if len(log_RA) else np.isfinite(sample.entropy_RA[:, index]), index]
        accuracy, auroc, bad = _judged(known, index)
        found.append(
            AgentFinding(
                agent=agent,
                entropy_nats=float(entropy_R.mean()) if len(entropy_R) else None,
                surest=float(surest_A[index]) if len(log_RA) else None,
                row_spread=float(log_RA[:, index].std()) if len(log_RA) else None,
                same_text=commonest([row[index] for row in said]),
                ignores_input=ignores_input,
                accuracy=accuracy,
                auroc=auroc,
                sure_and_wrong=bad,
            )
        )
    return found


def _surest(log_RA: Array) -> Array:
    """Return the share of rows on which each agent is the surest [A]; those that are as sure as each other share a row."""
    is_least_RA = log_RA == log_RA.min(axis=1, keepdims=True)
    share_A: Array = (is_least_RA / is_least_RA.sum(axis=1, keepdims=True)).sum(axis=0) / max(1, len(log_RA))
    return share_A


def _judged(known: ProbeSample | None, index: int) -> tuple[float | None, float | None, list[str]]:
    """Return accuracy, AUROC and the sources on which an agent is sure and wrong, from the rows with known answers.

    The accuracy takes its replies alone, the AUROC their entropies too, and what it is sure of those of all agents.
    """
    if known is None or known.value_RA is None:
        return None, None, []
    value_RA, entropy_RA = known.value_RA, known.entropy_RA
    mine_R = np.isfinite(value_RA[:, index]) & known.replied[:, index]
    if not mine_R.any():
        return None, None, []
    sure_R = mine_R & np.isfinite(entropy_RA[:, index])
    whole_R = np.isfinite(value_RA).all(axis=1) & np.isfinite(entropy_RA).all(axis=1)
    sources = np.array(known.sources)
    bad = [
        str(name)
        for name in np.unique(sources[whole_R])
        if _is_sure_and_wrong(value_RA[whole_R], entropy_RA[whole_R], sources[whole_R] == name, index)
    ]
    return float(value_RA[mine_R, index].mean()), auroc(entropy_RA[sure_R, index], value_RA[sure_R, index] < 1.0), bad


def _is_sure_and_wrong(value_RA: Array, entropy_RA: Array, here_R: BoolArray, index: int) -> bool:
    """Tell whether, on rows that an agent wins by sureness, another is right so much more often that it is not an accident."""
    won_R = here_R & (entropy_RA.argmin(axis=1) == index)
    if won_R.sum() < 5:
        return False
    here_RA = value_RA[won_R] >= 1.0
    rival = int(here_RA.mean(axis=0).argmax())
    gained, lost = int((here_RA[:, rival] & ~here_RA[:, index]).sum()), int((here_RA[:, index] & ~here_RA[:, rival]).sum())
    if here_RA[:, rival].mean() - here_RA[:, index].mean() < _GAP:
        return False
    return bool(binomtest(gained, gained + lost, alternative="greater").pvalue < _ALPHA)


def auroc(score_N: Array, is_positive_N: BoolArray) -> float | None:
    """Return the chance that a positive case scores above a negative one, ties counting half; None without both."""
    positive, negative = int(is_positive_N.sum()), int((~is_positive_N).sum())
    if not positive or not negative:
        return None
    ranks_N = rankdata(score_N)
    return float((ranks_N[is_positive_N].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _pair(agents: tuple[str, ...], log_RA: Array, a: int, b: int) -> PairFinding:
    two_R2 = log_RA[:, [a, b]]
    return PairFinding(
        a=agents[a],
        b=agents[b],
        a_surer=float((two_R2[:, 0] < two_R2[:, 1]).mean()),
        interaction=variance_shares(two_R2)[2],
    )


def gains_nothing(gain: float | None) -> bool:
    """Tell whether a share of the possible gain is none, or too little to be shown as a whole percent."""
    return gain is None or gain < _LEAST_GAIN


def _verdict(interaction: float, low: float, agents: list[AgentFinding], gain: float | None) -> tuple[Verdict, list[str]]:
    """Return the verdict and why, in words."""
    reasons: list[str] = []
    favourite = max(agents, key=lambda found: found.surest or 0.0)
    if low < _ENOUGH_INTERACTION:
        reasons.append(
            f"who is sure hardly depends on the query: interaction is {interaction:.1%} of Var(log PE) (lower end {low:.1%}, "
            f"{_ENOUGH_INTERACTION:.0%} needed)"
        )
    if favourite.surest is not None and favourite.surest >= _FAVOURITE:
        reasons.append(f"{favourite.agent} is the surest on {favourite.surest:.0%} of the rows: a router would ask nobody else")
    if reasons:
        return "cannot", reasons
    for found in agents:
        if found.ignores_input:
            reasons.append(f"{found.agent} gives one reply to {found.same_text:.0%} of the rows: its sureness says nothing")
        if found.sure_and_wrong:
            reasons.append(f"{found.agent} is sure and wrong on {', '.join(found.sure_and_wrong)}: take it out or retrain it")
    if reasons:
        return "audit", reasons
    if gains_nothing(gain):
        return "cannot", [
            "what a query is about does not tell who is sure of it: the surest agent of a cluster of queries gains nothing over "
            "the best single agent; more queries may show more (--limit)"
        ]
    return "can", [f"who is sure depends on the query: interaction is {interaction:.1%} of Var(log PE) (lower end {low:.1%})"]
