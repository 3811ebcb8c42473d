"""The label model: hand-computed posteriors, a brute-force reference, recovery of competence, and agents that lie."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from dmoa.core.label_model import LabelModel, _disputed, _start, _two_kinds, fit_label_model
from dmoa.core.posterior import MAX_SHARED, ONE_WITNESS, Truth, held_open, nodes, repeated, truth_posterior, voices
from dmoa.core.sequential import standing
from dmoa.core.witnesses import NO_ANSWER, NOT_ASKED, Witnesses, answer_classes, disputes, witnesses_of
from dmoa.errors import ConfigError


def witnesses(
    answer: np.ndarray, *, doubt: np.ndarray | None = None, outcome: np.ndarray | None = None, embedding: np.ndarray | None = None
) -> Witnesses:
    unknown = np.full(answer.shape, np.nan)
    return Witnesses(
        answer_RA=answer,
        doubt_RA=unknown if doubt is None else doubt,
        length_RA=unknown,
        outcome_RA=unknown if outcome is None else outcome,
        embedding_RD=embedding,
    )


def compact(values: np.ndarray) -> np.ndarray:
    """Classes of equal values by row, numbered as they come."""
    return np.array([[list(dict.fromkeys(row)).index(value) for value in row] for row in values.tolist()])


def simulated(rng: np.random.Generator, right: np.ndarray, rows: int, values: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Answers (0 is the truth) of agents that are right independently, and whether they are right."""
    is_right = rng.random((rows, len(right))) < right
    return np.where(is_right, 0, rng.integers(1, values, is_right.shape)), is_right


def by_hand(right: list[float], copy: float = 0.1) -> LabelModel:
    """One context, no difficulty, nothing known of length and entropy."""
    agents = len(right)
    return LabelModel(
        centre_CD=np.zeros((1, 1)),
        ability_CA=np.array([[math.log(p / (1 - p)) for p in right]]),
        doubt_mean_A=np.zeros(agents),
        doubt_slope_CA=np.zeros((1, agents)),
        doubt_CA=np.zeros((1, agents)),
        length_mean_CA=np.zeros((1, agents)),
        length_sd_A=np.ones(agents),
        length_share=0.0,
        length_slope=0.0,
        copy_AA=np.full((agents, agents), copy),
        context_sd=0.5,
        spread=0.0,
        noise=0.05,
        reliance_C=np.ones(1),
    )


def test_three_agents_two_agreeing_by_hand() -> None:
    """P(a, a, b) with p = .8, .6, .7 and one tenth of joint errors shared."""
    model = by_hand([0.8, 0.6, 0.7])
    # In order of competence: agents 0, 2, 1; answers a, b, a.
    if_a = 0.8 * 0.3 * 0.6  # agent 2 wrong with an answer of its own: no wrong one is there to repeat
    if_b = 0.2 * 0.7 * 0.4 * 0.1  # agent 1 repeats what agent 0 got wrong
    if_none = 0.2 * (0.3 * 0.9) * (0.4 * 0.1)
    total = if_a + if_b + if_none
    got = model.right_probability(witnesses(np.array([[0, 0, 1]])))
    assert got[0] == pytest.approx([if_a / total, if_a / total, if_b / total])


def test_posterior_sums_to_one_and_likelihoods_of_all_patterns_sum_to_one() -> None:
    """Over every partition of four agents' answers, whichever the truth."""
    model = by_hand([0.9, 0.4, 0.6, 0.7], copy=0.3)
    patterns = {tuple(compact(np.array([values]))[0]) for values in itertools.product(range(4), repeat=4)}
    truth = model.truth(witnesses(np.array(sorted(patterns))))
    assert truth.weight_RZK.sum(axis=(1, 2)) == pytest.approx(1.0)
    assert np.exp(truth.log_likelihood_R).sum() == pytest.approx(1.0)


def test_one_witness_by_hand() -> None:
    """Two that count as one (.8 and .5: log odds 1.386 and 0, together .693, P = 2/3) against a third of .6."""
    model = by_hand([0.8, 0.5, 0.6])
    model.copy_AA[0, 1] = model.copy_AA[1, 0] = ONE_WITNESS
    pair, third = 2 / 3, 0.6
    if_pair, if_third, if_none = pair * (1 - third), (1 - pair) * third, (1 - pair) * (1 - third) * 0.9
    total = if_pair + if_third + if_none
    got = model.right_probability(witnesses(np.array([[0, 0, 1], [0, 1, NOT_ASKED]])))
    assert got[0] == pytest.approx([if_pair / total, if_pair / total, if_third / total])
    assert got[1, 0] > got[1, 1]  # where they differ they are two
    after_one = standing(model, witnesses(np.array([[0, NOT_ASKED, NOT_ASKED]])), price=0.0)
    assert after_one.worth_A[1] == -np.inf
    assert after_one.worth_A[2] > -np.inf


