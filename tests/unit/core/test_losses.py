"""Ranking losses against slow float64 loops, hand-computed numbers, their optimum, and their invariances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmoa.core.losses import Loss, LossSums, Targets, rank_weights, ranking_loss
from dmoa.errors import ConfigError

LOSSES: tuple[Loss, ...] = ("soft", "hard", "hinge", "listnet")
T, ETA = 0.3, 0.7


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def sample(num_steps: int = 6, num_agents: int = 5, seed: int = 0, missing: float = 0.25) -> tuple[Tensor, Targets]:
    """Logits and targets with missing agents, ties and close pairs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(num_steps, num_agents, generator=generator, dtype=torch.float64)

    score = (uniform() * 8).round() / 2  # a grid: some pairs tie
    ran = uniform() >= missing
    logits = torch.randn(num_steps, num_agents, generator=generator, dtype=torch.float64)
    targets = Targets(score.masked_fill(~ran, math.nan), ran, uniform() + 0.1, uniform() * 0.3)
    return logits, targets


def plain(scores: list[list[float]], **changes: Tensor) -> Targets:
    """Targets of agents that all ran, with full weight and no noise."""
    score = torch.tensor(scores, dtype=torch.float64)
    return Targets(score, torch.ones_like(score, dtype=torch.bool), torch.ones_like(score), torch.zeros_like(score))._replace(
        **changes
    )


def value(sums: LossSums) -> float:
    return float(sums.total / sums.weight)


def slow_rank_weight(score: list[float], a: int, b: int) -> float:
    """Mean over all orders of the tied agents of |1/log2(1 + r_a) - 1/log2(1 + r_b)|, by writing out all orders."""
    orders = [
        order
        for order in itertools.permutations(range(len(score)))
        if all(score[i] <= score[j] for i, j in itertools.pairwise(order))
    ]
    gaps = [abs(1 / math.log2(2 + order.index(a)) - 1 / math.log2(2 + order.index(b))) for order in orders]
    return sum(gaps) / len(gaps)


def slow_step(loss: Loss, z: list[float], s: list[float], w: list[float], noise: list[float]) -> tuple[float, float]:
    """One step over the agents that ran, in plain Python."""
    num = len(z)
    if loss == "listnet":
        if num < 2:
            return 0.0, 0.0
        wanted, sizes = [math.exp(-x / ETA) for x in s], [math.exp(x / T) for x in z]
        term = -sum(p / sum(wanted) * math.log(q / sum(sizes)) for p, q in zip(wanted, sizes, strict=True))
        products = [w[a] * w[b] for a in range(num) for b in range(a)]
        weight = sum(products) / len(products)
        return weight * term, weight
    total = weights = 0.0
    for a, b in itertools.combinations(range(num), 2):
        if s[a] > s[b]:
            a, b = b, a
        gap, margin, delta = s[b] - s[a], z[a] - z[b], math.sqrt(noise[a] + noise[b])
        weight = w[a] * w[b]
        if loss == "soft":
            q, p = 1 / (1 + math.exp(-gap / ETA)), 1 / (1 + math.exp(-margin / T))
            term = -q * math.log(p) - (1 - q) * math.log(1 - p)
            weight *= slow_rank_weight(s, a, b) * (0.5 if gap < delta else 1.0)
        elif gap <= delta:
            continue
        else:
            term = math.log(1 + math.exp(-margin)) if loss == "hard" else max(0.0, 1 - margin / T)
        total, weights = total + weight * term, weights + weight
    return total, weights


def slow(loss: Loss, logits: Tensor, targets: Targets) -> tuple[float, float]:
    total = weight = 0.0
    for z, s, ran, w, noise in zip(logits, *targets, strict=True):
        part = slow_step(loss, *(x[ran].tolist() for x in (z, s, w, noise)))
        total, weight = total + part[0], weight + part[1]
    return total, weight


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_a_slow_loop(loss: Loss, seed: int) -> None:
    logits, targets = sample(seed=seed)
    found = ranking_loss(loss, logits, targets, temperature=T, eta=ETA)
    assert (float(found.total), float(found.weight)) == pytest.approx(slow(loss, logits, targets), rel=1e-10)
    assert float(found.weight) > 0


