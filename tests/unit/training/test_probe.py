"""The probe's numbers against layouts made by hand, and its verdicts on pools that deserve them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dmoa.cli.train import print_probe
from dmoa.config import loads
from dmoa.core.scores import SCORE_OFFSET_NATS
from dmoa.errors import ConfigError
from dmoa.testing import scripted_pool_yaml as pool_yaml
from dmoa.training.cluster_router import Floats, ProbeSample, fit_clusters
from dmoa.training.probe import ProbeReport, auroc, gains_nothing, probe_pool, variance_shares

RNG = np.random.default_rng(5)
AGENTS = ("base", "sums", "words")
ROWS = 40
DOMAIN_R = np.arange(ROWS) % 2
"""0: sums, 1: words."""


def sample(log_RA: Floats, **changes: Any) -> ProbeSample:
    """A sample whose log(PE + offset) is `log_RA`, with two clouds of embeddings."""
    values: dict[str, Any] = {
        "agents": AGENTS,
        "sources": tuple("words" if domain else "sums" for domain in DOMAIN_R),
        "embedding_RD": np.eye(2)[DOMAIN_R] + RNG.normal(0, 0.05, (ROWS, 2)),
        "entropy_RA": np.exp(log_RA) - SCORE_OFFSET_NATS,
        "texts": tuple(tuple(f"{agent} says {row}" for agent in AGENTS) for row in range(ROWS)),
    }
    return ProbeSample(**values | changes)


def specialists() -> Floats:
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
