"""The probe's numbers against layouts made by hand, and its verdicts on pools that deserve them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmoa.cli.train import print_probe
from dmoa.config import loads
from dmoa.core.scores import SCORE_OFFSET_NATS, Array
from dmoa.errors import ConfigError
from dmoa.testing import scripted_pool_yaml as pool_yaml
from dmoa.training.cluster_router import ProbeSample, fit_clusters
from dmoa.training.probe import ProbeReport, auroc, gains_nothing, probe_pool, variance_shares

RNG = np.random.default_rng(5)
AGENTS = ("base", "sums", "words")
ROWS = 40
DOMAIN_R = np.arange(ROWS) % 2
"""0: sums, 1: words."""


def sample(log_RA: Array, **changes: Any) -> ProbeSample:
    """A sample whose log(PE + offset) is `log_RA`, with two clouds of embeddings."""
    values: dict[str, Any] = {
        "agents": AGENTS,
        "sources": tuple("words" if domain else "sums" for domain in DOMAIN_R),
        "embedding_RD": np.eye(2)[DOMAIN_R] + RNG.normal(0, 0.05, (ROWS, 2)),
        "entropy_RA": np.exp(log_RA) - SCORE_OFFSET_NATS,
        "texts": tuple(tuple(f"{agent} says {row}" for agent in AGENTS) for row in range(ROWS)),
    }
    return ProbeSample(**values | changes)


def specialists() -> Array:
    """Each specialist is sure at home and unsure abroad; the base is unsure everywhere."""
    log_RA = np.zeros((ROWS, 3))
    log_RA[:, 1] = np.where(DOMAIN_R == 0, -3.0, 1.0)
    log_RA[:, 2] = np.where(DOMAIN_R == 1, -3.0, 1.0)
    return log_RA + RNG.normal(0, 0.3, (ROWS, 3))


def finding(report: ProbeReport, agent: str) -> Any:
    return next(found for found in report.agents if found.agent == agent)


def test_variance_shares_of_pure_layouts() -> None:
    row_R1, agent_1A = np.array([[-1.0], [1.0]]), np.array([[-2.0, 2.0]])
    assert variance_shares(row_R1 + 0 * agent_1A) == (1.0, 0.0, 0.0)
    assert variance_shares(0 * row_R1 + agent_1A) == (0.0, 1.0, 0.0)
    assert variance_shares(row_R1 * agent_1A) == (0.0, 0.0, 1.0)
    # 1 : 4 by variance.
    assert variance_shares(row_R1 + agent_1A) == pytest.approx((0.2, 0.8, 0.0))
    assert variance_shares(np.zeros((3, 2))) == (0.0, 0.0, 0.0)


def test_specialists_can_be_routed() -> None:
    report = probe_pool(sample(specialists()))
    assert report.verdict == "can"
    assert report.interaction_low > 0.5
    assert report.cluster_choices == {"base": 0.0, "sums": 0.5, "words": 0.5}
    assert report.cluster_gain is not None
    assert report.cluster_gain > 0.95
    assert finding(report, "sums").surest == 0.5
    assert [(pair.a, pair.b) for pair in report.pairs] == [("base", "sums"), ("base", "words"), ("sums", "words")]
    assert report.pairs[2].a_surer == 0.5


def test_roles_that_hardly_differ_cannot() -> None:
    hardness_R1 = RNG.normal(0, 0.4, (ROWS, 1))
    report = probe_pool(sample(hardness_R1 + RNG.normal(0, 0.02, (ROWS, 3))))
    assert report.verdict == "cannot"
    assert report.row_share > 0.98
    assert "hardly depends on the query" in report.reasons[0]


def test_one_agent_that_is_always_surest_cannot_be_routed() -> None:
    log_RA = specialists()
    log_RA[:, 0] = -6.0
    report = probe_pool(sample(log_RA))
    assert report.verdict == "cannot"
    assert "base is the surest on 100% of the rows" in report.reasons[-1]


def test_an_agent_that_ignores_its_input_asks_for_an_audit() -> None:
    texts = tuple(("Answer: 7", f"{row}", f"{row}") for row in range(ROWS))
    report = probe_pool(sample(specialists(), texts=texts))
    assert report.verdict == "audit"
    assert [found.agent for found in report.agents if found.ignores_input] == ["base"]
    assert "base gives one reply to 100% of the rows" in report.reasons[0]


def test_known_answers_find_the_agent_that_is_sure_and_wrong() -> None:
    value_RA = np.zeros((ROWS, 3))
    value_RA[DOMAIN_R == 0, 0] = 1.0  # sums by the base, which nobody would ask
    value_RA[DOMAIN_R == 1, 2] = 1.0
    report = probe_pool(sample(specialists()), known=sample(specialists(), value_RA=value_RA))
    assert report.verdict == "audit"
    assert finding(report, "sums").sure_and_wrong == ["sums"]
    assert finding(report, "words").sure_and_wrong == finding(report, "base").sure_and_wrong == []
    assert (finding(report, "words").accuracy, finding(report, "words").auroc) == (0.5, 1.0)
    assert report.known_rows == ROWS


def test_rows_that_an_agent_left_out_do_not_count() -> None:
    log_RA = specialists()
    log_RA[:3, 1] = np.nan
    assert probe_pool(sample(log_RA)).rows == ROWS - 3
    log_RA[3:, 1] = np.nan
    with pytest.raises(ConfigError, match="0 queries that all of 3 agents replied to"):
        probe_pool(sample(log_RA))


def test_an_agent_that_never_replied_is_named() -> None:
    log_RA = specialists()
    log_RA[:, 1] = np.nan
    with pytest.raises(ConfigError, match=r"0 queries that all of 3 agents replied to.*; sums: no reply with an entropy to any"):
        probe_pool(sample(log_RA))


def test_a_pool_of_one_agent_is_refused() -> None:
    one = {"agents": ("base",), "texts": (("yes",),) * ROWS, "heard_RA": np.ones((ROWS, 1), dtype=bool)}
    for log_RA in (specialists()[:, :1], np.full((ROWS, 1), np.nan)):
        with pytest.raises(ConfigError, match="base is the pool's only agent, which leaves nothing to route; two are the least"):
            probe_pool(sample(log_RA, **one))


@pytest.mark.parametrize(
    ("known_RA", "reason"),
    [
        (np.array([[True, True, False]] * ROWS), "no entropies are known of words; they are compared where all agents have one"),
        (np.eye(3, dtype=bool)[np.arange(ROWS) % 3], "0 queries have an entropy of every agent, 4 are the least; ask all agents"),
        (np.zeros((ROWS, 3), dtype=bool), "no entropies are known"),
    ],
)
def test_where_entropies_cannot_be_compared_the_answers_are(known_RA: Any, reason: str) -> None:
    """`words` gives no log-probabilities; or every agent gives them on rows of its own; or none does."""
    log_RA = np.where(known_RA, specialists(), np.nan)
    texts = tuple((f"The answer is {row}.",) * 3 for row in range(ROWS))
    report = probe_pool(sample(log_RA, texts=texts, heard_RA=np.ones((ROWS, 3), dtype=bool)))
    assert (report.verdict, report.rows) == ("cannot", ROWS)
    assert report.reasons[0].startswith(reason)
    assert report.answers is not None
    assert (finding(report, "base").entropy_nats is None) is not known_RA[:, 0].any()


def test_an_agent_that_replied_to_nothing_is_named_beside_what_answers_tell() -> None:
    log_RA, heard_RA = specialists(), np.ones((ROWS, 3), dtype=bool)
    log_RA[:, 1], heard_RA[:, 1] = np.nan, False
    report = probe_pool(sample(log_RA, heard_RA=heard_RA))
    assert report.reasons == ["sums: no reply to any query; mend that, or take it out of the pool"]
    assert report.answers is not None
    assert report.answers.competence["sums"] == 0.0


def test_known_answers_count_without_entropies() -> None:
    unknown_RA, heard_RA = np.full((ROWS, 3), np.nan), np.ones((ROWS, 3), dtype=bool)
    heard_RA[:10, 2] = False
    value_RA = np.tile([1.0, 0.0, 1.0], (ROWS, 1))
    value_RA[:10, 2] = 0.0  # a reply that failed is scored as an empty one, and is none
    known = sample(unknown_RA, value_RA=value_RA, heard_RA=heard_RA)
    report = probe_pool(sample(unknown_RA, heard_RA=np.ones((ROWS, 3), dtype=bool)), known=known)
    assert [found.accuracy for found in report.agents] == [1.0, 0.0, 1.0]
    assert [found.auroc for found in report.agents] == [None] * 3
    assert report.known_rows == ROWS


def test_fewer_queries_than_answers_take_are_told() -> None:
    few = {"sources": ("sums",) * 7, "embedding_RD": np.eye(7), "texts": (("1", "2", "3"),) * 7}
    report = probe_pool(sample(specialists()[:7], **few))
    assert report.answers is None
    assert report.reasons[-1] == "7 queries are too few for what answers tell; 8 are the least"


def test_entropies_that_are_all_the_same_have_no_favourite() -> None:
    report = probe_pool(sample(np.full((ROWS, 3), np.log(0.4))))
    assert (report.row_share, report.agent_share, report.interaction_share) == (0.0, 0.0, 0.0)
    assert [found.surest for found in report.agents] == pytest.approx([1 / 3] * 3)
    assert (report.verdict, len(report.reasons)) == ("cannot", 1)
    assert "interaction is 0.0% of Var(log PE)" in report.reasons[0]


def test_empty_replies_do_not_ignore_their_input() -> None:
    report = probe_pool(sample(specialists(), texts=tuple(("", f"{row}", f"{row}") for row in range(ROWS))))
    assert (finding(report, "base").same_text, finding(report, "base").ignores_input) == (1.0, False)


def test_what_no_cluster_can_tell_is_not_said_to_route(capsys: pytest.CaptureFixture[str]) -> None:
    """Who is sure depends on the row, by as much as among specialists, and on nothing that the embedding shows."""
    rng = np.random.default_rng(3)
    log_RA = rng.normal(0, 1, (ROWS, 3))
    report = probe_pool(sample(log_RA, embedding_RD=rng.normal(0, 1, (ROWS, 2))))
    assert report.interaction_low > 0.05
    assert report.cluster_gain is not None
    assert report.cluster_gain < 0.005
    assert report.verdict == "cannot"
    print_probe(report, loads(pool_yaml(AGENTS)))
    shown = capsys.readouterr().out
    assert "entropy cannot route this pool" in shown
    assert "reach nothing of the sureness" in shown
    assert "entropy can route" not in shown


@pytest.mark.parametrize(
    ("gain", "is_nothing"), [(None, True), (-0.4, True), (0.0, True), (0.004, True), (0.006, False), (1.0, False)]
)
def test_a_gain_that_reads_as_nothing_is_none(gain: float | None, is_nothing: bool) -> None:
    assert gains_nothing(gain) is is_nothing
    assert gain is None or is_nothing is (gain < 0 or f"{gain:.0%}" == "0%")


def test_auroc_counts_ties_half() -> None:
    assert auroc(np.array([3.0, 1.0, 2.0]), np.array([True, False, False])) == 1.0
    assert auroc(np.array([1.0, 1.0, 2.0]), np.array([True, False, False])) == 0.25
    assert auroc(np.array([1.0, 2.0]), np.array([True, True])) is None


def test_clusters_rank_agents_by_sureness_and_leave_no_cluster_empty() -> None:
    points_RD = np.array([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]])
    score_RA = np.array([[0.0, 2.0, np.nan], [1.0, 3.0, np.nan], [4.0, 1.0, 2.0], [4.0, 2.0, 1.0]])
    router = fit_clusters(points_RD, score_RA, num_clusters=2, seed=0)
    assert router.rank(np.array([[0.2, 0.1], [4.9, 5.2]])).tolist() == [[0, 1, 2], [1, 2, 0]]
    assert len(fit_clusters(points_RD[[0, 0, 0]], score_RA[:3], num_clusters=3, seed=0).centres_CD) == 1


def test_each_of_many_rows_is_judged_by_clusters_of_the_others() -> None:
    """One row lies far away and has the base as its surest: only clusters that were fitted with it could choose the base."""
    rng, kind_R = np.random.default_rng(2), np.arange(121) % 2
    log_RA = np.zeros((121, 3))
    log_RA[:, 1], log_RA[:, 2] = np.where(kind_R == 0, -3.0, 1.0), np.where(kind_R == 1, -3.0, 1.0)
    log_RA[120] = (-5.0, 1.0, 1.0)
    embedding_RD = np.eye(2)[kind_R] + rng.normal(0, 0.05, (121, 2))
    embedding_RD[120] = (-9.0, -9.0)
    texts = tuple(tuple(f"{agent} says {row}" for agent in AGENTS) for row in range(121))
    report = probe_pool(sample(log_RA, embedding_RD=embedding_RD, texts=texts, sources=("mixed",) * 121))
    assert report.cluster_choices["base"] == 0.0
    assert min(report.cluster_choices["sums"], report.cluster_choices["words"]) >= 60 / 121
    assert report.cluster_gain is not None
    assert report.cluster_gain > 0.9