def test_soft_by_hand() -> None:
    """Two agents, gap 2, eta 2, margin 0.1, T 0.1: q = p = sigmoid(1); the weight is 1 - 1/log2(3)."""
    p = 1 / (1 + math.exp(-1))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    logits = torch.tensor([[0.1, 0.0]], dtype=torch.float64)
    found = ranking_loss("soft", logits, plain([[-1.0, 1.0]]), temperature=0.1, eta=2.0)
    assert float(found.weight) == pytest.approx(1 - 1 / math.log2(3))
    assert value(found) == pytest.approx(entropy)
    half = plain([[-1.0, 1.0]], noise_NA=torch.tensor([[2.5, 2.5]], dtype=torch.float64))
    close = ranking_loss("soft", logits, half, temperature=0.1, eta=2.0)
    assert float(close.weight) == pytest.approx((1 - 1 / math.log2(3)) / 2)
    assert value(close) == pytest.approx(entropy)


def test_others_by_hand() -> None:
    """Scores 0, 1, 3 and logits 0, 1, 0: the second should stand below the first and above the third."""
    logits, targets = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), plain([[0.0, 1.0, 3.0]])
    hard = ranking_loss("hard", logits, targets, temperature=0.5, eta=1.0)
    assert float(hard.weight) == 3.0
    assert float(hard.total) == pytest.approx(math.log(1 + math.e) + math.log(2) + math.log(1 + 1 / math.e))
    hinge = ranking_loss("hinge", logits, targets, temperature=0.5, eta=1.0)
    assert (float(hinge.total), float(hinge.weight)) == (3.0 + 1.0 + 0.0, 3.0)
    noise = torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64)
    # |0 - 1| is within sqrt(1 + 0), |0 - 3| and |1 - 3| are not within sqrt(1 + 3) and sqrt(0 + 3).
    noisy = ranking_loss("hard", logits, targets._replace(noise_NA=noise), temperature=0.5, eta=1.0)
    assert float(noisy.weight) == 2.0


def test_rank_weights_by_hand() -> None:
    score = torch.tensor([[5.0, 1.0, 3.0, 9.0]], dtype=torch.float64)
    weights = rank_weights(score, torch.tensor([[True, True, True, False]]))[0]
    d1, d2, d3 = 1.0, 1 / math.log2(3), 0.5
    assert weights[1, 2].item() == pytest.approx(d1 - d2)
    assert weights[0, 1].item() == pytest.approx(d1 - d3)
    assert weights[2, 0].item() == pytest.approx(d2 - d3)
    tied = rank_weights(torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool))[0]
    assert tied[0, 1].item() == pytest.approx(d1 - d2)
    assert tied[0, 2].item() == tied[1, 2].item() == pytest.approx((d1 + d2) / 2 - d3)


@pytest.mark.parametrize("loss", ["soft", "listnet"])
def test_optimum_is_finite_and_the_softmax_of_the_scores(loss: Loss) -> None:
    targets = plain([[-3.0, -1.0, 0.5, 2.0]], weight_NA=torch.tensor([[1.0, 0.3, 2.0, 0.7]], dtype=torch.float64))
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        sums = ranking_loss(loss, logits, targets, temperature=0.1, eta=1.3)
        (sums.total / sums.weight).backward()
        return (sums.total / sums.weight).detach()

    optimizer.step(closure)
    found = torch.softmax(logits.detach() / 0.1, dim=1)
    torch.testing.assert_close(found, torch.softmax(-targets.score_NA / 1.3, dim=1), atol=1e-6, rtol=1e-6)


def test_plain_ranknet_grows_without_bound_where_soft_stands_still() -> None:
    targets = plain([[-1.0, 0.0, 1.0]])
    logits = (-targets.score_NA * 0.1).requires_grad_()  # the optimum of `soft` at T = 0.1, eta = 1
    pulls = {}
    for loss in ("soft", "hard"):
        (pulls[loss],) = torch.autograd.grad(ranking_loss(loss, logits, targets, temperature=0.1, eta=1.0).total, logits)
    assert pulls["soft"].abs().max() < 1e-12
    assert pulls["hard"][0, 0] < -0.5


def test_equally_sure_agents_become_equally_probable() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    ranking_loss("soft", logits, plain([[2.0, 2.0, 2.0]]), temperature=1.0, eta=1.0).total.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0.01
    assert logits.grad[0, 2] < -0.01


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_matches_finite_differences(loss: Loss) -> None:
    logits, targets = sample(num_steps=3, seed=5)
    assert torch.autograd.gradcheck(
        lambda z: ranking_loss(loss, z, targets, temperature=T, eta=ETA).total, (logits.requires_grad_(),)
    )