def test_rows_held_open_have_their_shares_and_keep_their_difficulty() -> None:
    weight = np.array([[[0.5, 0.1], [0.2, 0.1], [0.1, 0.0]], [[0.9, 0.0], [0.0, 0.1], [0.0, 0.0]]])
    got = held_open(Truth(weight, np.zeros(2)), np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])).weight_RZK
    assert got[0].tolist() == pytest.approx(np.array([[0.4, 0.1], [0.4, 0.1], [0.0, 0.0]]))
    assert got[1].tolist() == weight[1].tolist()


def test_disputes_by_hand() -> None:
    """Agents 0 and 1 are sure and agree on rows 0 to 4, against 2; 3 is not sure. Row 4 is backed by 3: four are left."""
    answer = np.array([[0, 0, 1, 2]] * 4 + [[0, 0, 1, 0]] + [[0, 1, 2, 3]] * 5)
    doubt = np.where(np.arange(10)[:, None] < 5, [-2.0, -1.5, -1.2, 0.5], [0.5, 0.5, 0.5, -2.0])
    (only,) = disputes(answer, doubt)
    assert (only.a, only.b, only.against, only.rows.tolist()) == (0, 1, 2, [0, 1, 2, 3])
    assert disputes(answer[1:], doubt[1:]) == []  # three are chance
    assert disputes(answer, np.where(np.arange(4) == 2, -0.9, doubt)) == []  # nobody sure refutes them
    assert disputes(np.where(np.arange(10)[:, None] < 1, answer, answer[[4] * 5 + [5] * 5]), doubt) == []  # others back them
    assert disputes(answer, np.full(answer.shape, np.nan)) == []


def disputed() -> tuple[Witnesses, np.ndarray]:
    """Two skills: agent 0 knows the one, as sure as agents 1 and 2 that err in concert; agent 3 knows the other."""
    rng = np.random.default_rng(0)
    home = np.repeat([0, 1], 20)
    sure = (home == 0)[:, None] == (np.arange(4) < 3)
    doubt = np.where(sure, -3.0, 0.5) + rng.normal(0, 0.3, sure.shape)
    answer = np.where((home == 0)[:, None], [0, 1, 1, 2], [0, 1, 2, 3])
    return witnesses(answer, doubt=doubt, embedding=np.eye(2)[home] + rng.normal(0, 0.1, (40, 2))), home


def test_a_dispute_is_left_open_until_outcomes_settle_it() -> None:
    given, home = disputed()
    model = fit_label_model(given, seed=0)
    right = model.right_probability(given)[home == 0]
    assert right[:, :3].mean(axis=0) == pytest.approx([0.5, 0.5, 0.5], abs=0.2)
    assert model.right_probability(given)[home == 1, 3].mean() > 0.8
    outcome = np.full(given.answer_RA.shape, np.nan)
    outcome[:5, :3] = (1.0, 0.0, 0.0)
    told = fit_label_model(replace(given, outcome_RA=outcome), seed=0)
    assert told.right_probability(given)[home == 0, 0].mean() > 0.8
    outcome[:5, :3] = (np.nan, 1.0, np.nan)  # of one of the pair alone, for it
    other = fit_label_model(replace(given, outcome_RA=outcome), seed=0)
    assert other.right_probability(given)[home == 0, 1].mean() > 0.8


def test_where_two_pairs_are_disputed_in_one_row_their_sides_share_it() -> None:
    """Three camps: agents 0 and 1, agents 2 and 3, agent 4; the pairs are refuted most often by the same one."""
    answer = np.array([[0, 0, 1, 1, 2]] * 8 + [[0, 0, 1, 2, 3]] * 4 + [[0, 1, 2, 3, 4]] * 12)
    doubt = np.where(np.arange(24)[:, None] < 12, np.full(5, -4.0), 2.0)
    doubt[6:8, :2], doubt[8:12, 2:4] = 2.0, 2.0
    given = witnesses(answer, doubt=doubt)
    _, side = _disputed(_start(given, 1, 1.5, 0), given)
    np.testing.assert_allclose(side[:6], [[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]] * 6)
    assert side[6:8].tolist() == [[0.0, 0.5, 0.5, 0, 0, 0]] * 2
    assert side[8:12].tolist() == [[0.5, 0, 0, 0.5, 0, 0]] * 4
    assert not side[12:].any()


