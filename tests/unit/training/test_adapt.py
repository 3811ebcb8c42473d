"""One update of adaptation: what it learns from, what it leaves alone, and that workers agree."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dmoa.checkpoint import AnchorSet, Checkpoint, describe_gate
from dmoa.core.gate import Gate, init_gate
from dmoa.core.label_model import MIN_ROWS, LabelModel
from dmoa.core.losses import LossSums
from dmoa.core.scores import CONSTANT_PENALTY
from dmoa.feedback import MARK, Feedback
from dmoa.training.adapt import Adapter, Lesson, episodes_of
from dmoa.training.dataset import Episodes
from dmoa.training.distributed import GlobalLoss, Shared, SingleWorker, WorkerGroup
from dmoa.training.options import AdaptSettings
from dmoa.types import EntropySum
from tests.unit.training.adapt_lessons import CENTRES, CPU, lesson, place, spec


def episodes(domains: Sequence[int], count: int) -> Episodes:
    found = [episodes_of(lesson(domain, number), spec()) for number in range(count) for domain in domains]
    return Episodes.joined([one for one in found if isinstance(one, Episodes)])


def deployed(domains: Sequence[int] = (0, 1)) -> tuple[Gate, Checkpoint]:
    """A gate that knows some domains, and was never told of the others."""
    gate = init_gate(spec(), seed=3)
    start = describe_gate(gate, fingerprint="f" * 64)
    adapter = Adapter(gate, start, None, AdaptSettings(pull=0.0, steps=4, lr=3e-3), SingleWorker(CPU))
    for number in range(10):
        adapter.learn([lesson(domain, number) for domain in domains])
    return adapter.candidate()


@pytest.fixture(scope="module", name="start")
def _start() -> tuple[Gate, Checkpoint]:
    return deployed()


def right(gate: Gate, domain: int) -> float:
    """Share of unseen queries of a domain whose most probable agent is the one that knows it."""
    x_BX = torch.from_numpy(np.stack([place(domain, 1000 + number) for number in range(50)]))
    with torch.no_grad():
        logits_BA = gate(x_BX, torch.zeros(50, gate.spec.hidden)).logits_BA
    return float((logits_BA.argmax(dim=1) == domain).float().mean())


def adapter_of(start: tuple[Gate, Checkpoint], world: WorkerGroup | None = None, **settings: object) -> Adapter:
    options = AdaptSettings.parse(settings)
    return Adapter(*start, episodes((0, 1), 12), options, world or SingleWorker(CPU))


def test_thirty_queries_teach_a_new_domain_and_keep_the_old_ones(start: tuple[Gate, Checkpoint]) -> None:
    assert [right(start[0], domain) for domain in (0, 1)] == [1.0, 1.0]
    assert right(start[0], 2) < 0.5
    adapter = adapter_of(start)
    updates = [adapter.learn([lesson(2, number)]) for number in range(30)]
    gate, record = adapter.candidate()
    assert right(gate, 2) >= 0.95
    assert min(right(gate, 0), right(gate, 1)) >= 0.98
    assert updates[-1].number == 30
    assert updates[-1].distance > updates[0].distance > 0
    assert record.parent == start[1].version
    assert record.trained_on is not None
    assert record.trained_on["adapted"]["queries"] == 30


def test_three_old_queries_are_replayed_for_each_new_one(start: tuple[Gate, Checkpoint]) -> None:
    update = adapter_of(start, steps=5).learn([lesson(2, 0)])
    assert update.replayed == 5 * 3
    update = adapter_of(start, steps=1, batch_queries=1).learn([lesson(2, number) for number in range(2)])
    assert update.replayed == 6


@pytest.mark.parametrize(("old", "drawn"), [(3, (1, 3)), (7, (2, 6)), (12, (4, 12))])
def test_of_few_old_queries_no_more_new_ones_are_drawn_than_keep_the_proportion(
    start: tuple[Gate, Checkpoint], old: int, drawn: tuple[int, int]
) -> None:
    adapter = Adapter(*start, episodes((0,), old), AdaptSettings(), SingleWorker(CPU))
    adapter.learn([lesson(2, number) for number in range(4)])
    batch, replayed = adapter._drawn(np.random.default_rng(0), 4)
    assert (len(batch) - replayed, replayed) == drawn


def test_point_and_anchors_stay_but_at_a_declared_shift(start: tuple[Gate, Checkpoint]) -> None:
    adapter = adapter_of(start)
    for number in range(8):
        assert not adapter.learn([lesson(2, number)]).refitted
    still, record = adapter.candidate()
    assert still.spec == start[0].spec
    assert record.metrics["eta"] == start[1].metrics["eta"]
    assert adapter.learn([lesson(2, 8)], shift=True).refitted
    moved, record = adapter.candidate()
    assert moved.spec.anchors != start[0].spec.anchors
    assert record.anchor_set is not None
    assert record.anchor_set.rows == 24 + 9


def with_third_barred(start: tuple[Gate, Checkpoint]) -> tuple[Gate, Checkpoint]:
    """The same gate, had agent `three` said one thing to all queries that it was trained on."""
    gate, record = start
    assert gate.spec.anchors is not None
    means = (*gate.spec.anchors[:2], gate.spec.anchors[2] - CONSTANT_PENALTY)
    barred = Gate(dataclasses.replace(gate.spec, anchors=means))
    barred.load_state_dict(gate.state_dict())
    anchor_set = AnchorSet(means=means, rows=20, clusters=8, constant=("three",))
    described = describe_gate(
        barred, fingerprint="f" * 64, trained_on=record.trained_on, anchor_set=anchor_set, metrics=dict(record.metrics)
    )
    return barred, described


def with_one_word(taught: Lesson) -> Lesson:
    """The same lesson where agent `three` said the one thing that it always says."""
    step = taught.answer.steps[0]
    replies = tuple(dataclasses.replace(one, text="42") if one.agent == "three" else one for one in step.replies)
    answer = dataclasses.replace(taught.answer, steps=(dataclasses.replace(step, replies=replies),))
    return dataclasses.replace(taught, answer=answer)


def test_an_agent_barred_for_saying_one_thing_is_heard_again_once_it_says_others(start: tuple[Gate, Checkpoint]) -> None:
    barred = with_third_barred(start)
    adapter = adapter_of(barred)
    for number in range(3):
        adapter.learn([lesson(2, number)])
    assert adapter.candidate()[0].spec == barred[0].spec  # three replies are too few to tell
    for number in range(3, 30):
        adapter.learn([lesson(2, number)])
    gate, record = adapter.candidate()
    assert right(gate, 2) >= 0.95
    assert gate.spec.anchors == pytest.approx(start[0].spec.anchors)
    assert record.anchor_set is not None
    assert record.anchor_set.constant == ()
    assert record.anchor_set.means == gate.spec.anchors


def test_an_agent_that_goes_on_saying_one_thing_stays_barred(start: tuple[Gate, Checkpoint]) -> None:
    barred = with_third_barred(start)
    adapter = adapter_of(barred)
    for number in range(30):
        adapter.learn([with_one_word(lesson(2, number))])
    gate, record = adapter.candidate()
    assert right(gate, 2) < 0.5
    assert gate.spec == barred[0].spec
    assert record.anchor_set == barred[1].anchor_set


def test_the_version_is_by_content(start: tuple[Gate, Checkpoint]) -> None:
    first, second = adapter_of(start), adapter_of(start)
    assert first.candidate()[1].version == start[1].version
    for adapter in (first, second):
        adapter.learn([lesson(2, 0)])
    assert first.candidate()[1].version == second.candidate()[1].version != start[1].version


def test_weights_that_learnt_nothing_stay_untrained() -> None:
    gate = init_gate(spec(), seed=3)
    adapter = Adapter(gate, describe_gate(gate, fingerprint="f" * 64), None, AdaptSettings(), SingleWorker(CPU))
    adapter.learn([lesson(0, 0)])  # no scale can be fitted on one query
    assert adapter.candidate()[1].version.startswith("untrained-")
    adapter.learn([lesson(domain, number) for number in range(3) for domain in range(3)])
    assert not adapter.candidate()[1].version.startswith("untrained-")


@pytest.mark.parametrize("shift", [False, True])
def test_a_scale_is_fitted_on_enough_queries_and_on_no_fewer(shift: bool) -> None:
    gate = init_gate(spec(), seed=3)
    adapter = Adapter(gate, describe_gate(gate, fingerprint="f" * 64), None, AdaptSettings(), SingleWorker(CPU))
    updates = [adapter.learn([lesson(number % 3, number)], shift=shift) for number in range(MIN_ROWS)]
    assert [update.refitted for update in updates] == [False] * (MIN_ROWS - 1) + [True]
    assert [update.loss is None for update in updates] == [True] * (MIN_ROWS - 1) + [False]


def test_records_that_teach_nothing_are_counted_by_reason(start: tuple[Gate, Checkpoint]) -> None:
    adapter, whole = adapter_of(start), lesson(2, 0)
    alone = dataclasses.replace(whole.answer.steps[0], replies=whole.answer.steps[0].replies[:1], explored=())
    undecided = dataclasses.replace(whole.answer.steps[0], decision=None)
    bad = [dataclasses.replace(whole, answer=dataclasses.replace(whole.answer, steps=(step,))) for step in (alone, undecided)]
    update = adapter.learn([*bad, lesson(2, 1, nats=float("nan")), lesson(2, 2, agents=("one", "other"))])
    assert update.used == 0
    assert update.loss is None
    assert update.number == 0
    assert update.skipped == {
        "fewer than two replies to compare": 1,
        "no gate decided it": 1,
        "numbers that are not finite, or do not fit the gate": 1,
        "agents that the gate does not know": 1,
    }
    assert adapter.candidate()[1].version == start[1].version


def test_feedback_is_taken_as_it_is(start: tuple[Gate, Checkpoint]) -> None:
    record = Feedback(answer=lesson(2, 0).answer, tenant="t", fingerprint="f" * 64, created_unix_s=1.0)
    assert adapter_of(start).learn([record]).used == 1


def test_the_replay_stays_a_fair_sample_of_all_that_ever_joined_it(start: tuple[Gate, Checkpoint]) -> None:
    adapter = adapter_of(start, recent=1, replay_queries=12, steps=1)  # it begins with 24 queries of two domains
    shares = []
    for number in range(1, 97):
        adapter.learn([lesson(2, number)])
        if number > 48:
            assert adapter._old is not None
            shares.append(np.mean([not key.query_id.startswith("d2/") for key in adapter._old.key_Q]))
    # 24 of 72 to 24 of 120, by chance; were it drawn anew with each that joins, all would be gone.
    assert 0.1 < np.mean(shares) < 0.5


def test_what_leaves_the_recent_queries_is_replayed(start: tuple[Gate, Checkpoint]) -> None:
    adapter = adapter_of(start, recent=4, replay_queries=26, replay_ratio=100, steps=1)
    counts = [adapter.learn([lesson(2, number)]).replayed for number in range(9)]
    assert counts == [24, 24, 24, 24, 25, 26, 26, 26, 26]


def test_joined_episodes_are_taken_apart_again() -> None:
    whole = episodes((0, 1, 2), 3)
    parts = [whole.take(np.array(chosen)) for chosen in ([0, 1], [2], [3, 4, 5, 6, 7, 8])]
    again = Episodes.joined(parts)
    assert again.digest() == whole.digest()
    assert [key.query_id for key in whole.take(np.array([8, 0])).key_Q] == ["d2/2", "d0/0"]


class Pair:
    """Two workers in two threads: gradients are added up by hand."""

    def __init__(self, rank: int, together: threading.Barrier, desk: dict[int, tuple[list[torch.Tensor], float, float]]) -> None:
        self.rank, self.size, self.device = rank, 2, CPU
        self._together, self._desk = together, desk

    def backward(self, sums: LossSums | None, parameters: Sequence[torch.nn.Parameter]) -> GlobalLoss:
        if sums is not None:
            torch.autograd.backward(sums.total)
        mine = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        self._desk[self.rank] = (mine, 0.0, 0.0) if sums is None else (mine, float(sums.total.detach()), float(sums.weight))
        self._together.wait()
        weight = self._desk[0][2] + self._desk[1][2]
        for number, parameter in enumerate(parameters):
            parameter.grad = (self._desk[0][0][number] + self._desk[1][0][number]) / weight
        found = GlobalLoss(self._desk[0][1] + self._desk[1][1], weight)
        self._together.wait()
        return found

    def agree(self, value: float) -> float:
        return value

    def share(self, value: Shared) -> Shared:
        return value


def test_two_workers_hold_the_weights_of_one(start: tuple[Gate, Checkpoint]) -> None:
    def adapted(world: WorkerGroup, found: list[dict[str, torch.Tensor]]) -> None:
        adapter = adapter_of(start, world, dtype="float64")
        for number in range(4):
            adapter.learn([lesson(2, 2 * number), lesson(2, 2 * number + 1)])
        found.append(adapter.weights())

    alone: list[dict[str, torch.Tensor]] = []
    adapted(SingleWorker(CPU), alone)
    together = threading.Barrier(2, timeout=30)
    desk: dict[int, tuple[list[torch.Tensor], float, float]] = {}
    both: list[dict[str, torch.Tensor]] = []
    threads = [threading.Thread(target=adapted, args=(Pair(rank, together, desk), both)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(both) == 2
    for name, value in alone[0].items():
        assert value.dtype == torch.float64
        for other in both:
            assert float((value - other[name]).abs().max()) < 1e-12


def without_entropies(domain: int, number: int, outcomes: dict[str, float] | None = None) -> Lesson:
    """A query to which everybody gives an answer of its own, and of which no entropy is known."""
    base = lesson(domain, number)
    step = base.answer.steps[0]
    replies = tuple(
        dataclasses.replace(r, text=str(100 * at + number), entropy=EntropySum()) for at, r in enumerate(step.replies)
    )
    answer = dataclasses.replace(base.answer, steps=(dataclasses.replace(step, replies=replies),))
    return dataclasses.replace(base, answer=answer, outcomes=outcomes or {})


def judging() -> tuple[Gate, Checkpoint]:
    """A gate of score posterior that knows domain 0, where agent one is right most often."""
    zero = np.zeros((1, 3))
    model = LabelModel(
        centre_CD=CENTRES[:1],
        ability_CA=np.array([[1.5, 0.5, 0.0]]),
        doubt_mean_A=np.zeros(3),
        doubt_CA=zero,
        doubt_slope_CA=zero,
        length_mean_CA=zero,
        length_sd_A=np.ones(3),
        length_share=0.0,
        length_slope=0.0,
        copy_AA=np.full((3, 3), 0.2),
        context_sd=0.5,
        spread=1.0,
        noise=0.05,
        reliance_C=np.ones(1),
    )
    judged = spec(score="posterior")
    gate = Gate(judged, label_model=model)
    gate.load_state_dict(init_gate(judged, seed=3).state_dict())
    return gate, describe_gate(gate, fingerprint="f" * 64, trained_on={"rows": 1})


def test_outcomes_of_a_new_domain_lead_beside_the_weights_and_leave_them_alone() -> None:
    gate, record = judging()
    known = [episodes_of(without_entropies(0, number), gate.spec) for number in range(12)]
    replay = Episodes.joined([one for one in known if isinstance(one, Episodes)])
    adapter = Adapter(gate, record, replay, AdaptSettings(), SingleWorker(CPU))
    for number in range(6):
        update = adapter.learn([without_entropies(2, number, {"one": 0.0, "two": 0.0, "three": 1.0})])
        assert (update.loss, update.skipped) == (None, {"led by outcomes": 1})
    now, written = adapter.candidate()
    assert now.label_model is not None
    assert now.label_model.ability_CA.argmax(axis=1).tolist() == [0, 2]
    assert now.label_model.ability_CA[0].tolist() == [1.5, 0.5, 0.0]
    assert all(torch.equal(now.state_dict()[name], tensor) for name, tensor in gate.state_dict().items())
    assert written.version != record.version
    assert (written.trained_on or {})["supervision"] == "outcomes(6)"
    assert adapter.learn([without_entropies(0, 50)]).loss is not None  # of the domain that it knows: weights learn as ever


def test_a_query_in_several_batches_is_counted_once_and_so_is_its_outcome() -> None:
    gate, record = judging()
    known = [episodes_of(without_entropies(0, number), gate.spec) for number in range(12)]
    replay = Episodes.joined([one for one in known if isinstance(one, Episodes)])
    told = {"one": 0.0, "two": 0.0, "three": 1.0}
    models = []
    for batches in (1, 3):
        adapter = Adapter(gate, record, replay, AdaptSettings(), SingleWorker(CPU))
        for _ in range(batches):
            adapter.learn([without_entropies(2, number, told) for number in range(4)])
        now, written = adapter.candidate()
        assert (adapter.used, adapter.outcomes, (written.trained_on or {})["supervision"]) == (4, 4, "outcomes(4)")
        models.append(now.label_model)
    assert models[0] is not None
    assert models[1] is not None
    assert models[0].lead_C.tolist() == models[1].lead_C.tolist() == pytest.approx([0.0, 4 / 14])
    late = Adapter(gate, record, replay, AdaptSettings(), SingleWorker(CPU))
    for outcomes in (None, told):  # heard of when it is in its second batch
        late.learn([without_entropies(2, 0, outcomes)])
    assert (late.used, late.outcomes) == (1, 1)


def test_a_score_that_reads_no_outcomes_counts_none(start: tuple[Gate, Checkpoint]) -> None:
    adapter = adapter_of(start)
    adapter.learn([dataclasses.replace(lesson(2, 0), outcomes={"three": 1.0})])
    assert (adapter.used, adapter.outcomes) == (1, 0)
    assert (adapter.candidate()[1].trained_on or {})["supervision"] == "none"


def test_traffic_teaches_without_entropies_and_without_lengths() -> None:
    gate, _ = judging()
    base = without_entropies(0, 1)
    found = episodes_of(dataclasses.replace(base, query_id=f"{MARK}{base.query_id}"), gate.spec)
    assert isinstance(found, Episodes)
    assert np.isnan(found.length_NA).all()


def test_a_shift_to_replies_without_answers_refits_nothing() -> None:
    gate, record = judging()
    adapter = Adapter(gate, record, None, AdaptSettings(), SingleWorker(CPU))
    prose = "It happens since light scatters.\n\nShorter waves scatter more than longer ones do.\n\nI hope this helps, {}!"
    for number in range(10):
        base = lesson(2, number)
        step = base.answer.steps[0]
        replies = tuple(dataclasses.replace(one, text=prose.format(one.agent)) for one in step.replies)
        answer = dataclasses.replace(base.answer, steps=(dataclasses.replace(step, replies=replies),))
        assert not adapter.learn([dataclasses.replace(base, answer=answer)], shift=True).refitted
    assert adapter.candidate()[0].label_model is gate.label_model
