"""Outcomes of new contexts: competences against a general optimiser, what stays, and what the ranking becomes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize

from dmoa.config import GateConfig
from dmoa.core.gate import Gate, GateSpec, init_gate
from dmoa.core.inference import Decider
from dmoa.core.label_model import LabelModel
from dmoa.core.told import _CARRIED, _OWN_SD, _TOGETHER_SD, OutcomeTable
from dmoa.core.witnesses import Witnesses
from dmoa.types import RouteRequest

A, D = 3, 8
HOME_D, AWAY_D = np.eye(D)[0], np.eye(D)[1]
RNG = np.random.default_rng(3)
HOME_RD = HOME_D + 0.05 * RNG.normal(size=(20, D))


def fitted(ability: tuple[float, ...] = (1.5, 1.0, 0.5), spread: float = 1.0) -> LabelModel:
    """One known context; nothing is known of entropies and lengths."""
    zero = np.zeros((1, A))
    return LabelModel(
        centre_CD=HOME_D[None],
        ability_CA=np.array([ability]),
        doubt_mean_A=np.zeros(A),
        doubt_CA=zero,
        doubt_slope_CA=zero,
        length_mean_CA=zero,
        length_sd_A=np.ones(A),
        length_share=0.0,
        length_slope=0.0,
        copy_AA=np.full((A, A), 0.2),
        context_sd=0.5,
        spread=spread,
        noise=0.05,
        reliance_C=np.ones(1),
    )


def query(answers: tuple[int, ...], outcomes: tuple[float, ...] | None, at_D: np.ndarray) -> Witnesses:
    unknown = np.full((1, A), np.nan)
    return Witnesses(
        answer_RA=np.array([answers]),
        doubt_RA=unknown,
        length_RA=unknown,
        outcome_RA=unknown if outcomes is None else np.array([outcomes]),
        embedding_RD=(at_D + 0.02 * RNG.normal(size=D))[None],
    )


JUDGED = [
    ((0, 1, 1), (0.0, 1.0, 1.0)),
    ((0, 1, 2), (0.0, np.nan, np.nan)),
    ((0, 1, 0), (0.0, 1.0, 0.0)),
    ((0, 0, 1), (1.0, 1.0, 0)),
]


def test_competences_of_a_new_context_are_the_most_probable_ones() -> None:
    """A general optimiser over the log posterior, from elsewhere, finds the same."""
    table, model = OutcomeTable(fitted(), HOME_RD), fitted()
    rows = [query(*one, AWAY_D) for one in JUDGED]
    assert all(table.hear(row) for row in rows)
    whole = Witnesses(
        **{
            name: np.concatenate([getattr(row, name) for row in rows])
            for name in ("answer_RA", "doubt_RA", "length_RA", "outcome_RA")
        }
    )

    mean, apart_A = model.ability_CA.mean(), model.ability_CA[0] - model.ability_CA.mean()

    def ability(at: np.ndarray) -> np.ndarray:
        return at[0] + at[1] * apart_A + at[2:]

    def against(at: np.ndarray) -> float:
        moved = dataclasses.replace(model, centre_CD=np.zeros((1, 0)), ability_CA=ability(at)[None])
        off = (at[0] - mean) ** 2 / _TOGETHER_SD**2 + (at[1] - _CARRIED[0]) ** 2 / _CARRIED[1] ** 2
        return float(off + (at[2:] ** 2).sum() / _OWN_SD**2) / 2 - moved.truth(whole).log_likelihood_R.sum()

    best = minimize(against, np.array([mean, 0.5, *np.zeros(A)]))
    found = table.model().ability_CA[1]
    assert found == pytest.approx(ability(best.x), abs=0.02)
    assert found[1] > found[0]  # the one that was right at the judged queries, though it was behind elsewhere


def test_what_the_model_knows_stays_as_it_is() -> None:
    table, model = OutcomeTable(fitted(), HOME_RD), fitted()
    assert not table.hear(query((0, 1, 1), (0.0, 1.0, 1.0), HOME_D))  # a query like those that it was fitted on
    assert table.hear(query((0, 1, 1), None, AWAY_D))  # a new one that nobody judged
    assert (table.judged, table.model()) == (0, table.model())
    assert len(table.model().ability_CA) == 1
    table.hear(query((0, 1, 1), (0.0, 1.0, 1.0), AWAY_D))
    told = table.model()
    assert told.ability_CA[0].tolist() == model.ability_CA[0].tolist()
    assert told.lead_C.tolist() == pytest.approx([0.0, 1 / 11])
    assert told.context(np.stack([HOME_D, AWAY_D]), 2).tolist() == [0, 1]


def test_few_outcomes_move_less_than_many() -> None:
    moved = []
    for count in (1, 4, 40):
        table = OutcomeTable(fitted(), HOME_RD)
        for _ in range(count):
            table.hear(query((0, 1, 2), (0.0, 1.0, 0.0), AWAY_D))
        ability_A = table.model().ability_CA[1]
        moved.append(ability_A[1] - ability_A[0])
    assert -0.5 < moved[0] < moved[1] < moved[2]
    assert moved[0] < 0.5 < moved[2]


def test_two_new_domains_are_two_contexts() -> None:
    table = OutcomeTable(fitted(), HOME_RD)
    for at, right in ((np.eye(D)[1], 1), (np.eye(D)[2], 2)):
        for _ in range(6):
            table.hear(query((0, 1, 2), tuple(float(agent == right) for agent in range(A)), at))
    told = table.model()
    assert [int(ability_A.argmax()) for ability_A in told.ability_CA[1:]] == [1, 2]


def led_gate(model: LabelModel) -> Gate:
    config = GateConfig.model_validate({"preset": "paper", "core": "linear", "score": "posterior"})
    spec = dataclasses.replace(GateSpec.from_config(config, ("a", "b", "c")), embedding_dim=D)
    start = init_gate(spec, seed=0)
    gate = Gate(spec, label_model=model)
    gate.load_state_dict({name: 0 * tensor for name, tensor in start.state_dict().items()})
    return gate


def test_competences_rank_where_outcomes_lead_and_nowhere_else() -> None:
    """The gate's logits are all 0: probabilities are those of lead times competence."""
    table = OutcomeTable(fitted(), HOME_RD)
    for _ in range(30):
        table.hear(query((0, 1, 2), (0.0, 0.0, 1.0), AWAY_D))
    told = table.model()
    kept = LabelModel.from_arrays(told.arrays(), told.numbers())
    assert kept.digest() == told.digest()
    home, away = Decider(led_gate(kept), "v").decide([RouteRequest(input_X=np.float32(at_D)) for at_D in (HOME_D, AWAY_D)])
    assert home.probability_A == pytest.approx(np.full(A, 1 / 3))
    expected_A = np.exp(told.lead_C[1] * told.competence()[1])
    assert away.probability_A == pytest.approx(expected_A / expected_A.sum(), abs=1e-5)
    assert (away.ranking[0], told.lead_C[1]) == (2, 0.75)


def test_a_model_of_before_has_no_context_that_leads() -> None:
    arrays = fitted().arrays()
    assert "lead_C" not in arrays
    assert LabelModel.from_arrays(arrays, fitted().numbers()).lead_C.tolist() == [0.0]