def test_no_answer_is_wrong_and_not_asked_says_nothing() -> None:
    model = by_hand([0.8, 0.6])
    got = model.right_probability(witnesses(np.array([[0, NO_ANSWER], [0, NOT_ASKED]])))
    assert got == pytest.approx(np.array([[0.8, 0.0], [0.8, 0.6]]))


def test_competence_is_recovered_without_labels() -> None:
    right = np.linspace(0.3, 0.9, 8)
    values, is_right = simulated(np.random.default_rng(0), right, 200)
    model = fit_label_model(witnesses(compact(values)), seed=0)
    got = model.right_probability(witnesses(compact(values)))
    assert np.corrcoef(got.mean(axis=0), is_right.mean(axis=0))[0, 1] > 0.97
    assert np.abs(got.mean(axis=0) - is_right.mean(axis=0)).max() < 0.08


def test_order_of_agents_does_not_matter() -> None:
    values, _ = simulated(np.random.default_rng(1), np.array([0.9, 0.7, 0.5, 0.6]), 60)
    place = np.array([2, 0, 3, 1])
    straight = fit_label_model(witnesses(compact(values)), seed=0).right_probability(witnesses(compact(values)))
    permuted = fit_label_model(witnesses(compact(values[:, place])), seed=0).right_probability(
        witnesses(compact(values[:, place]))
    )
    assert permuted == pytest.approx(straight[:, place], abs=1e-6)


def test_two_that_err_alike_are_one_witness() -> None:
    """A pair that always says the same, and is refuted by three others that agree, gains nothing by agreeing."""
    rng = np.random.default_rng(2)
    values, _ = simulated(rng, np.array([0.8, 0.8, 0.8, 0.2]), 120)
    values = np.concatenate([values, values[:, 3:]], axis=1)
    model = fit_label_model(witnesses(compact(values)), seed=0)
    assert model.copy_AA[3, 4] > 0.8 > 0.5 > model.copy_AA[0, 1]
    got = model.right_probability(witnesses(np.array([[0, NOT_ASKED, NOT_ASKED, 1, 1]])))
    assert got[0, 0] > got[0, 3]


@pytest.mark.parametrize("liar", ["constant", "different"])
def test_a_liar_is_found(liar: str) -> None:
    values, _ = simulated(np.random.default_rng(3), np.array([0.85, 0.8, 0.75, 0.0]), 80)
    values[:, 3] = 42 if liar == "constant" else 1000
    model = fit_label_model(witnesses(compact(values)), seed=0)
    assert model.right_probability(witnesses(compact(values)))[:, 3].mean() < 0.1


def test_outcomes_decide_where_nobody_agrees() -> None:
    answer = np.tile(np.arange(3), (40, 1))
    outcome = np.full(answer.shape, np.nan)
    outcome[:20] = [1.0, 0.0, 0.0]
    without = fit_label_model(witnesses(answer), seed=0)
    with_them = fit_label_model(witnesses(answer, outcome=outcome), seed=0)
    assert without.order.tolist() == [0, 1, 2]
    assert np.ptp(without.ability_CA) == pytest.approx(0, abs=0.5)
    assert with_them.ability_CA[0, 0] - with_them.ability_CA[0, 1] > 1.5


def test_outcomes_refute_a_crowd_that_errs_alike() -> None:
    """Four of five agents copy one another's errors; 20 judged queries show that the lone one is right."""
    rng = np.random.default_rng(5)
    lone = np.where(rng.random(80) < 0.8, 0, rng.integers(1, 50, 80))
    crowd = np.where(rng.random(80) < 0.2, 0, rng.integers(50, 99, 80))
    values = np.column_stack([lone, crowd, crowd, crowd, crowd])
    outcome = np.full(values.shape, np.nan)
    outcome[:20] = values[:20] == 0
    misled = fit_label_model(witnesses(compact(values)), seed=0)
    told = fit_label_model(witnesses(compact(values), outcome=outcome), seed=0)
    flip = np.where(rng.random(outcome.shape) < 0.2, 1 - outcome, outcome)
    mostly = fit_label_model(witnesses(compact(values), outcome=flip), seed=0)
    assert misled.order[0] != 0
    assert told.order[0] == mostly.order[0] == 0
    assert told.reliance_C[0] < 0.5
    assert told.trust[0].signal == "outcomes"
    got = told.right_probability(witnesses(np.array([[0, 1, 1, 1, 1]])))
    assert got[0, 0] > got[0, 1]