@settings(max_examples=25, derandomize=True)
@given(loss=st.sampled_from(LOSSES), seed=st.integers(0, 50), shift=st.floats(-5, 5), shuffle=st.randoms(use_true_random=False))
def test_invariances(loss: Loss, seed: int, shift: float, shuffle: object) -> None:
    """A constant on all logits, one on all scores, the order of the agents, missing agents' values: none matters."""
    logits, targets = sample(seed=seed)
    expected = ranking_loss(loss, logits, targets, temperature=T, eta=ETA)
    order = list(range(5))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    garbage = torch.where(targets.ran_NA, targets.weight_NA, 77.0)
    others = [
        (logits + shift, targets),
        (logits, targets._replace(score_NA=targets.score_NA + round(shift))),
        (logits[:, order], Targets(*(x[:, order] for x in targets))),
        (logits.flip(0), Targets(*(x.flip(0) for x in targets))),
        (torch.where(targets.ran_NA, logits, -50.0), targets._replace(weight_NA=garbage)),
        (logits.reshape(2, 3, 5), Targets(*(x.reshape(2, 3, 5) for x in targets))),
    ]
    for z, other in others:
        found = ranking_loss(loss, z, other, temperature=T, eta=ETA)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up_to_the_whole(loss: Loss) -> None:
    logits, targets = sample()
    whole = ranking_loss(loss, logits, targets, temperature=T, eta=ETA)
    parts = [
        ranking_loss(loss, logits[i : i + 2], Targets(*(x[i : i + 2] for x in targets)), temperature=T, eta=ETA)
        for i in (0, 2, 4)
    ]
    assert float(whole.total) == pytest.approx(sum(float(part.total) for part in parts), rel=1e-12)
    assert float(whole.weight) == pytest.approx(sum(float(part.weight) for part in parts), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_ran", [0, 1])
def test_steps_without_a_pair_teach_nothing(loss: Loss, num_ran: int) -> None:
    logits, targets = sample(num_steps=2)
    ran = torch.zeros_like(targets.ran_NA)
    ran[:, :num_ran] = True
    logits.requires_grad_()
    found = ranking_loss(loss, logits, targets._replace(ran_NA=ran), temperature=T, eta=ETA)
    found.total.backward()
    assert (found.total.item(), found.weight.item()) == (0.0, 0.0)
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", LOSSES)
def test_agents_that_did_not_run_get_no_gradient(loss: Loss) -> None:
    logits, targets = sample()
    logits.requires_grad_()
    ranking_loss(loss, logits, targets, temperature=T, eta=ETA).total.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[~targets.ran_NA], torch.zeros(int((~targets.ran_NA).sum()), dtype=torch.float64))
    assert torch.isfinite(logits.grad).all()


def test_a_reply_without_a_score_does_not_count() -> None:
    logits, targets = sample(missing=0.0)
    blank = targets.score_NA.clone()
    blank[:, 2] = math.nan
    without = targets.ran_NA.clone()
    without[:, 2] = False
    found = ranking_loss("soft", logits, targets._replace(score_NA=blank), temperature=T, eta=ETA)
    expected = ranking_loss("soft", logits, targets._replace(ran_NA=without), temperature=T, eta=ETA)
    assert torch.equal(found.total, expected.total)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_agrees_and_extremes_stay_finite(loss: Loss) -> None:
    logits, targets = sample()
    exact = ranking_loss(loss, logits, targets, temperature=T, eta=ETA)
    single = ranking_loss(loss, logits.float(), targets, temperature=T, eta=ETA)
    assert single.total.dtype == torch.float32
    torch.testing.assert_close(single.total.double(), exact.total, rtol=1e-5, atol=1e-5)
    far = (1e4 * logits.float()).requires_grad_()
    total = ranking_loss(loss, far, targets._replace(score_NA=targets.score_NA * 1e3), temperature=T, eta=1e-3).total
    total.backward()
    assert math.isfinite(total.item())
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("name", ["temperature", "eta"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_scales_must_be_positive(name: str, bad: float) -> None:
    logits, targets = sample()
    with pytest.raises(ConfigError, match=f"ranking loss: {name} is"):
        ranking_loss("soft", logits, targets, **({"temperature": T, "eta": ETA} | {name: bad}))