@pytest.mark.parametrize("flipped", [0.0, 0.25])
def test_the_share_of_wrong_outcomes_is_estimated(flipped: float) -> None:
    """Where agents agree, outcomes that contradict one another tell how many of them are wrong."""
    rng = np.random.default_rng(9)
    values, is_right = simulated(rng, np.array([0.9, 0.8, 0.7, 0.6]), 60)
    outcome = np.where(rng.random(is_right.shape) < flipped, ~is_right, is_right).astype(float)
    model = fit_label_model(witnesses(compact(values), outcome=outcome), seed=0)
    assert model.noise == pytest.approx(flipped, abs=0.07)


@pytest.mark.contract
@pytest.mark.parametrize("crowd", [False, True])
def test_outcomes_help_and_never_harm_much(crowd: bool) -> None:
    """Log score of the posterior on new queries, over four pools: agreement that is right, and a crowd that errs alike."""
    scores = {0: 0.0, 20: 0.0, 60: 0.0, -20: 0.0}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        values, is_right = simulated(rng, np.array([0.75, 0.7, 0.35, 0.35, 0.35] if crowd else [0.85, 0.75, 0.65, 0.6, 0.5]), 160)
        if crowd:
            wrong = rng.integers(1, 50, 160)
            values[:, 2:] = np.where(is_right[:, 2:], 0, wrong[:, None])
        answer, new = compact(values), slice(80, 160)
        for count in scores:
            outcome = np.full((80, 5), np.nan)
            told = is_right[: abs(count)]
            outcome[: abs(count)] = np.where(rng.random(told.shape) < 0.2, ~told, told) if count < 0 else told
            model = fit_label_model(witnesses(answer[:80], outcome=outcome), seed=seed)
            right = np.clip(model.right_probability(witnesses(answer[new])), 0.01, 0.99)
            scores[count] += float(np.where(is_right[new], np.log(right), np.log1p(-right)).mean()) / 4
    assert scores[60] > scores[20] > scores[0]
    assert scores[-20] > scores[0] + (0.1 if crowd else -0.005)  # of which a fifth is wrong


def test_entropy_decides_where_one_agent_alone_is_competent() -> None:
    """Two skills, one agent each, and a third that is sure of nothing: nobody agrees, and each is sure at home alone."""
    rng = np.random.default_rng(6)
    home = np.repeat([0, 1], 40)
    doubt = np.where(np.arange(3) == home[:, None], -5.0, -0.5) + rng.normal(0, 0.3, (80, 3))
    embedding = np.eye(2)[home] + rng.normal(0, 0.1, (80, 2))
    given = witnesses(np.tile(np.arange(3), (80, 1)), doubt=doubt, embedding=embedding)
    model = fit_label_model(given, seed=0)
    assert (model.right_probability(given).argmax(axis=1) == home).all()
    assert {trust.signal for trust in model.trust} == {"entropy"}
    before = Witnesses(
        answer_RA=np.full((1, 3), NOT_ASKED),
        doubt_RA=np.full((1, 3), np.nan),
        length_RA=np.full((1, 3), np.nan),
        outcome_RA=np.full((1, 3), np.nan),
        embedding_RD=np.array([[0.0, 1.0]]),
    )
    assert standing(model, before).next_agent == 1


def specialists(rng: np.random.Generator) -> tuple[Witnesses, np.ndarray]:
    """Six skills with one agent each, of which agent 0 guesses some answers of agent 1's queries; and each row's skill."""
    home = np.repeat(np.arange(6), 10)
    at_home = np.arange(6) == home[:, None]
    doubt = np.where(at_home, -3.0, 0.7) + rng.normal(0, 0.7, at_home.shape)
    values = np.where(at_home, 0, rng.integers(1, 10_000, at_home.shape))
    lucky = (home == 1) & (rng.random(len(home)) < 0.4)
    values[lucky, 0] = 0
    doubt[lucky, 0] = rng.normal(2.0, 0.3, lucky.sum())
    doubt[(home == 2) | (home == 3), 0] -= 1.5
    embedding = np.eye(6)[home] + rng.normal(0, 0.1, at_home.shape)
    return witnesses(compact(values), doubt=doubt, embedding=embedding), home


@pytest.mark.parametrize("seed", range(3))
def test_a_lucky_guess_does_not_discredit_being_sure(seed: int) -> None:
    """Agreement is luck here: what it says of doubt (right without being sure) is not taken to where nobody agrees."""
    given, home = specialists(np.random.default_rng(seed))
    model = fit_label_model(given, seed=0)
    right = model.right_probability(given)
    assert right[np.arange(len(home)), home] == pytest.approx(right.max(axis=1))
    assert right[home == 0, 0].mean() > 0.2
    assert "entropy" in {trust.signal for trust in model.trust}


def test_doubts_of_two_kinds_by_hand() -> None:
    """Right replies at -3, wrong ones at 1, spread 0.5 each: the middle lies between, and what is far off moves it little."""
    rng = np.random.default_rng(0)
    right = np.repeat([1.0, 0.0], [300, 700])[:, None]
    doubt = np.where(right > 0, -3.0, 1.0) + rng.normal(0, 0.5, right.shape)
    slope, middle = _two_kinds(doubt, right, np.ones(right.shape))
    assert slope[0] == 2.0  # 4 nats / 0.25, limited
    assert middle[0] == pytest.approx(-1.0, abs=0.1)
    doubt[:30] = 4.0  # a tenth of the right ones
    _, moved = _two_kinds(doubt, right, np.ones(right.shape))
    assert moved[0] == pytest.approx(middle[0], abs=0.15)


def test_where_agents_agree_their_doubts_are_worth_what_agreement_says() -> None:
    """One sure agent is wrong wherever three unsure ones agree: its doubts tell nothing, and it is not believed."""
    rng = np.random.default_rng(0)
    values, _ = simulated(rng, np.array([0.9, 0.85, 0.85, 0.0]), 60)
    doubt = np.column_stack([rng.normal(0, 0.5, (60, 3)), rng.normal(-4, 0.5, 60)])
    given = witnesses(compact(values), doubt=doubt)
    model = fit_label_model(given, seed=0)
    assert model.trust[0].signal == "agreement"
    assert model.right_probability(given)[:, 3].mean() < 0.05


def test_fitted_competences_are_a_maximum_of_the_enumerated_likelihood() -> None:
    """Of the likelihood that sums over every truth and difficulty, and the prior; two replies may err alike."""
    values, _ = simulated(np.random.default_rng(11), np.array([0.85, 0.7, 0.5]), 40, values=6)
    given = witnesses(compact(values))
    model = fit_label_model(given, seed=0)
    ability_A = model.ability_CA[0]

    def objective(ability: np.ndarray) -> float:
        rows = sum(math.log(enumerated(model, ability, row)) for row in given.answer_RA.tolist())
        return rows - float((ability**2).sum()) / (2 * 1.5**2)

    best = objective(ability_A)
    assert best == pytest.approx(model.truth(given).log_likelihood_R.sum() - (ability_A**2).sum() / 4.5)
    for agent in range(3):
        for step in (-0.3, 0.3):
            assert objective(ability_A + step * (np.arange(3) == agent)) < best


def enumerated(model: LabelModel, ability: np.ndarray, answers: list[int]) -> float:
    """Probability of the answers of one query: a sum over difficulties and truths, agent after agent."""
    total = 0.0
    order = np.argsort(-model.ability_CA[0], kind="stable").tolist()
    for value, weight in zip(*nodes(model.spread), strict=True):
        for truth in (*sorted(set(answers)), None):
            chance = float(weight)
            for place, agent in enumerate(order):
                right = 1 / (1 + math.exp(value - ability[agent]))
                if answers[agent] == truth:
                    chance *= right
                    continue
                shared: dict[int, float] = {}
                for other in order[:place]:
                    if answers[other] != truth:
                        shared[answers[other]] = max(shared.get(answers[other], 0.0), float(model.copy_AA[agent, other]))
                scale = MAX_SHARED / max(sum(shared.values()), MAX_SHARED)
                own = 1 - sum(shared.values()) * scale
                chance *= (1 - right) * (shared[answers[agent]] * scale if answers[agent] in shared else own)
            total += chance
    return total


def test_long_replies_tell_hard_queries() -> None:
    """Length is learnt from agreement: where replies are long, agents differ."""
    rng = np.random.default_rng(7)
    hard = rng.random(120)
    values = np.where(rng.random((120, 4)) < (1 - 0.8 * hard)[:, None], 0, rng.integers(1, 50, (120, 4)))
    given = witnesses(compact(values))
    length = np.exp(5 + hard[:, None] + rng.normal(0, 0.1, (120, 4)))
    given = Witnesses(answer_RA=given.answer_RA, doubt_RA=given.doubt_RA, length_RA=length, outcome_RA=given.outcome_RA)
    model = fit_label_model(given, seed=0)
    assert model.length_slope > 0.5
    first = given.only(np.arange(4) == np.zeros((120, 1)))
    p = model.right_probability(first)[:, 0]
    assert p[hard < 0.2].mean() > p[hard > 0.8].mean() + 0.3


def test_one_context_of_a_model_judges_as_the_whole_does() -> None:
    rng = np.random.default_rng(8)
    values, _ = simulated(rng, np.array([0.9, 0.7, 0.5]), 64)
    embedding = rng.normal(size=(64, 2))
    given = witnesses(compact(values), doubt=rng.normal(size=(64, 3)), embedding=embedding)
    model = fit_label_model(given, seed=0)
    context = model.context(embedding[:1], 1)[0]
    alone = Witnesses(
        answer_RA=given.answer_RA[:1], doubt_RA=given.doubt_RA[:1], length_RA=given.length_RA[:1], outcome_RA=given.outcome_RA[:1]
    )
    part = model.in_context(int(context))
    assert part.right_probability(alone) == pytest.approx(model.right_probability(given.rows(slice(0, 1))), abs=0.02)
    assert part.trust == (model.trust[context],)


def test_arrays_and_numbers_give_the_model_back() -> None:
    values, _ = simulated(np.random.default_rng(4), np.array([0.9, 0.6, 0.5]), 40)
    model = fit_label_model(witnesses(compact(values)), seed=0)
    again = LabelModel.from_arrays(model.arrays(), model.numbers())
    assert np.array_equal(again.ability_CA, model.ability_CA)
    assert again.trust == model.trust
    assert again.spread == model.spread
    with pytest.raises(ConfigError, match="copy_AA"):
        LabelModel.from_arrays({k: v for k, v in model.arrays().items() if k != "copy_AA"}, model.numbers())


def test_worth_of_one_more_reply_against_enumeration() -> None:
    """One step ahead, by summing the posterior of every pattern that the next reply can make."""
    model = by_hand([0.8, 0.7, 0.75], copy=0.2)
    now = witnesses(np.array([[0, NOT_ASKED, NOT_ASKED]]))
    got = standing(model, now, price=0.02)
    assert got.leader == 0
    assert got.probability == pytest.approx(0.8)
    # Both may be asked: after 0 and 1 agree, or not, agent 2 can break the tie.
    value = 0.0
    for pattern in ((0, 0), (0, 1)):
        joint = np.exp(model.truth(witnesses(np.array([[*pattern, NOT_ASKED]]))).log_likelihood_R[0])
        stop = model.right_probability(witnesses(np.array([[*pattern, NOT_ASKED]])))[0, :2].max()
        thirds = [(*pattern, third) for third in range(max(pattern) + 2)]
        rows = witnesses(np.array(thirds))
        weights = np.exp(model.truth(rows).log_likelihood_R)
        go_on = (weights * model.right_probability(rows).max(axis=1)).sum() / weights.sum() - 0.02
        value += joint * max(stop, go_on)
    assert got.worth_A[1] == pytest.approx(value - 0.8 - 0.02, abs=0.01)


def test_the_stop_rule_against_exact_dynamic_programming() -> None:
    """Four agents, all plans enumerated: what two replies of foresight lose is little, and nothing on most pools."""
    losses, gains = [], []
    start = (NOT_ASKED,) * 4
    for seed in range(6):
        right = np.random.default_rng(seed).uniform(0.6, 0.9, 4)
        model = replace(by_hand(right.tolist(), copy=0.1), spread=1.5 * (seed % 2))
        exact = planned(model, start, 0.02, {})
        losses.append(exact - planned(model, start, 0.02, {}, follow=True))
        gains.append(exact - (float(model.right_probability(witnesses(np.array([start]))).max()) - 0.02))
    assert max(gains) > 0.03  # there is something to lose
    assert min(losses) > -1e-9
    assert np.mean(losses) < 0.005
    assert np.median(losses) < 1e-6


def planned(
    model: LabelModel, said: tuple[int, ...], price: float, known: dict[tuple[int, ...], float], *, follow: bool = False
) -> float:
    """Value of a state, net of price: of the best plan there is, or of following `standing`."""
    if said in known:
        return known[said]
    given = [agent for agent, value in enumerate(said) if value >= 0]
    stop = float(model.right_probability(witnesses(np.array([said])))[0, given].max()) if given else 0.0
    chosen = [agent for agent, value in enumerate(said) if value == NOT_ASKED]
    if follow:
        found = standing(model, witnesses(np.array([said])), price=price).next_agent
        chosen = [] if found is None else [found]
    values = [] if follow and chosen else [stop]
    for agent in chosen:
        after = [(*said[:agent], value, *said[agent + 1 :]) for value in range(max(max(said), -1) + 2)]
        chance = np.exp(model.truth(witnesses(np.array(after))).log_likelihood_R)
        then = [planned(model, state, price, known, follow=follow) for state in after]
        values.append(float(chance @ then / chance.sum()) - price)
    known[said] = max(values)
    return known[said]


def test_a_sure_leader_stops_and_unavailable_agents_are_not_asked() -> None:
    model = by_hand([0.97, 0.6, 0.6])
    assert standing(model, witnesses(np.array([[0, NOT_ASKED, NOT_ASKED]]))).next_agent is None
    first = standing(model, witnesses(np.full((1, 3), NOT_ASKED)))
    assert (first.leader, first.next_agent) == (None, 0)
    without = standing(model, witnesses(np.full((1, 3), NOT_ASKED)), available_A=np.array([False, True, True]))
    assert without.next_agent == 1


def test_leader_is_the_most_trusted_of_those_that_agree() -> None:
    got = standing(by_hand([0.6, 0.7, 0.8]), witnesses(np.array([[0, 0, 1]])))
    assert got.leader == 1


def test_classes_follow_the_one_reader_of_answers() -> None:
    assert answer_classes(["The answer is 7.", "#### 7.0", None, "The answer is 8.", ""]) == [0, 0, NOT_ASKED, 1, NO_ANSWER]
    made = witnesses_of([["7", None, "8"]], entropies=[[0.1, None, 0.2]])
    assert made.answer_RA.tolist() == [[0, NOT_ASKED, 1]]
    assert np.isnan(made.doubt_RA[0, 1])
    assert made.length_RA[0, 0] == 1


def test_bad_witnesses_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="outcome_RA holds 2"):
        witnesses(np.zeros((1, 2), np.int64), outcome=np.full((1, 2), 2.0))
    with pytest.raises(ConfigError, match="outside -2 to 1"):
        witnesses(np.full((1, 2), 5))
    with pytest.raises(ConfigError, match="expected at least"):
        fit_label_model(witnesses(np.zeros((2, 2), np.int64)), seed=0)


def test_a_lone_truth_posterior_without_answers_is_none_of_them() -> None:
    found = truth_posterior(
        np.array([[NOT_ASKED]]), np.full((1, 1, 1), 0.7), np.ones((1, 1)), np.ones(1), np.zeros((1, 2)), np.array([0])
    )
    assert found.weight_RZK[0, :, 0].tolist() == [0.0, 1.0]


def colluding(rng: np.random.Generator, right: list[float], colluders: int, rows: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Answers of honest agents, right independently, and of agents that always say the same wrong one; which are right."""
    honest, is_right = simulated(rng, np.array(right), rows)
    lie = np.repeat(rng.integers(100, 200, (rows, 1)), colluders, axis=1)
    return compact(np.hstack([honest, lie])), np.hstack([is_right, np.zeros((rows, colluders), dtype=bool)])


@pytest.mark.parametrize("right", [[0.8, 0.8, 0.7], [0.5, 0.4, 0.4], [0.3, 0.25, 0.2]])
@pytest.mark.parametrize("colluders", [2, 3, 4])
def test_agents_of_one_voice_that_nobody_backs_are_not_believed(right: list[float], colluders: int) -> None:
    answers, is_right = colluding(np.random.default_rng(5), right, colluders)
    (voice,) = voices(answers)
    assert voice.members.tolist() == list(range(3, 3 + colluders))
    assert voice.across == 0 < voice.among
    model = fit_label_model(witnesses(answers), seed=0)
    assert model.competence()[0, :3].min() > model.competence()[0, 3:].max()
    leaders = [standing(model, witnesses(answers).rows(slice(row, row + 1))).leader for row in range(len(answers))]
    assert is_right[np.arange(len(answers)), leaders].mean() > 0.75 * is_right.mean(axis=0).max()


def test_voices_by_hand() -> None:
    """Two that always agree; of the two others each says the same on 3 of 10 rows, with each other on 0 to 6."""
    pair = np.zeros((10, 2), dtype=np.int64)
    apart = np.array([[1, 2]] * 4 + [[0, 2]] * 3 + [[1, 0]] * 3)
    (voice,) = voices(np.hstack([pair, apart]))
    assert (voice.members.tolist(), voice.among, voice.across) == ([0, 1], 0, pytest.approx(0.3))
    close = np.array([[1, 1]] * 6 + [[0, 2]] * 2 + [[1, 0]] * 2)
    (voice,) = voices(np.hstack([pair, close]))
    assert (voice.among, voice.across) == (pytest.approx(0.6), pytest.approx(0.2))
    assert voices(np.hstack([pair, close])[:7]) == []  # too few queries
    assert voices(np.hstack([pair, np.full((10, 2), NO_ANSWER)]))[0][1:] == (0, 0)  # nobody there who could back them
    assert voices(close) == []
    assert voices(pair) == []  # no others
    both = voices(np.hstack([pair, np.ones((10, 2), dtype=np.int64)]))
    assert [(voice.members.tolist(), voice.among, voice.across) for voice in both] == [([0, 1], 1, 0), ([2, 3], 1, 0)]


def test_what_others_say_where_a_voice_is_silent_tells_nothing_of_it() -> None:
    """By hand: two that answer ten queries alike, beside two that differ there but for two, and agree on ten others."""
    heard = np.array([[0, 0, 1, 2]] * 8 + [[0, 0, 0, 1]] * 2)
    (voice,) = voices(heard)
    assert (voice.among, voice.across) == (0, pytest.approx(0.1))
    (voice,) = voices(np.vstack([heard, [[NO_ANSWER, NO_ANSWER, 0, 0]] * 10]))
    assert (voice.among, voice.across) == (0.5, pytest.approx(0.1))


def test_how_often_copies_repeat_each_other_by_hand() -> None:
    """The second says the same as the first on 7 of 9 rows that both answer; the third is nobody's copy."""
    answers = np.array([[0, 0, 1]] * 7 + [[0, 1, 1]] * 2 + [[0, NO_ANSWER, 0], [NO_ANSWER, 0, 0]])
    one = np.where(np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]]), ONE_WITNESS, 0.2)
    assert repeated(answers, one) == pytest.approx(7 * math.log(8 / 11) + 2 * math.log(3 / 11))
    assert repeated(answers, np.full((3, 3), 0.2)) == 0


def test_good_agents_that_agree_nearly_always_are_believed_against_weak_ones() -> None:
    rng = np.random.default_rng(2)
    answers, _ = simulated(rng, np.array([0.98, 0.98, 0.97, 0.3, 0.3, 0.2]), 100)
    model = fit_label_model(witnesses(compact(answers)), seed=0)
    assert set(model.order[:3].tolist()) == {0, 1, 2}
    assert model.copy_AA.max() < ONE_WITNESS


@pytest.mark.parametrize(("right", "share"), [([0.8, 0.7], 0.45), ([0.75, 0.85, 0.7], 0.55), ([0.7, 0.7, 0.8, 0.75], 0.5)])
@pytest.mark.parametrize("count", [2, 3])
def test_copies_are_not_believed_against_independent_agents(right: list[float], share: float, count: int) -> None:
    rng = np.random.default_rng(3)
    values, _ = simulated(rng, np.array([*right, share]), 300)
    values = np.hstack([values[:, :-1], np.repeat(values[:, -1:], count, axis=1)])
    given = witnesses(compact(values))
    model = fit_label_model(given, seed=0)
    estimated = model.right_probability(given).mean(axis=0)
    assert np.abs(estimated - (values == 0).mean(axis=0)).max() < 0.2
    assert estimated[: len(right)].min() > estimated[len(right) :].max()
    leaders = [standing(model, given.rows(slice(row, row + 1))).leader for row in range(len(values))]
    assert (values[np.arange(len(values)), leaders] == 0).mean() > max(right) - 0.03


@pytest.mark.parametrize("options", [4, 50])
@pytest.mark.parametrize("seed", range(4))
def test_strong_agents_that_agree_because_they_are_right_are_no_copies(options: int, seed: int) -> None:
    """Beside independent ones, weaker ones, and weak ones of which half of the wrong answers are the same."""
    rng = np.random.default_rng(seed)
    values, _ = simulated(rng, np.array([0.97, 0.96, 0.95, *rng.uniform(0.3, 0.9, 3)]), 200, options)
    alike = np.where((values != 0) & (rng.random(values.shape) < 0.5), rng.integers(1, options, (200, 1)), values)
    for answers in (compact(values), compact(alike)):
        model = fit_label_model(witnesses(answers), seed=0)
        assert model.copy_AA.max() < ONE_WITNESS
        assert set(model.order[:3].tolist()) == {0, 1, 2}
